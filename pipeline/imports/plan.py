"""From samples to the plan of a version, and back: the manifest has the columns of any other, as far as they apply.

Chips that were cut by others lie off the grid: `cell` is null, and `crs` and `transform` say where they are.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import pyarrow as pa

from pipeline.grid import cell_at
from pipeline.imports.samples import NotTaken, Sample
from pipeline.manifest import MANIFEST_SCHEMA, REJECTIONS_SCHEMA
from pipeline.splits import SplitRules, split_of

LABEL_PREFIX: Final = "label_"

SPLIT_SIDE_M: Final = 2640
"""Side of the cells by which chips without an official split are shared out: that of a region's chips, so that both
share the same ground alike."""

_PART_ROWS: Final = 1 << 16
_OWN: Final = [
    ("crs", pa.string()),
    ("transform", pa.list_(pa.float64())),
    ("files", pa.map_(pa.string(), pa.string())),
    ("index", pa.list_(pa.int32())),
]


def manifest_parts(
    samples: Sequence[Sample], *, first_row: int, shard_chips: int, rules: SplitRules
) -> Iterator[pa.Table]:
    """Give every sample its row, whole units together, in an order that mixes places in a shard.

    Args:
        samples: What to import.
        first_row: First free row of the store, at the start of a shard.
        shard_chips: Rows of a shard; a unit never straddles two shards.
        rules: How samples are shared out whose dataset does not say it.

    Raises:
        ValueError: Two samples have one name, or a unit is larger than a shard.
    """
    units: dict[str, list[int]] = defaultdict(list)
    for number, sample in enumerate(samples):
        units[sample.unit or sample.name].append(number)
    if len({sample.name for sample in samples}) < len(samples):
        raise ValueError(f"{len(samples)} samples have fewer names: two folders of one dataset may lie in each other")
    schema = _schema(samples)
    rows: list[dict[str, Any]] = []
    row = first_row
    for unit in sorted(units, key=lambda name: hashlib.sha256(f"{rules.seed}/{name}".encode()).digest()):
        members = units[unit]
        if len(members) > shard_chips:
            raise ValueError(f"shard_chips={shard_chips}: {len(members)} chips of {unit} are read together")
        if row % shard_chips + len(members) > shard_chips:
            row = (row // shard_chips + 1) * shard_chips
        for number in members:
            rows.append(_row(samples[number], row=row, unit=unit, shard_chips=shard_chips, rules=rules))
            row += 1
        if len(rows) >= _PART_ROWS:
            yield pa.Table.from_pylist(rows, schema=schema)
            rows = []
    if rows:
        yield pa.Table.from_pylist(rows, schema=schema)


def rejections_table(not_taken: Sequence[NotTaken]) -> pa.Table:
    """What is in the folder but not in the manifest."""
    rows = [{"cell": "", "optical": each.name, "reason": each.reason, "detail": each.detail} for each in not_taken]
    return pa.Table.from_pylist(rows, schema=REJECTIONS_SCHEMA)


def sample_from_row(row: Mapping[str, Any]) -> Sample:
    """What reading needs of a row of the manifest."""
    return Sample(
        name=row["pair"],
        files=dict(row["files"]),
        unit=row["unit"],
        index=tuple(row["index"]),
        optical_id=row["optical_items"][0] if row["optical_items"] else "",
        radar_id=row["radar_items"][0] if row["radar_items"] else "",
        offset_dn=row["offset_dn"],
    )


def split_of_sample(sample: Sample, rules: SplitRules) -> str:
    """The dataset's own, else by the block of ground that it lies in; train where that cannot be known."""
    if sample.split is not None:
        return sample.split
    if sample.lonlat is None:
        # Its header cannot be read: it will be no chip.
        return "train"
    return str(split_of(cell_at(*sample.lonlat, side_m=SPLIT_SIDE_M), rules))


def _schema(samples: Sequence[Sample]) -> pa.Schema:
    labels = [(LABEL_PREFIX + name, _label_type(samples, name)) for name in (samples[0].labels if samples else ())]
    return pa.schema([*MANIFEST_SCHEMA, *(pa.field(*each) for each in [*_OWN, *labels])])


def _label_type(samples: Sequence[Sample], name: str) -> pa.DataType:
    several = any(isinstance(sample.labels[name], list) for sample in samples)
    return pa.list_(pa.int64()) if several else pa.int64()


def _row(sample: Sample, *, row: int, unit: str, shard_chips: int, rules: SplitRules) -> dict[str, Any]:
    return {
        "row": row,
        "shard": row // shard_chips,
        "unit": unit,
        "pair": sample.name,
        "optical_items": [sample.optical_id] if sample.optical_id else [],
        "radar_items": [sample.radar_id] if sample.radar_id else [],
        "optical_datetime": sample.optical_datetime,
        "radar_datetime": sample.radar_datetime,
        "dt_s": sample.dt_s,
        "orbit_state": sample.orbit_state,
        "relative_orbit": sample.relative_orbit,
        "baseline": sample.baseline,
        "offset_dn": sample.offset_dn,
        "split": split_of_sample(sample, rules),
        "crs": sample.crs,
        "transform": sample.transform,
        "files": sorted(sample.files.items()),
        "index": list(sample.index),
        **{LABEL_PREFIX + name: label for name, label in sample.labels.items()},
    }
