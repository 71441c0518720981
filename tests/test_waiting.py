"""Waiting for the feed: said from 5 % on, with the cause that its pattern points to."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from jobs.support.fed_ranks import fed_in_total, fed_ranks, said_waiting
from jobs.support.step_losses import write_losses
from jobs.support.waiting import probable_cause, waited_share
from pipeline.objects import Objects

RANKS = [
    {"samples_per_s": 2.0, "bytes_per_s": 25e6, "waited_share": 0.1},
    {"samples_per_s": 2.0, "bytes_per_s": 100e6, "waited_share": 0.2},
]


def steps(waits_s: list[float], *, per_epoch: int = 20) -> list[dict[str, float]]:
    return [{"epoch": n // per_epoch, "waited_s": wait, "step_s": 1.0} for n, wait in enumerate(waits_s)]


@pytest.mark.parametrize(
    ("waits_s", "cause"),
    [
        ([0.04] * 40, None),
        ([0.2] * 40, "evenly over the batches"),
        (([5.0] + [0.01] * 19) * 2, "first batch of an epoch"),
        (([0.0] * 18 + [4.0, 0.0]) * 2, "in bursts"),
        ([3.0], "first batch of an epoch"),
    ],
)
def test_the_pattern_of_waiting_tells_its_cause(waits_s: list[float], cause: str | None) -> None:
    said = probable_cause(steps(waits_s))
    assert said is None if cause is None else cause in str(said)


def test_the_share_is_of_waiting_and_working_together() -> None:
    assert waited_share(steps([1.0, 3.0])) == pytest.approx(4 / 6)
    assert "67% of the time" in str(probable_cause(steps([2.0] * 5)))


def test_a_report_logs_the_shards_in_a_batch_and_warns_of_waiting(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    losses = dict.fromkeys(
        (
            "loss", "contrastive", "reconstruction_optical", "reconstruction_radar", "match_fraction",
            "gradient_norm", "temperature", "learning_rate", "samples_per_s",
        ),
        1.0,
    )  # fmt: skip
    for wait, warnings in ((0.01, 0), (0.3, 1)):
        caplog.clear()
        told = [
            {"samples": 4.0 * n, "shards": 3.0, "blocks": 9.0, **losses, **step}
            for n, step in enumerate(steps([wait] * 40))
        ]
        means = write_losses(str(tmp_path), told, RANKS, rank=0, total=160)
        assert means["shards"] == 3
        assert "125 MB/s, waited 15 % (rank 1: 20 %)" in caplog.text
        assert "3 shards and 9 blocks of cells in a batch" in caplog.text
        said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        assert len(said) == warnings
        assert all("evenly over the batches" in each for each in said)


def test_what_only_some_steps_have_is_averaged_over_those_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    every = {"epoch": 0.0, "waited_s": 0.0, "step_s": 1.0, "samples_per_s": 4.0, "learning_rate": 1e-3}
    every |= {"shards": 1.0, "blocks": 1.0}
    names = ("contrastive", "reconstruction_optical", "reconstruction_radar", "match_fraction", "gradient_norm")
    learnt = {**every, **dict.fromkeys(names, 1.0), "temperature": 0.07}
    told = [
        {**learnt, "samples": 4.0, "loss": 1.0},
        {**every, "samples": 8.0, "skipped": 1.0},
        {**learnt, "samples": 12.0, "loss": 2.0, "rank_optical": 3.0, "rank_radar": 2.0},
        {**every, "samples": 16.0, "skipped": 1.0},
    ]
    means = write_losses(str(tmp_path), told, RANKS, rank=0, total=16)
    assert (means["loss"], means["skipped"], means["rank_optical"]) == (1.5, 2, 3)
    assert Objects.at(tmp_path).get_json("000000000016.json")["steps"] == told
    assert Objects.at(tmp_path).get_json("000000000016.json")["ranks"] == RANKS
    for part in ("loss 1.500", "temperature 0.07", "4 samples/s,", "rank 3.0 optical and 2.0 radar", "2 steps skipped"):
        assert part in caplog.text


def test_a_rank_is_fed_what_its_steps_hold() -> None:
    taken = [{"waited_s": wait, "step_s": 1 - wait, "fed_bytes": 3e6} for wait in (0.5, 0.0, 0.25, 0.25)]
    (alone,) = fed_ranks(taken, {}, samples=6)
    assert alone == {"samples_per_s": 6, "bytes_per_s": 3e6, "waited_share": 0.25}
    (cached,) = fed_ranks(taken, {"cache_hits": 3.0, "cache_misses": 1.0, "cache_read_bytes": 9.0}, samples=6)
    assert cached == {**alone, "cache_hits": 3, "cache_misses": 1}
    assert fed_in_total(RANKS) == {"bytes_per_s": 125e6, "waited_share": pytest.approx(0.15), "waited_share_most": 0.2}
    assert said_waiting([alone]) == "waited 25 %"
