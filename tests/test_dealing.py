"""Which ranks share a process that deals out to them, and that no CPU is left without work for it."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest
import ray
from hypothesis import given
from hypothesis import strategies as st

from jobs.support import dealing
from jobs.support.dealing import TRAINING, Dealing, dealt_together, nothing_yet
from pipeline.fed_chips import FedChips
from tests.test_feed import NUM_ROWS, Sample, feed_of, planned, samples_of, write_version

# Ray warns of its own settings whenever it copies them.
pytestmark = pytest.mark.filterwarnings("ignore:.* is deprecated:Warning:ray.data.context")


@pytest.fixture
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=4, include_dashboard=False, object_store_memory=200 * 2**20, log_to_driver=False)
    yield
    ray.shutdown()


@given(num_ranks=st.integers(1, 100), spare=st.lists(st.integers(0, 64), min_size=1, max_size=20))
def test_every_rank_is_in_one_group_and_most_cpus_are_used(num_ranks: int, spare: list[int]) -> None:
    groups = dealt_together(num_ranks, spare)
    assert list(chain(*groups)) == list(range(num_ranks))
    assert max(map(len, groups)) - min(map(len, groups)) <= 1
    number = len(groups)
    # What Ray gives to each of them.
    assert number == 1 or number * sum(cpus // number for cpus in spare) >= 0.8 * sum(spare)


@pytest.mark.parametrize(
    ("num_ranks", "spare", "expected"),
    [
        (8, [4], 1),
        # A group per node of eight GPUs, if each has CPUs for all groups.
        (64, [24] * 8, 8),
        (64, [24] * 8 + [64] * 4, 8),
        # Seven CPUs of each node are of use to seven groups, not to eight.
        (64, [7] * 64, 7),
        (64, [2] * 64, 2),
        (16, [1, 1], 1),
        (64, [0] * 8, 8),
    ],
)
def test_as_many_groups_as_nodes_have_cpus_for(num_ranks: int, spare: list[int], expected: int) -> None:
    assert len(dealt_together(num_ranks, spare)) == expected


@pytest.mark.slow
@pytest.mark.parametrize("ranks_each", [1, 2, 8])
def test_every_rank_gets_its_part_of_every_batch_from_whichever_process_deals_it_out(
    tmp_path: Path, cluster: None, monkeypatch: pytest.MonkeyPatch, ranks_each: int
) -> None:
    monkeypatch.setattr(dealing, "RANKS_EACH", ranks_each)
    write_version(str(tmp_path / "store"), 1, range(NUM_ROWS))
    feed = feed_of(str(tmp_path / "store"), global_batch=12, lanes=4)
    dealt = Dealing(feed, lambda: 24, cpus_per_worker=0.0).configure({TRAINING: nothing_yet()}, 4)
    assert len(dealt) == 4

    def consume(part: ray.data.DataIterator) -> list[list[list[Sample]]]:
        epochs = (part.iter_batches(batch_size=3, batch_format="numpy", prefetch_batches=5) for _ in range(2))
        return [[samples_of(batch) for batch in epoch] for epoch in epochs]

    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(consume, [own[TRAINING] for own in dealt]))
    for epoch in (0, 1):
        # Two global batches were seen.
        expected = planned(FedChips(replace(feed, ranks=4)), epoch)[0 if epoch else 2 * 4 :]
        for rank in range(4):
            assert got[rank][epoch] == expected[rank::4]
