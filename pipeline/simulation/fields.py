"""Fields far wider than a pixel (clouds, haze, weather): worked out on every sixth pixel, linear between."""

from __future__ import annotations

from typing import Final

from pipeline.simulation.frame import Frame, Plane, enlarge
from pipeline.simulation.noise import Floats, fractal

_NODE_PX: Final = 6


def nodes_of(frame: Frame) -> Frame:
    """Every sixth pixel of the frame, and one beyond; node k sits on the centre of pixel 6k."""
    half = (_NODE_PX - 1) / 2 * frame.resolution
    return Frame(
        epsg=frame.epsg,
        left=frame.left - half,
        top=frame.top + half,
        resolution=frame.resolution * _NODE_PX,
        width_px=frame.width_px // _NODE_PX + 2,
        height_px=frame.height_px // _NODE_PX + 2,
    )


def over_pixels(nodes: Floats, frame: Frame) -> Floats:
    """Values at the nodes of a frame -> values at its pixels, (row, column)."""
    return enlarge(nodes, _NODE_PX, (frame.height_px, frame.width_px))


def smooth_field(frame: Frame, plane: Plane, *, spacing_m: float, seed: int, octaves: int = 1) -> Floats:
    """Noise with standard deviation 1 over a frame, for features far wider than a pixel."""
    x_m, y_m = nodes_of(frame).on_plane(plane)
    nodes = fractal(x_m, y_m, spacing_m=spacing_m, seed=seed, octaves=octaves)
    return over_pixels(nodes, frame)
