"""Random fields that are functions of a place: asked twice, in any order or raster, they answer the same.

Each field hashes the corners of a lattice over the plane, so a scene of any size, offset or map projection
that asks for the same place gets the same value, and nothing has to be stored.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Hashes = NDArray[np.uint32]

_UNIT_STD: Final = np.float32(2.331)
"""Brings smoothly interpolated uniform corner values to a standard deviation of 1."""


def lattice_hash(column: NDArray[np.int32], row: NDArray[np.int32], seed: int) -> Hashes:
    """A well-mixed number per lattice node; neighbours and seeds are unrelated."""
    mixed: Hashes = column.view(np.uint32) * np.uint32(0x9E3779B1) ^ row.view(np.uint32) * np.uint32(0x85EBCA77)
    mixed ^= np.uint32((seed * 0xC2B2AE3D + 0x27D4EB2F) & 0xFFFFFFFF)
    for shift, factor in ((15, 0x2C1B3C6D), (12, 0x297A2D39)):
        mixed ^= mixed >> np.uint32(shift)
        mixed *= np.uint32(factor)
    mixed ^= mixed >> np.uint32(15)
    return mixed


def uniform(hashes: Hashes, draw: int = 0) -> Floats:
    """Numbers in [0, 1) from hashes; another `draw` gives independent ones."""
    again = lattice_hash(hashes.view(np.int32), np.full(1, draw, np.int32), draw) if draw else hashes
    return (again >> np.uint32(8)).astype(np.float32) * np.float32(2**-24)


def normal(hashes: Hashes, draw: int) -> Floats:
    """Close to standard normal numbers from hashes: the sum of three uniforms of ten bits each."""
    again = lattice_hash(hashes.view(np.int32), np.full(1, draw, np.int32), draw)
    total = (
        (again & np.uint32(1023))
        + (again >> np.uint32(10) & np.uint32(1023))
        + (again >> np.uint32(20) & np.uint32(1023))
    )
    centred: Floats = (total.astype(np.float32) - np.float32(1534.5)) * np.float32(2 / 1024)
    return centred


def value_noise(x_m: Floats, y_m: Floats, *, spacing_m: float, seed: int) -> Floats:
    """Smooth noise of mean 0 and standard deviation 1 whose features are about `spacing_m` wide."""
    column, x = _split(x_m, spacing_m)
    row, y = _split(y_m, spacing_m)
    one = np.int32(1)
    west = _mix(_corner(column, row, seed), _corner(column, row + one, seed), _smooth(y))
    east = _mix(_corner(column + one, row, seed), _corner(column + one, row + one, seed), _smooth(y))
    return _mix(west, east, _smooth(x)) * _UNIT_STD


def fractal(x_m: Floats, y_m: Floats, *, spacing_m: float, seed: int, octaves: int) -> Floats:
    """Noise at several scales, each half as wide and 0.55 as strong as the one before; standard deviation 1."""
    total = np.zeros(np.broadcast(x_m, y_m).shape, np.float32)
    for octave in range(octaves):
        noise = value_noise(x_m, y_m, spacing_m=spacing_m / 2**octave, seed=seed + 101 * octave)
        total += noise * np.float32(0.55**octave)
    return total / np.float32(np.sqrt(sum(0.55 ** (2 * octave) for octave in range(octaves))))


def polygons(x_m: Floats, y_m: Floats, *, spacing_m: float, seed: int) -> Hashes:
    """Irregular polygons (Voronoi cells of jittered lattice points): the hash of the polygon that holds each place."""
    column, x = _split(x_m, spacing_m)
    row, y = _split(y_m, spacing_m)
    owner = np.zeros(np.broadcast(x_m, y_m).shape, np.uint32)
    nearest = np.full(owner.shape, np.inf, np.float32)
    for step_x in (-1, 0, 1):
        for step_y in (-1, 0, 1):
            hashes = lattice_hash(column + np.int32(step_x), row + np.int32(step_y), seed)
            # 16 bits each place the point within the middle of its lattice square.
            offset_x = (hashes & np.uint32(0xFFFF)).astype(np.float32) * np.float32(0.8 / 65536) + np.float32(0.1)
            offset_y = (hashes >> np.uint32(16)).astype(np.float32) * np.float32(0.8 / 65536) + np.float32(0.1)
            distance = (offset_x + np.float32(step_x) - x) ** 2 + (offset_y + np.float32(step_y) - y) ** 2
            closer = distance < nearest
            np.copyto(nearest, distance, where=closer)
            np.copyto(owner, hashes, where=closer)
    return owner


def _split(metres: Floats, spacing_m: float) -> tuple[NDArray[np.int32], Floats]:
    """Lattice index and position within the lattice square (0-1)."""
    scaled = metres * np.float32(1.0 / spacing_m)
    whole = np.floor(scaled)
    return whole.astype(np.int32), scaled - whole


def _corner(column: NDArray[np.int32], row: NDArray[np.int32], seed: int) -> Floats:
    return uniform(lattice_hash(column, row, seed)) * np.float32(2.0) - np.float32(1.0)


def _smooth(fraction: Floats) -> Floats:
    return fraction * fraction * (np.float32(3.0) - np.float32(2.0) * fraction)


def _mix(low: Floats, high: Floats, share: Floats) -> Floats:
    return low + (high - low) * share
