"""The feed: the store's pixels arrive in Ray Data as planned, each sample once per epoch."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray
from numpy.testing import assert_array_equal

from pipeline.chip_table import chip_table
from pipeline.crops import Batch, cut_batches
from pipeline.epochs import crop_windows
from pipeline.fed_chips import MODEL_COLUMNS, FedChips, Feed, keep_rows
from pipeline.feed import ChipSource, training_samples
from pipeline.layout import Layout
from pipeline.store import Store, StoreError
from pipeline.versions import Version, begin
from pipeline.whole_chips import read_chips
from tests.sample_chips import make_chip

# Ray warns of its own settings whenever it copies them.
pytestmark = pytest.mark.filterwarnings("ignore:.* is deprecated:Warning:ray.data.context")

LAYOUT = Layout(side_px=36, shard_chips=16, labels={"worldcover": {10: "trees"}})
NUM_ROWS = 75
CROP_PX = 24


def status_of(row: int) -> str:
    return {3: "failed", 7: "rejected"}.get(row % 11, "written")


def split_of(row: int) -> str:
    return "val" if row % 5 == 0 else "train"


TRAIN_ROWS = [row for row in range(NUM_ROWS) if status_of(row) == "written" and split_of(row) == "train"]


def write_version(url: str, number: int, rows: range, layout: Layout = LAYOUT) -> Version:
    """A sealed version of random chips with holes."""
    store = Store.create(url, layout)
    version = begin(url, {"number": number}, number=number)
    texts = {name: [f"{name}{row}" for row in rows] for name in ("cell", "pair", "unit")}
    columns = {"row": list(rows), "shard": [row // layout.shard_chips for row in rows], **texts}
    version.write_plan(pa.table({}), pa.table({}), [pa.table({**columns, "split": [split_of(row) for row in rows]})])
    store.resize(rows.stop)
    for shard in version.shards():
        members = [row for row in rows if row in store.rows_of(shard)]
        hashes = store.write_shard(
            shard, [(row, make_chip(row, layout)) for row in members if status_of(row) == "written"]
        )
        proof = {"rejected": {"reason": "cloudy"}, "failed": {"error": "timed out"}}
        version.write_part(
            shard,
            chip_table(
                {
                    **{name: f"{name}{row}" for name in texts},
                    "row": row,
                    "split": split_of(row),
                    "status": status_of(row),
                    **proof.get(status_of(row), {"sha256": hashes.get(row)}),
                }
                for row in members
            ),
        )
    version.seal()
    return version


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    url = str(tmp_path_factory.mktemp("feed") / "store")
    write_version(url, 1, range(NUM_ROWS))
    return url


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A small local Ray, as a job would find it."""
    ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=200 * 2**20, log_to_driver=False)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    yield
    ray.shutdown()


def feed_of(url: str, **changes: Any) -> Feed:
    return Feed(
        **{"url": url, "version": 1, "crop_px": CROP_PX, "crops_per_chip": 3, "global_batch": 8, "window_chips": 24}
        | changes
    )


Sample = tuple[int, int, int, int]
"""position, epoch, row, k"""


def samples_of(batch: Batch) -> list[Sample]:
    return list(zip(*(batch[name].tolist() for name in ("position", "epoch", "row", "k")), strict=True))


def planned(source: FedChips, epoch: int) -> list[list[Sample]]:
    """Samples by batch, of all ranks, as the pure functions have them."""
    samples = sorted(
        (position, piece.window.epoch, row, k)
        for span in source.plan(epoch)
        for piece in span.pieces
        for position, (row, k) in zip(
            piece.positions(source.feed.order).tolist(), piece.samples(source.feed.order).tolist(), strict=True
        )
    )
    size = source.feed.batch_size
    return [samples[start : start + size] for start in range(0, len(samples), size)]


def cut_epoch(source: FedChips, epoch: int) -> list[Batch]:
    """The batches of an epoch, cut where no Ray is."""
    store = source.feed.open()
    return [batch for span in source.plan(epoch) for batch in cut_batches(store, span, feed=source.feed)]


def assert_pixels_are_the_stores(batch: Batch, store: Store, feed: Feed) -> None:
    """Compare every sample with zarr-python's reading of its window."""
    for index, (_, epoch, row, k) in enumerate(samples_of(batch)):
        side_px = store.layout.side_px
        sample = np.array([(row, k)])
        (corner,) = crop_windows(sample, seed=feed.seed, epoch=epoch, side_px=side_px, crop_px=feed.crop_px)
        y_px, x_px = corner.tolist()
        window = store.read_window(row, y_px, x_px, feed.crop_px)
        for name in batch.keys() - MODEL_COLUMNS.keys():
            assert batch[name].dtype == window[name].dtype
            assert_array_equal(batch[name][index], window[name])


