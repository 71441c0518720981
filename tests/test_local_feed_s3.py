"""The feed within a process from a real S3 server behind a slow line: several objects on their way, each once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.fed_chips import Feed
from pipeline.grid import Cell
from pipeline.layout import Layout
from pipeline.local_feed import rank_batches
from tests.sample_chips import make_chip
from tests.seaweed import BUCKET, seaweed
from tests.slow_proxy import SlowProxy
from tests.small_stores import Candidate, write_store

LAYOUT = Layout(side_px=120, shard_chips=16, codec="none", has_classes=False)
"""Of 16 chips b10 has 1.8 MB, b20 0.7 MB, radar 0.9 MB."""


def test_several_large_objects_are_on_their_way_and_each_only_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = [Cell(epsg=32633, column=100 + row, row=2000, side_m=1200) for row in range(160)]
    url = f"s3://{BUCKET}/chips.zarr"
    with seaweed(tmp_path / "server") as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        write_store(
            url, LAYOUT, [Candidate(cell=cell) for cell in cells], lambda row: make_chip(row, LAYOUT), request={}
        )
        # Windows of two and a half shards: every second one shares a shard with the next.
        feed = Feed(url=url, version=1, crop_px=60, global_batch=8, window_chips=40, crops_per_chip=2)
        with SlowProxy(server.ports[0], latency_s=0.04, bytes_per_s=40e6) as line:
            monkeypatch.setenv("AWS_ENDPOINT", f"http://127.0.0.1:{line.port}")
            rows: list[int] = []
            for batch in rank_batches(feed, rank=0, epochs=1, threads=2):
                rows += batch["row"].tolist()
                sample = {name: array[0].copy() for name, array in batch.items()}
            passed = line.asked()
    assert np.bincount(rows).tolist() == [2] * 160
    chip = make_chip(int(sample["row"]), LAYOUT)
    windows = [
        LAYOUT.arrays()["b10"].window(chip["b10"], y_px, x_px, 60)
        for y_px in range(0, 61, 6)
        for x_px in range(0, 61, 6)
    ]
    assert any(np.array_equal(sample["b10"], window) for window in windows)
    # Three shards are fetched at a time, and of each three objects are large: nine, if none is late.
    assert passed.most_at_once >= 6
    objects = sum(16 * spec.dtype.itemsize * int(np.prod(spec.shape)) for spec in LAYOUT.arrays().values()) * 10
    assert objects < passed.body_bytes < 1.05 * objects
