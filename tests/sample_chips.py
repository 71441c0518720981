"""Small chips for tests of the store and of what stands on it."""

from __future__ import annotations

import numpy as np

from pipeline.layout import Layout
from pipeline.types import ChipArrays

LAYOUT = Layout(side_px=24, shard_chips=4, labels={"worldcover": {10: "trees", 80: "water"}})


def make_chip(row: int, layout: Layout = LAYOUT) -> ChipArrays:
    """Pixels that differ between rows, arrays and places; the same for the same row."""
    rng = np.random.default_rng(row)
    return {
        name: rng.integers(0, min(3000, np.iinfo(spec.dtype).max), spec.shape).astype(spec.dtype)
        for name, spec in layout.arrays().items()
    }
