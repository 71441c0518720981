"""What a dry run of pretrain says: arithmetic by hand, and nothing assumed that is not called so."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from jobs.pretrain import Pretrain, main
from jobs.support.feed_rate import FeedRate, measure_feed
from jobs.support.pretrain_request import claim
from jobs.support.settings import parse
from jobs.support.training_estimate import TrainingEstimate, training_estimate, training_estimate_lines
from model.croma import BASE
from model.flops import pretraining_flops
from pipeline.fed_chips import FedChips, Feed
from pipeline.grid import Cell
from pipeline.objects import Objects
from pipeline.sources import Source
from tests.sample_chips import LAYOUT, make_chip
from tests.small_stores import Candidate, write_store

FEED = FeedRate(shards=2, num_bytes=300_000_000, chip_bytes=700_000, bytes_per_s=500e6, samples_per_s=1000.0)


def settings(**more: object) -> Pretrain:
    values = {"store": "s", "out": "o", "size": "base", "epochs": 10, "global_batch": 1000, "num_workers": 4, **more}
    return parse(Pretrain, [f"{key}={value}" for key, value in values.items()])


def reckon(**more: object) -> tuple[TrainingEstimate, str]:
    given = settings(**more)
    found = training_estimate(
        given.model_dump(), samples_per_epoch=100_000, sample_bytes=218_000, window_px=120, feed=FEED
    )
    return found, "\n".join(training_estimate_lines(found, given.assume))


def test_time_and_money_follow_from_a_rate_that_is_given() -> None:
    found, text = reckon(**{"assume.samples_per_s": 250, "assume.usd_per_gpu_hour": 2})
    assert (found.steps, found.samples) == (1000, 1_000_000)
    assert found.hours == pytest.approx(1_000_000 / 1000 / 3600)
    assert "250 samples/s per GPU (given as assume.samples_per_s)" in text
    assert "about 17 min on 4 GPUs, 1.1 GPU-hours, about 2 USD at 2 USD an hour" in text


def test_a_rate_from_the_peak_is_called_an_assumption() -> None:
    found, text = reckon(**{"assume.peak_tflops": 100, "assume.peak_share": 0.5})
    assert found.sample_flops == 3 * pretraining_flops(BASE, 225, num_contrasted=1000)
    assert found.samples_per_s == pytest.approx(50e12 / found.sample_flops)
    assert "ASSUMED: 50% of 100 TFLOP/s; base reached 26% on one H200, compiled 31%" in text


def test_what_is_computed_twice_takes_time_and_saves_memory() -> None:
    plain, _ = reckon()
    for how in ({"micro_batch": 50}, {"recompute_activations": "true"}):
        other, text = reckon(**how)
        assert other.sample_flops == plain.sample_flops
        assert other.samples_per_s is not None
        assert plain.samples_per_s is not None
        assert 0.7 < other.samples_per_s / plain.samples_per_s < 0.95
        assert other.memory.activations < plain.memory.activations / 3
        assert "repeated to save memory" in text
    assert reckon(micro_batch=250)[0] == plain


def test_how_fast_cpus_are_is_not_made_up() -> None:
    found, text = reckon(use_gpu="false")
    assert found.hours is None
    assert "how long on CPUs: unknown; say assume.samples_per_s" in text
    assert "USD" not in text
    assert "4 workers" in reckon(use_gpu="false", **{"assume.samples_per_s": 3})[1]


def test_more_memory_than_a_gpu_has_is_said_with_what_to_lower() -> None:
    assert "lower micro_batch" not in reckon()[1]
    assert "more than a GPU of 16 GB has" in reckon(**{"assume.gpu_gb": 16})[1]
    assert "lower micro_batch, or set recompute_activations" in reckon(size="large", global_batch=8000)[1]


def test_what_the_feed_has_to_bring_is_held_against_what_the_store_gave() -> None:
    found, text = reckon(**{"assume.samples_per_s": 500, "crops_per_chip": 2})
    assert found.readers == 2
    assert "2000 samples/s: 436 MB/s to the workers, 700 MB/s from the store, and about 2 CPUs" in text
    assert "1.4 times what one reader got" in text
    assert "times what one reader got" not in reckon(**{"assume.samples_per_s": 50})[1]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    url = str(tmp_path_factory.mktemp("stores") / "chips.zarr")
    cells = [Cell(epsg=32633, column=100 + n, row=2000, side_m=240) for n in range(11)]
    write_store(url, LAYOUT, [Candidate(cell=cell) for cell in cells], make_chip, request={}, statistics=True)
    return url


def test_the_store_is_tried_as_training_reads_it(store: str) -> None:
    feed = Feed(url=store, version=1, crop_px=24, global_batch=2, crops_per_chip=3)
    found = measure_feed(feed, FedChips(feed).rows)
    assert found.shards == 2
    # The first and the last of three shards of four chips: seven of the eleven.
    sizes = [
        sum(Objects.at(store).size(f"{name}/c/{shard}/0/0/0") for name in ("b10", "b20", "b60", "radar"))
        for shard in (0, 2)
    ]
    assert found.num_bytes == sum(sizes)
    assert found.chip_bytes == round(sum(sizes) / 7)
    assert found.samples_per_s > 0


def test_a_dry_run_says_all_of_it_and_writes_nothing(
    store: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    words = {"store": store, "out": tmp_path / "run", "size": "tiny", "crop_px": 24, "global_batch": 4}
    main(settings(**words, dry_run="true", num_workers=2))
    for part in ("27 steps in 10 epochs; 108 samples", "ASSUMED", "memory per worker", "checkpoint", "(measured)"):
        assert part in caplog.text
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "run.run").exists()


def test_what_is_assumed_and_which_preset_it_was_do_not_make_another_run(store: str, tmp_path: Path) -> None:
    sources, out = [Source(url=store, version=1)], Objects.at(tmp_path)
    spelt = parse(Pretrain, ["store=s", "out=o", "preset=tiny-demo"]).model_dump(exclude={"preset"})
    claim(out, parse(Pretrain, ["store=s", "out=o", "preset=tiny-demo", "assume.peak_share=0.5"]), sources)
    claim(out, Pretrain(**spelt), sources)
