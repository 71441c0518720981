"""Giving rows of a store to candidates, by whole arrays: 10^8 of them fit a driver.

Candidates arrive as integers, area by area, and are kept as 17 bytes each. They are ordered by a hash of their unit,
so that a shard mixes places and dates, whatever the order they came in; the first bits of the hash share them out
into buckets, which are sorted and packed one after another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.grid import Cell
from pipeline.splits import SPLITS, SplitRules, splits_of

SplitsOf = Callable[[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]], NDArray[np.uint8]]
"""Codes of splits from epsg, column and row of cells."""

_BUCKET_BITS: Final = 6
_NUM_BUCKETS: Final = 1 << _BUCKET_BITS
_FLUSH_ROWS: Final = 1 << 20
_REJECTIONS_AT_ONCE: Final = 1 << 17

_MAX_BLOCK_CELLS: Final = 256
"""A place in a block takes the 16 bits of a key that the hash of a unit leaves."""

_FIELD_BITS: Final = 24
_FIELD_OFFSET: Final = 1 << (_FIELD_BITS - 1)
_FIELD_MASK: Final = (1 << _FIELD_BITS) - 1
_FIRST_EPSG: Final = 32600
_LAST_EPSG: Final = 32760


class Planner:
    """Collects the candidates of one version, then gives them their rows.

    Args:
        block_cells: Side of the blocks of cells that are read together, in cells.
        shard_chips: Rows of a shard; a unit (one block of one pair of acquisitions) never straddles two shards.
        first_row: First free row of the store, at the start of a shard.
        seed: Decides the order of units.
        splits_of: How cells are shared out.

    Raises:
        ValueError: A whole block is larger than a shard.
    """

    def __init__(self, *, block_cells: int, shard_chips: int, first_row: int, seed: int, splits_of: SplitsOf) -> None:
        if block_cells**2 > shard_chips:
            raise ValueError(f"block_cells={block_cells}: {block_cells**2} chips do not fit a shard of {shard_chips}")
        if block_cells > _MAX_BLOCK_CELLS:
            raise ValueError(f"block_cells={block_cells}: at most {_MAX_BLOCK_CELLS}")
        assert first_row % shard_chips == 0, (first_row, shard_chips)
        self.block_cells = block_cells
        self.shard_chips = shard_chips
        self.first_row = first_row
        self.num_rows = 0
        self._salt = np.uint64(_text_hash(f"seed {seed}"))
        self._splits_of = splits_of
        self._looks = _Looks()
        self._pending: list[_Rows] = []
        self._buckets: list[list[_Rows]] = [[] for _ in range(_NUM_BUCKETS)]
        self._left_out: list[_Rows] = []

    @property
    def facts(self) -> dict[str, Any]:
        """What readers of the plan need to know beside the rows."""
        return {"block_cells": self.block_cells}

    def add(
        self,
        epsg: NDArray[np.integer[Any]],
        column: NDArray[np.integer[Any]],
        cell_row: NDArray[np.integer[Any]],
        look: NDArray[np.integer[Any]],
        overlap: NDArray[np.floating[Any]],
        *,
        looks: pa.Table,
        split: NDArray[np.uint8] | None = None,
    ) -> None:
        """Candidates of one area, one array element each, in any order.

        Args:
            epsg: Zones of their cells.
            column: Columns of their cells.
            cell_row: Rows of their cells in the grid.
            look: Rows of `looks`.
            overlap: Fractions of the cells that both footprints cover.
            looks: What was seen of these cells: columns of `LOOKS_SCHEMA` but `look`.
            split: Codes of their splits, where they are known already.
        """
        codes = _codes(epsg, column, cell_row)
        numbers = self._looks.number(looks)[np.asarray(look)]
        if split is None:
            split = self._split(codes)
        self._take(_Rows(codes, numbers, np.asarray(overlap, np.float32), split))
        self.num_rows += len(codes)

    def leave_out(
        self,
        epsg: NDArray[np.integer[Any]],
        column: NDArray[np.integer[Any]],
        cell_row: NDArray[np.integer[Any]],
        pair: NDArray[np.integer[Any]],
        *,
        pairs: Sequence[str],
    ) -> None:
        """Cells and pairs that get no row again, because an earlier version has them; `pair` counts in `pairs`."""
        codes = _codes(epsg, column, cell_row)
        numbers = self._looks.number_known(pairs)[np.asarray(pair)]
        size = len(codes)
        self._take(_Rows(codes, numbers, np.zeros(size, np.float32), np.zeros(size, np.uint8)))

    def looks(self) -> pa.Table:
        """One row per distinct look of all candidates, by its number: `LOOKS_SCHEMA`."""
        return self._looks.table()

    def parts(self) -> Iterator[pa.Table]:
        """The rows, ascending, in tables of some megabytes: `ROWS_SCHEMA`.

        Raises:
            ValueError: A cell was given twice with the same pair.
        """
        self._flush()
        self._left_out.clear()
        canonical, pairs = self._looks.numbers()
        next_row = self.first_row
        for bucket in self._buckets:
            rows = self._kept(self._sorted(_joined(bucket), pairs), pairs)
            if not len(rows.codes):
                continue
            starts = np.flatnonzero(self._new_unit(rows, pairs))
            sizes = np.diff(starts, append=len(rows.codes))
            first_rows, next_row = pack(sizes, capacity=self.shard_chips, next_row=next_row)
            numbers = np.arange(len(rows.codes)) + np.repeat(first_rows - starts, sizes)
            yield _table(rows, numbers, canonical[rows.looks], self.shard_chips)

    def left_out(self) -> Iterator[pa.Table]:
        """Candidates that were left out, as rejections; to be asked for after all `parts`."""
        names = self._looks.pair_names
        for rows in self._left_out:
            for start in range(0, len(rows.codes), _REJECTIONS_AT_ONCE):
                window = slice(start, start + _REJECTIONS_AT_ONCE)
                pairs = pa.array([names[number] for number in rows.looks[window].tolist()], pa.string())
                epsg, column, cell_row = _unpack(rows.codes[window])
                optical = [name.partition("+")[0] for name in pairs.to_pylist()]
                yield pa.table(
                    {
                        "cell": cell_ids(epsg, column, cell_row),
                        "optical": pa.array(optical, pa.string()),
                        "reason": pa.array([IN_EARLIER_VERSION] * len(pairs), pa.string()),
                        "detail": pairs,
                    }
                )

    def _take(self, rows: _Rows) -> None:
        self._pending.append(rows)
        if sum(len(pending.codes) for pending in self._pending) >= _FLUSH_ROWS:
            self._flush()

    def _flush(self) -> None:
        """Share the pending rows out into buckets."""
        rows = _joined(self._pending)
        self._pending = []
        bucket = (self._hash(rows) >> np.uint64(64 - _BUCKET_BITS)).astype(np.uint8)
        rows = rows.take(np.argsort(bucket, kind="stable"))
        ends = np.cumsum(np.bincount(bucket, minlength=_NUM_BUCKETS))
        for number, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
            if end > start:
                self._buckets[number].append(rows.slice(start, end))

    def _split(self, codes: NDArray[np.uint64]) -> NDArray[np.uint8]:
        """Splits are asked for once per cell."""
        cells = pa.array(codes).dictionary_encode()
        of_cells = np.asarray(self._splits_of(*_unpack(cells.dictionary.to_numpy())), np.uint8)
        splits: NDArray[np.uint8] = of_cells[cells.indices.to_numpy()]
        return splits

    def _hash(self, rows: _Rows) -> NDArray[np.uint64]:
        """Of the unit: of the block's cells and of the name of its pair, which do not depend on any order."""
        return mix(mix(self._block(rows) ^ self._salt) ^ self._looks.pair_hashes[rows.looks])

    def _block(self, rows: _Rows) -> NDArray[np.uint64]:
        epsg, column, cell_row = _unpack(rows.codes)
        return _pack(epsg, column // self.block_cells, cell_row // self.block_cells)

    def _place(self, rows: _Rows) -> NDArray[np.uint64]:
        """In the block, row by row from north to south."""
        _, column, cell_row = _unpack(rows.codes)
        side = self.block_cells
        return ((side - 1 - cell_row % side) * side + column % side).astype(np.uint64)

    def _sorted(self, rows: _Rows, pairs: NDArray[np.int64]) -> _Rows:
        """Units together, in the order of their hashes, their cells in the order of their places."""
        prefix, place = self._hash(rows) >> np.uint64(16), self._place(rows)
        order = np.argsort(prefix << np.uint64(16) | place)
        ordered = rows.take(order)
        prefix = prefix[order]
        if np.any(self._new_unit(ordered, pairs)[1:] & (prefix[1:] == prefix[:-1])):
            # Two units of one hash: rare, so it may be slow.
            prefix = self._hash(rows) >> np.uint64(16)
            ordered = rows.take(np.lexsort((place, pairs[rows.looks], self._block(rows), prefix)))
        return ordered

    def _new_unit(self, rows: _Rows, pairs: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Where a row is of another unit than the one before; True for the first."""
        block, pair = self._block(rows), pairs[rows.looks]
        new = np.ones(len(block), bool)
        new[1:] = (block[1:] != block[:-1]) | (pair[1:] != pair[:-1])
        return new

    def _kept(self, rows: _Rows, pairs: NDArray[np.int64]) -> _Rows:
        """Without what earlier versions have, which goes to the rejections."""
        pair = pairs[rows.looks]
        again = np.zeros(len(pair), bool)
        again[1:] = (rows.codes[1:] == rows.codes[:-1]) & (pair[1:] == pair[:-1])
        known = self._looks.known[rows.looks]
        if not np.any(again) and not np.any(known):
            return rows
        candidate = np.cumsum(~again) - 1
        num_new = np.bincount(candidate, weights=~known)
        if np.any(num_new > 1):
            first = int(np.flatnonzero(np.isin(candidate, np.flatnonzero(num_new > 1)))[0])
            epsg, column, cell_row = _unpack(rows.codes[first : first + 1])
            cell, pair_name = cell_ids(epsg, column, cell_row)[0], self._looks.pair_names[rows.looks[first]]
            raise ValueError(f"cell {cell} was given twice with pair {pair_name}")
        of_known = (np.bincount(candidate, weights=known) > 0)[candidate]
        self._left_out.append(rows.take(np.flatnonzero(of_known & ~known)))
        return rows.take(np.flatnonzero(~of_known))


IN_EARLIER_VERSION: Final = "in_earlier_version"
"""Why a candidate is not planned: an earlier version of the store has it."""


def pack(sizes: NDArray[np.int64], *, capacity: int, next_row: int) -> tuple[NDArray[np.int64], int]:
    """First rows of units that follow one another, each in the shard of the one before if it still fits.

    Args:
        sizes: Rows of each unit, at most `capacity`.
        capacity: Rows of a shard.
        next_row: Where the first unit would begin, were it to fit.

    Returns:
        The first rows, and the row after the last.
    """
    ends = np.cumsum(sizes)
    befores = ends - sizes
    used = next_row % capacity
    # The first unit that no longer fits into a shard that begins with unit i, for every i.
    followers = np.searchsorted(ends, befores + capacity, side="right").tolist()
    heads = [int(np.searchsorted(ends, capacity - used, side="right"))]
    while heads[-1] < len(sizes):
        heads.append(followers[heads[-1]])
    shard = np.searchsorted(heads, np.arange(len(sizes)), side="right")
    within = np.concatenate([[-used], befores[heads[:-1]]])[shard]
    first_rows = next_row - used + shard * capacity + befores - within
    return first_rows.astype(np.int64), int(first_rows[-1] + sizes[-1])


def mix(numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Scatter 64-bit numbers, distinct ones to distinct ones: the finaliser of SplitMix64 (Steele et al., 2014)."""
    mixed = numbers ^ (numbers >> np.uint64(30))
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed


def splits_by(rules: SplitRules, *, side_m: int) -> SplitsOf:
    """`splits_of` for cells of this side, by these rules."""
    return lambda epsg, column, cell_row: splits_of(epsg, column, cell_row, side_m=side_m, rules=rules)


def cell_ids(
    epsg: NDArray[np.integer[Any]], column: NDArray[np.integer[Any]], cell_row: NDArray[np.integer[Any]]
) -> pa.Array:
    """`Cell.id` of many cells."""
    cells = pa.array(_pack(epsg, column, cell_row)).dictionary_encode()
    places = zip(*(part.tolist() for part in _unpack(cells.dictionary.to_numpy())), strict=True)
    # The side is the store's and not part of the id.
    names = [Cell(epsg=e, column=c, row=r, side_m=60).id for e, c, r in places]
    return pa.array(names, pa.string()).take(cells.indices)


def block_ids(
    epsg: NDArray[np.integer[Any]],
    column: NDArray[np.integer[Any]],
    cell_row: NDArray[np.integer[Any]],
    *,
    block_cells: int,
) -> pa.Array:
    """Names of the blocks of many cells, as in ``32733_12_-3``."""
    blocks = pa.array(_pack(epsg, column // block_cells, cell_row // block_cells)).dictionary_encode()
    places = zip(*(part.tolist() for part in _unpack(blocks.dictionary.to_numpy())), strict=True)
    return pa.array([f"{e}_{c}_{r}" for e, c, r in places], pa.string()).take(blocks.indices)


class _Rows:
    """Candidates as arrays of one length."""

    __slots__ = ("codes", "looks", "overlaps", "splits")

    def __init__(
        self,
        codes: NDArray[np.uint64],
        looks: NDArray[np.int32],
        overlaps: NDArray[np.float32],
        splits: NDArray[np.uint8],
    ) -> None:
        assert len(codes) == len(looks) == len(overlaps) == len(splits), "arrays of several lengths"
        self.codes, self.looks, self.overlaps, self.splits = codes, looks, overlaps, splits

    def take(self, order: NDArray[np.intp]) -> _Rows:
        return _Rows(self.codes[order], self.looks[order], self.overlaps[order], self.splits[order])

    def slice(self, start: int, end: int) -> _Rows:
        window = slice(start, end)
        return _Rows(self.codes[window], self.looks[window], self.overlaps[window], self.splits[window])


class _Looks:
    """The looks of all areas, each once, numbered as they come; and in the end by what they are."""

    def __init__(self) -> None:
        self._numbers: dict[tuple[Any, ...], int] = {}
        self._tables: list[pa.Table] = []
        self.pair_names: list[str] = []
        self._hashes: list[int] = []
        self._known: list[bool] = []
        self._arrays: tuple[NDArray[np.uint64], NDArray[np.bool_]] = (np.empty(0, np.uint64), np.empty(0, bool))

    @property
    def pair_hashes(self) -> NDArray[np.uint64]:
        """Of the name of the pair of each look."""
        return self._up_to_date()[0]

    @property
    def known(self) -> NDArray[np.bool_]:
        """Whether it only names a pair of an earlier version."""
        return self._up_to_date()[1]

    def number(self, looks: pa.Table) -> NDArray[np.int32]:
        """Numbers of an area's looks; new ones are kept."""
        new, numbers = [], []
        keys = zip(*(looks[name].to_pylist() for name in _LOOK_KEY), strict=True)
        for place, (pair, optical, radar) in enumerate(keys):
            key = (pair, tuple(optical), tuple(radar))
            if key not in self._numbers:
                new.append(place)
            numbers.append(self._add(key, known=False))
        if new:
            self._tables.append(looks.take(new))
        return np.array(numbers, np.int32)

    def number_known(self, pairs: Sequence[str]) -> NDArray[np.int32]:
        """Numbers of pairs of earlier versions."""
        return np.array([self._add((pair, None), known=True) for pair in pairs], np.int32)

    def numbers(self) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Final number of each look, and of its pair; whatever the order they came in."""
        order = self._order()
        final = np.full(len(self._hashes), -1, np.int32)
        final[order] = np.arange(len(order), dtype=np.int32)
        names = sorted(set(self.pair_names))
        rank = dict(zip(names, range(len(names)), strict=True))
        return final, np.array([rank[name] for name in self.pair_names], np.int64)

    def table(self) -> pa.Table:
        """The looks in their final order, with their numbers."""
        if not self._tables:
            raise ValueError("no candidates were given")
        order = self._order()
        # Tables hold looks only, in the order they came; earlier versions' pairs are not in them.
        place = np.cumsum(~self.known) - 1
        table = pa.concat_tables(self._tables).take(place[order])
        return table.add_column(0, pa.field("look", pa.int32()), pa.array(range(len(order)), pa.int32()))

    def _up_to_date(self) -> tuple[NDArray[np.uint64], NDArray[np.bool_]]:
        if len(self._arrays[0]) < len(self._hashes):
            self._arrays = np.array(self._hashes, np.uint64), np.array(self._known, bool)
        return self._arrays

    def _order(self) -> NDArray[np.int64]:
        keys = sorted(key for key in self._numbers if key[1] is not None)
        return np.array([self._numbers[key] for key in keys], np.int64)

    def _add(self, key: tuple[Any, ...], *, known: bool) -> int:
        number = self._numbers.get(key)
        if number is None:
            number = self._numbers[key] = len(self._numbers)
            self.pair_names.append(key[0])
            self._hashes.append(_text_hash(key[0]))
            self._known.append(known)
        return number


_LOOK_KEY: Final = ("pair", "optical_items", "radar_items")


def _table(rows: _Rows, numbers: NDArray[np.int64], looks: NDArray[np.int32], shard_chips: int) -> pa.Table:
    epsg, column, cell_row = _unpack(rows.codes)
    return pa.table(
        {
            "row": numbers,
            "shard": (numbers // shard_chips).astype(np.int32),
            "epsg": epsg,
            "column": column,
            "cell_row": cell_row,
            "look": looks,
            "split": pa.DictionaryArray.from_arrays(rows.splits.astype(np.int8), pa.array(SPLITS)),
            "overlap": rows.overlaps,
        }
    )


def _joined(rows: Sequence[_Rows]) -> _Rows:
    if not rows:
        return _Rows(np.empty(0, np.uint64), np.empty(0, np.int32), np.empty(0, np.float32), np.empty(0, np.uint8))
    return _Rows(
        *(np.concatenate([getattr(part, name) for part in rows]) for name in ("codes", "looks", "overlaps", "splits"))
    )


def _codes(
    epsg: NDArray[np.integer[Any]], column: NDArray[np.integer[Any]], cell_row: NDArray[np.integer[Any]]
) -> NDArray[np.uint64]:
    """Cells as one number each.

    Raises:
        ValueError: A zone is none, or a cell lies too far from its zone's origin.
    """
    for values, low, high in (
        (np.asarray(epsg), _FIRST_EPSG + 1, _LAST_EPSG),
        (np.asarray(column), -_FIELD_OFFSET, _FIELD_OFFSET - 1),
        (np.asarray(cell_row), -_FIELD_OFFSET, _FIELD_OFFSET - 1),
    ):
        if values.size and (values.min() < low or values.max() > high):
            raise ValueError(f"no cell of a UTM zone: {values.min()} to {values.max()} is not within {low} to {high}")
    return _pack(epsg, column, cell_row)


def _pack(
    epsg: NDArray[np.integer[Any]], column: NDArray[np.integer[Any]], cell_row: NDArray[np.integer[Any]]
) -> NDArray[np.uint64]:
    """Cells, or blocks, as one number each."""
    codes = (np.asarray(epsg) - _FIRST_EPSG).astype(np.uint64) << np.uint64(2 * _FIELD_BITS)
    codes |= (np.asarray(column) + _FIELD_OFFSET).astype(np.uint64) << np.uint64(_FIELD_BITS)
    codes |= (np.asarray(cell_row) + _FIELD_OFFSET).astype(np.uint64)
    return codes


def _unpack(codes: NDArray[np.uint64]) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
    """epsg, column, row."""
    mask, step = np.uint64(_FIELD_MASK), np.uint64(_FIELD_BITS)
    epsg = (codes >> np.uint64(2 * _FIELD_BITS)).astype(np.int32) + np.int32(_FIRST_EPSG)
    column = ((codes >> step) & mask).astype(np.int32) - np.int32(_FIELD_OFFSET)
    return epsg, column, (codes & mask).astype(np.int32) - np.int32(_FIELD_OFFSET)


def _text_hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])
