"""The feed within a rank's own process: the batches that Ray Data would have dealt out, in bounded memory."""

from __future__ import annotations

import threading
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.testing import assert_equal
from numpy.typing import NDArray

from pipeline.crops import Batch, cut_batches
from pipeline.fed_chips import FedChips, Feed
from pipeline.layout import Layout
from pipeline.local_feed import chips_of, rank_batches, visits
from pipeline.mixture import Part
from pipeline.objects import Objects
from pipeline.positions import rank_spans
from pipeline.sources import Source
from pipeline.store import Store
from tests.test_feed import LAYOUT, NUM_ROWS, TRAIN_ROWS, feed_of, write_version


@pytest.fixture(scope="module")
def urls(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("stores")
    for codec in ("lz4", "none"):
        write_version(str(folder / codec), 1, range(NUM_ROWS), Layout(side_px=36, shard_chips=16, codec=codec))
    return {codec: str(folder / codec) for codec in ("lz4", "none")}


def dealt(feed: Feed, seen: int, epochs: int) -> list[list[Batch]]:
    """By rank: the batches that its read tasks make."""
    source, store = FedChips(feed, seen=seen), feed.open()
    by_rank: list[list[Batch]] = [[] for _ in range(feed.ranks)]
    for epoch in range(source.course.epoch_of(seen), epochs):
        for span in source.plan(epoch):
            for parts in rank_spans(span, feed.order, ranks=feed.ranks):
                for rank, part in enumerate(parts):
                    by_rank[rank] += cut_batches(store, part, feed=feed, rank=rank)
    return by_rank


def copied(batches: Any) -> list[Batch]:
    return [{name: array.copy() for name, array in batch.items()} for batch in batches]


@given(
    codec=st.sampled_from(["lz4", "none"]),
    ranks=st.sampled_from([1, 2, 3, 4]),
    crops_per_chip=st.integers(1, 4),
    lanes=st.sampled_from([1, 2, 3, 4, 6]),
    window_chips=st.integers(1, 60),
    crop_px=st.sampled_from([6, 24, 36]),
    steps_seen=st.integers(0, 8),
    threads=st.integers(1, 4),
    ahead=st.integers(1, 5),
    fetched=st.booleans(),
)
@example("none", 3, 1, 1, 24, 24, 3, 2, 1, False)
@example("lz4", 4, 3, 4, 24, 24, 5, 4, 4, False)
@example("lz4", 2, 1, 4, 20, 24, 5, 4, 1, True)
@settings(max_examples=40)
def test_a_rank_gets_what_ray_data_would_have_dealt_it(
    urls: dict[str, str],
    codec: str,
    ranks: int,
    crops_per_chip: int,
    lanes: int,
    window_chips: int,
    crop_px: int,
    steps_seen: int,
    threads: int,
    ahead: int,
    fetched: bool,
) -> None:
    feed = feed_of(
        urls[codec],
        ranks=ranks,
        global_batch=12,
        crops_per_chip=crops_per_chip,
        lanes=lanes,
        window_chips=window_chips,
        crop_px=crop_px,
    )
    seen, epochs = 12 * steps_seen, 3
    expected = dealt(feed, seen, epochs)
    for rank in range(ranks):
        made: list[int] = []

        def allocate(shape: tuple[int, ...], dtype: np.dtype[Any], made: list[int] = made) -> NDArray[Any]:
            made.append(shape[0])
            # What is not overwritten would be seen.
            return np.full(shape, 77, dtype)

        with pytest.MonkeyPatch.context() as patch:
            if fetched:
                # Then whole objects and ranges are fetched ahead, as from an object store.
                patch.setattr(Objects, "file", lambda objects, path: None)
            got = copied(
                rank_batches(feed, rank=rank, seen=seen, epochs=epochs, threads=threads, ahead=ahead, allocate=allocate)
            )
        assert_equal(got, expected[rank])
        arrays_of_a_batch = len(got[0])
        held = ahead + 1
        if fetched or crops_per_chip > 1:
            # Spans have fewer than twice these, and one is begun while another is not taken to its end.
            held += 3 * feed.order.window_batches
        assert len(made) <= arrays_of_a_batch * held, "more batches were held than were said"
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("feed-")]


def test_several_stores_are_fed_as_one(urls: dict[str, str]) -> None:
    chips = len(TRAIN_ROWS)
    # Of the first all chips and some again, of the second not all.
    parts = (Part(num_chips=chips, taken=chips + 7), Part(num_chips=chips, taken=chips - 7))
    other = Source(url=urls["none"], version=1)
    feed = feed_of(urls["lz4"], others=(other,), parts=parts, ranks=2, global_batch=12, window_chips=30)
    expected = dealt(feed, 24, 2)
    for rank in range(2):
        assert_equal(copied(rank_batches(feed, rank=rank, seen=24, epochs=2)), expected[rank])


def test_a_batch_stays_as_it_is_until_the_next_is_asked_for(urls: dict[str, str]) -> None:
    batches = rank_batches(feed_of(urls["lz4"]), rank=0, epochs=2, ahead=1)
    first = next(batches)
    kept = {name: array.copy() for name, array in first.items()}
    # As long as the threads can go.
    threading.Event().wait(0.2)
    assert_equal(first, kept)
    batches.close()  # type: ignore[attr-defined]


def test_threads_end_where_no_more_is_wanted_and_errors_reach_who_takes(tmp_path: Path) -> None:
    write_version(str(tmp_path / "store"), 1, range(NUM_ROWS))
    feed = feed_of(str(tmp_path / "store"))
    batches = rank_batches(feed, rank=0, epochs=1)
    assert len(copied(islice(batches, 2))) == 2
    batches.close()  # type: ignore[attr-defined]
    lost = tmp_path / "store" / Store.open(feed.url).shard_key("radar", 2)
    data = lost.read_bytes()
    lost.unlink()
    with pytest.raises(ValueError, match=r"radar/c/2/0/0/0 is missing, but the chip table has chips in it"):
        copied(rank_batches(feed, rank=0, epochs=1))
    lost.write_bytes(data[100:])
    with pytest.raises((ValueError, RuntimeError)):
        copied(rank_batches(feed, rank=0, epochs=1))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("feed-")]


def test_a_shard_that_two_windows_share_is_fetched_once_for_both(urls: dict[str, str]) -> None:
    feed = feed_of(urls["lz4"], crops_per_chip=1, global_batch=12, window_chips=12)
    source, store = FedChips(feed), Store.open(feed.url)
    spans = [chips_of(span, feed=feed, layout=LAYOUT, rank=0, scattered=True) for span in source.plan(0)]
    assert len(spans) > 2
    planned = list(visits(spans, store))
    asked = [chip for _, chips in planned for chip in chips]
    assert sorted(chip.row for chip in asked) == sorted(chip.row for chips in spans for chip in chips)
    # Spans keep their order, as room is made for one after the other.
    assert [chip.opens for chip in asked] == sorted(chip.opens for chip in asked)
    shards = [shard for shard, _ in planned]
    assert len(shards) == len(set(shards))
