"""Train, validation and test by blocks of cells: neighbours never end up on both sides without a gap.

A cell's split depends on its place and the seed alone, so an append never moves a chip from one split to another.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

from pipeline.grid import (
    Cell,
    Integers,
    block_key,
    cells_around,
    cells_near,
    owned,
    ring_lonlat,
    surely_owned,
    utm_epsgs,
)

SPLITS: Final = ("train", "val", "test", "buffer")
"""A split's place in here is its code in arrays."""

_TRAIN, _VAL, _TEST, _BUFFER = range(4)

_SLOTS_AT_ONCE: Final = 1 << 22
"""Cells of the blocks that are worked on at a time: bounds the memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitRules:
    """How cells are shared out."""

    block_cells: int
    """Side of a split block, in cells."""

    val_fraction: float
    """Share of blocks for choosing hyper-parameters."""

    test_fraction: float
    """Share of blocks for the reported numbers."""

    buffer_cells: int
    """Train gives up cells this near to a val or test block; they become `buffer`."""

    seed: int


def split_of(cell: Cell, rules: SplitRules) -> str:
    """train, val, test or buffer.

    A cell is of its block's split. A cell of train with fewer than `buffer_cells` cells between it and an owned cell of
    another split is of `buffer`, also across the borders of zones.
    """
    own = _code_of(cell, rules)
    if own == _TRAIN and rules.buffer_cells:
        near = cells_near(cell, reach=rules.buffer_cells)
        own = _BUFFER if any(_code_of(other, rules) != _TRAIN for other in near) else _TRAIN
    return SPLITS[own]


def splits_of(
    epsg: Integers, columns: Integers, rows: Integers, *, side_m: int, rules: SplitRules
) -> NDArray[np.uint8]:
    """`split_of` of many cells, as codes: places in `SPLITS`.

    The work is done once per block that has a cell, so that many chips of a cell or block cost little each.

    Args:
        epsg: (n,) zones.
        columns: (n,) columns.
        rows: (n,) rows.
        side_m: Side of the cells in metres.
        rules: How cells are shared out.

    Returns:
        (n,).
    """
    codes = np.empty(len(epsg), np.uint8)
    for zone in np.flatnonzero(np.bincount(epsg - 32600)) + 32600 if len(epsg) else ():
        here = epsg == zone
        inside = slice(None) if here.all() else np.flatnonzero(here)
        codes[inside] = _splits_of_zone(int(zone), columns[inside], rows[inside], side_m, rules)
    return codes


def _splits_of_zone(epsg: int, columns: Integers, rows: Integers, side_m: int, rules: SplitRules) -> NDArray[np.uint8]:
    side = rules.block_cells
    block_columns, block_rows = columns // side, rows // side
    first_column, first_row = int(block_columns.min()), int(block_rows.min())
    width = int(block_columns.max()) - first_column + 1
    keys = (block_rows.astype(np.int64) - first_row) * width + (block_columns - first_column)
    blocks, slots = _distinct(keys)
    tables = np.empty((len(blocks), side, side), np.uint8)
    step = max(1, _SLOTS_AT_ONCE // (side + 2 * rules.buffer_cells) ** 2)
    for start in range(0, len(blocks), step):
        some = blocks[start : start + step]
        tables[start : start + step] = _tables(
            epsg, some % width + first_column, some // width + first_row, side_m, rules
        )
    within = (rows - block_rows * side) * side + (columns - block_columns * side)
    codes: NDArray[np.uint8] = tables.reshape(-1)[slots * side**2 + within]
    return codes


def _distinct(keys: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Distinct keys in order, and for each key its place among them; keys are not negative and mostly small."""
    if keys.max() > max(1 << 24, 8 * len(keys)):
        distinct, places = np.unique(keys, return_inverse=True)
        return distinct, places
    present = np.zeros(int(keys.max()) + 1, np.bool_)
    present[keys] = True
    distinct = np.flatnonzero(present)
    place = np.empty(len(present), np.int64)
    place[distinct] = np.arange(len(distinct))
    return distinct, place[keys]


def _tables(
    epsg: int, block_columns: Integers, block_rows: Integers, side_m: int, rules: SplitRules
) -> NDArray[np.uint8]:
    """(block, row, column) codes of the cells of blocks of one zone."""
    side, reach = rules.block_cells, rules.buffer_cells
    own = _codes_of(epsg, block_columns, block_rows, rules)
    tables = np.broadcast_to(own[:, None, None], (len(own), side, side)).copy()
    train = own == _TRAIN
    if reach == 0 or not train.any():
        return tables
    block_columns, block_rows = block_columns[train], block_rows[train]
    held_out = _held_out_around(epsg, block_columns, block_rows, side_m, rules)
    near = np.zeros((len(block_columns), side, side), np.bool_)
    for down in range(2 * reach + 1):
        for right in range(2 * reach + 1):
            near |= held_out[:, down : down + side, right : right + side]
    steps = np.arange(side)
    columns = np.broadcast_to((block_columns[:, None] * side + steps)[:, None, :], near.shape)
    rows = np.broadcast_to((block_rows[:, None] * side + steps)[:, :, None], near.shape)
    open_still = ~near & ~_far_from_borders(epsg, columns, rows, side_m, reach)
    near[open_still] = _near_other_zones(epsg, columns[open_still], rows[open_still], side_m, rules)
    tables[train] = np.where(near, np.uint8(_BUFFER), np.uint8(_TRAIN))
    return tables


