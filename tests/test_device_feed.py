"""Batches on their way to a worker's device."""

from __future__ import annotations

from itertools import zip_longest
from pathlib import Path

import pytest
import torch

from jobs.support.device_feed import device_batches
from pipeline.layout import Layout
from pipeline.local_feed import rank_batches
from tests.test_feed import NUM_ROWS, feed_of, write_version

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


@pytest.mark.parametrize("crops_per_chip", [1, 3])
@pytest.mark.parametrize("kind", DEVICES)
def test_batches_on_the_device_are_those_of_the_feed(tmp_path: Path, kind: str, crops_per_chip: int) -> None:
    write_version(str(tmp_path / "store"), 1, range(NUM_ROWS), Layout(side_px=36, shard_chips=16))
    feed = feed_of(str(tmp_path / "store"), crop_px=24, crops_per_chip=crops_per_chip)
    expected = rank_batches(feed, rank=0, epochs=3)
    device = torch.device(kind)
    moved = device_batches(feed, rank=0, seen=0, epochs=3, threads=3, device=device)
    for wanted, (batch, waited_s) in zip_longest(expected, moved):
        if kind == "cuda":
            # The step of a batch is still busy when the next one is copied.
            torch.cuda._sleep(20_000_000)
        assert waited_s >= 0
        assert {name: each.device.type for name, each in batch.items()} == dict.fromkeys(wanted, kind)
        for name, array in wanted.items():
            assert torch.equal(batch[name].clone().cpu(), torch.from_numpy(array)), name