@pytest.mark.parametrize("codec", ["lz4", "none"])
def test_crops_are_those_zarr_reads(tmp_path: Path, codec: str) -> None:
    layout = Layout(side_px=36, shard_chips=16, codec=codec)
    write_version(str(tmp_path / "store"), 1, range(NUM_ROWS), layout)
    feed = feed_of(str(tmp_path / "store"), global_batch=40)
    store, source = Store.open(feed.url), FedChips(feed)
    first = cut_epoch(source, 0)
    # The 24 of 144 samples that are no whole batch begin the next epoch.
    spanning, *_ = second = cut_epoch(source, 1)
    assert spanning["epoch"].tolist() == [0] * 24 + [1] * 16
    for batch in (*first, spanning):
        assert_pixels_are_the_stores(batch, store, feed)
    for epoch, batches in enumerate((first, second)):
        assert [samples_of(batch) for batch in batches] == planned(source, epoch)


def test_only_written_chips_of_the_split_are_fed(url: str) -> None:
    assert FedChips(feed_of(url)).rows.tolist() == TRAIN_ROWS
    assert FedChips(feed_of(url)).course.epoch_samples == 3 * len(TRAIN_ROWS)
    with pytest.raises(StoreError, match="version 1 holds no chips of split test"):
        _ = FedChips(feed_of(url, split="test")).course


def test_arrays_a_store_lacks_are_left_out(tmp_path: Path) -> None:
    write_version(str(tmp_path / "store"), 1, range(20), Layout(side_px=36, shard_chips=16, has_optical=False))
    feed = feed_of(str(tmp_path / "store"))
    batch = cut_epoch(FedChips(feed), 0)[0]
    assert batch.keys() == {"radar", "row", "k", "epoch", "position"}
    assert batch["radar"].shape == (8, 2, CROP_PX, CROP_PX)


def test_a_later_version_feeds_the_earlier_ones_chips_too(tmp_path: Path) -> None:
    where = str(tmp_path / "store")
    write_version(where, 1, range(20))
    write_version(where, 2, range(32, 40))
    assert FedChips(feed_of(where, version=1)).rows.max() < 20
    both = FedChips(feed_of(where, version=2)).rows
    assert set(both.tolist()) == {row for row in TRAIN_ROWS if row < 20 or 32 <= row < 40}


def test_a_crop_larger_than_the_chip_is_refused_before_anything_is_read(url: str) -> None:
    with pytest.raises(ValueError, match="leaves a chip of 36 px"):
        FedChips(feed_of(url, crop_px=48))


def test_a_source_travels_without_its_rows(url: str) -> None:
    source = FedChips(feed_of(url))
    rows = source.rows.tolist()
    assert "rows" not in source.__getstate__()
    assert pickle.loads(pickle.dumps(source)).rows.tolist() == rows


def test_every_execution_is_the_next_epoch_in_whole_batches_from_where_the_run_stands(url: str, cluster: None) -> None:
    feed = feed_of(url, global_batch=40)
    source = FedChips(feed)
    # Two of three batches of the sixth epoch were seen.
    seen = source.course.seen_after(5) + 80
    dataset = training_samples(feed, seen=seen)
    got = []
    for epoch in (5, 6, 7):
        batches: list[Batch] = list(dataset.iter_batches(batch_size=40, batch_format="numpy"))
        got += [samples_of(batch) for batch in batches]
        assert got[-len(batches) :] == planned(source, epoch)[-len(batches) :]
        assert {len(batch["row"]) for batch in batches} == {40}
    assert_pixels_are_the_stores(batches[0], Store.open(url), feed)
    assert [sample[0] for batch in got for sample in batch] == list(range(seen, source.course.seen_after(8)))
    assert len({sample[1:] for batch in got for sample in batch}) == 40 * len(got)
    example = batches[0]
    assert {name: (array.shape, array.dtype.name) for name, array in example.items()} == {
        "b10": ((40, 4, 24, 24), "uint16"),
        "b20": ((40, 6, 12, 12), "uint16"),
        "b60": ((40, 2, 4, 4), "uint16"),
        "radar": ((40, 2, 24, 24), "int16"),
        "row": ((40,), "int64"),
        "k": ((40,), "int32"),
        "epoch": ((40,), "int32"),
        "position": ((40,), "int64"),
    }