def _held_out_around(
    epsg: int, block_columns: Integers, block_rows: Integers, side_m: int, rules: SplitRules
) -> NDArray[np.bool_]:
    """(block, row, column), with a rim of the buffer's width: owned cells of the same zone in val or test."""
    side, reach = rules.block_cells, rules.buffer_cells
    span = np.arange(-reach, side + reach)
    blocks = np.arange(span[0] // side, span[-1] // side + 1)
    shape = (len(block_columns), len(blocks), len(blocks))
    around = [
        np.broadcast_to(block_columns[:, None, None] + blocks, shape),
        np.broadcast_to(block_rows[:, None, None] + blocks[:, None], shape),
    ]
    codes = _codes_of(epsg, around[0].ravel(), around[1].ravel(), rules).reshape(shape)
    place = span // side - blocks[0]
    held_out: NDArray[np.bool_] = codes[:, place[:, None], place] != _TRAIN
    block, row, column = np.nonzero(held_out)
    columns, rows = block_columns[block] * side + span[column], block_rows[block] * side + span[row]
    held_out[block, row, column] = owned(epsg, columns, rows, side_m=side_m)
    return held_out


def _far_from_borders(epsg: int, columns: Integers, rows: Integers, side_m: int, reach: int) -> NDArray[np.bool_]:
    """Cells around which the buffer surely meets no cell of another zone."""
    far = np.ones(columns.shape, np.bool_)
    # What is surely owned narrows towards the poles: between four such cells, all are.
    for right in (-reach - 2, reach + 2):
        for up in (-reach - 2, reach + 2):
            far &= surely_owned(epsg, columns + right, rows + up, side_m=side_m)
    return far


def _near_other_zones(
    epsg: int, columns: Integers, rows: Integers, side_m: int, rules: SplitRules
) -> NDArray[np.bool_]:
    """Cells near which another zone has an owned cell in val or test, near as in `cells_near`."""
    near = np.zeros(len(columns), np.bool_)
    zones = utm_epsgs(*ring_lonlat(epsg, columns, rows, side_m=side_m, reach=rules.buffer_cells + 1))
    for other in set(np.unique(zones).tolist()) - {epsg}:
        here = np.flatnonzero((zones == other).any(axis=1))
        ring = ring_lonlat(epsg, columns[here], rows[here], side_m=side_m, reach=rules.buffer_cells)
        west, south, east, north = cells_around(other, *ring, side_m=side_m).T
        for right in range(int((east - west).max())):
            for up in range(int((north - south).max())):
                meets = np.flatnonzero((west + right < east) & (south + up < north))
                near[here[meets]] |= _are_held_out(other, west[meets] + right, south[meets] + up, side_m, rules)
    return near


def _are_held_out(epsg: int, columns: Integers, rows: Integers, side_m: int, rules: SplitRules) -> NDArray[np.bool_]:
    codes = _codes_of(epsg, columns // rules.block_cells, rows // rules.block_cells, rules)
    held_out: NDArray[np.bool_] = codes != _TRAIN
    held_out[held_out] = owned(epsg, columns[held_out], rows[held_out], side_m=side_m)
    return held_out


def _codes_of(epsg: int, block_columns: Integers, block_rows: Integers, rules: SplitRules) -> NDArray[np.uint8]:
    """(block,) train, val or test."""
    distinct, places = np.unique(
        (block_rows.astype(np.int64) << 32) + (block_columns.astype(np.int64) + (1 << 31)), return_inverse=True
    )
    columns, rows = (distinct & 0xFFFFFFFF) - (1 << 31), distinct >> 32
    codes = [_block_code((epsg, *block), rules) for block in zip(columns.tolist(), rows.tolist(), strict=True)]
    return np.array(codes, np.uint8)[places]


def _code_of(cell: Cell, rules: SplitRules) -> int:
    return _block_code(block_key(cell, cells_per_side=rules.block_cells), rules)


@lru_cache(maxsize=1 << 16)
def _block_code(block: tuple[int, int, int], rules: SplitRules) -> int:
    digest = hashlib.sha256(repr((rules.seed, block)).encode()).digest()
    draw = int.from_bytes(digest[:8]) / 2**64
    if draw < rules.test_fraction:
        return _TEST
    return _VAL if draw < rules.test_fraction + rules.val_fraction else _TRAIN
