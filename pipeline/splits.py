"""Train, validation and test by blocks of cells: neighbours never end up on both sides without a gap.

A cell's split depends on its place and the seed alone, so an append never moves a chip from one split to another.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache

from pipeline.grid import Cell, block_key, cell_at, is_owned


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
    """train, val, test or buffer."""
    own = _block_split(block_key(cell, cells_per_side=rules.block_cells), rules)
    if own != "train" or rules.buffer_cells == 0:
        return own
    return "buffer" if any(s != "train" for s in _neighbour_splits(cell, rules)) else "train"


@lru_cache(maxsize=1 << 16)
def _block_split(block: tuple[int, int, int], rules: SplitRules) -> str:
    digest = hashlib.sha256(repr((rules.seed, block)).encode()).digest()
    draw = int.from_bytes(digest[:8]) / 2**64
    if draw < rules.test_fraction:
        return "test"
    return "val" if draw < rules.test_fraction + rules.val_fraction else "train"


def _neighbour_splits(cell: Cell, rules: SplitRules) -> list[str]:
    """Splits of the cells on the rim of the buffer and inside it; across a zone border, of the owning zone's cells."""
    reach = range(-rules.buffer_cells, rules.buffer_cells + 1)
    splits = []
    for down in reach:
        for right in reach:
            near = Cell(epsg=cell.epsg, column=cell.column + right, row=cell.row + down, side_m=cell.side_m)
            owner = near if is_owned(near) else cell_at(*near.centre_lonlat, side_m=cell.side_m)
            splits.append(_block_split(block_key(owner, cells_per_side=rules.block_cells), rules))
    return splits