@pytest.mark.parametrize(("ranks", "lanes"), [(2, 1), (2, 4), (3, 3), (4, 2)])
def test_ranks_are_dealt_their_parts_of_every_global_batch_in_order(
    url: str, cluster: None, ranks: int, lanes: int
) -> None:
    feed = feed_of(url, global_batch=12, ranks=ranks, lanes=lanes)
    source = FedChips(feed)

    def consume(part: ray.data.DataIterator) -> list[list[list[Sample]]]:
        batches = (part.iter_batches(batch_size=feed.batch_size, batch_format="numpy") for _ in range(2))
        return [[samples_of(batch) for batch in epoch] for epoch in batches]

    with ThreadPoolExecutor(ranks) as pool:
        parts = list(pool.map(consume, training_samples(feed, seen=24).streaming_split(ranks, equal=True)))
    for epoch in (0, 1):
        # Two global batches of the first epoch were seen.
        expected = planned(source, epoch)[0 if epoch else 2 * ranks :]
        for rank in range(ranks):
            assert parts[rank][epoch] == expected[rank::ranks]


def test_ranks_can_have_datasets_of_their_own(url: str, cluster: None) -> None:
    feed = feed_of(url, global_batch=12, ranks=4, lanes=4)
    expected = planned(FedChips(feed), 0)
    for members in ([0, 1], [2], [3]):
        dataset = training_samples(feed, members=members)
        batches = dataset.iter_batches(batch_size=feed.batch_size, batch_format="numpy")
        got = [samples_of(batch) for batch in batches]
        if len(members) == 1:
            assert got == expected[members[0] :: 4]
        else:
            # Blocks of several batches, in turn.
            assert sorted(got) == sorted(batch for rank in members for batch in expected[rank::4])


def test_rows_that_a_run_keeps_are_not_looked_for_again(url: str, tmp_path: Path) -> None:
    feed = feed_of(url)
    kept = keep_rows(feed, str(tmp_path))
    # What is there stays: a run goes on with what it began with.
    assert keep_rows(replace(feed, split="val"), str(tmp_path)).rows_in == kept.rows_in
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.fed_chips.choose_all", lambda *args, **how: pytest.fail("looked for"))
        assert FedChips(kept).rows.tolist() == TRAIN_ROWS
    assert kept.order == feed.order


def test_as_many_tasks_are_said_as_there_are(url: str) -> None:
    for ranks, lanes, members in ((1, 1, None), (2, 4, None), (4, 4, [1, 2]), (4, 2, None)):
        source = ChipSource(feed_of(url, global_batch=12, ranks=ranks, lanes=lanes), seen=24, members=members)
        tasks = source.get_read_tasks(1)
        assert source.num_tasks() == len(tasks) > 0
        # Ray asks more than once.
        assert all(one is other for one, other in zip(tasks, source.get_read_tasks(1), strict=True))
        samples = sum(task.metadata.num_rows for task in tasks)
        assert samples == (source.chips.course.epoch_samples - 24) // 12 * 12 * len(source.members) // ranks


def test_whole_chips_come_once_each_in_the_order_of_rows(url: str, cluster: None) -> None:
    store = Store.open(url)
    dataset = read_chips(url, arrays=("b10", "radar", "label_worldcover", "no such array"), batch_size=4)
    batches: list[Batch] = list(dataset.iter_batches(batch_size=None, batch_format="numpy"))
    rows = np.concatenate([batch["row"] for batch in batches]).tolist()
    assert rows == [row for row in range(NUM_ROWS) if status_of(row) == "written"]
    assert {len(batch["row"]) for batch in batches[:-1]} == {4}
    for batch in batches:
        assert batch.keys() == {"b10", "radar", "label_worldcover", "row"}
        for index, row in enumerate(batch["row"].tolist()):
            chip = store.read_chip(row)
            for name in batch.keys() - {"row"}:
                assert_array_equal(batch[name][index], chip[name])


def test_a_model_can_be_mapped_over_the_chips_of_a_split(url: str, cluster: None) -> None:
    def brightness(batch: Batch) -> Batch:
        return {"row": batch["row"], "mean": batch["b10"].mean(axis=(1, 2, 3))}

    table = read_chips(url, split="val").map_batches(brightness, batch_size=None).to_pandas()
    expected = [row for row in range(NUM_ROWS) if status_of(row) == "written" and split_of(row) == "val"]
    assert sorted(table["row"]) == expected
    store = Store.open(url)
    for row, mean in zip(table["row"], table["mean"], strict=True):
        assert mean == store.read_chip(row)["b10"].mean()
