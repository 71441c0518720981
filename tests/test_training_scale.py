"""Training on many GPUs, on paper: arithmetic by hand, and the page that shows it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from jobs.support.training_scale import HANDOUT_CORE_MS, PLAN_CORE_MS, demand, scale_table
from model.croma import BASE, CromaPretraining
from pipeline.layout import Layout
from tests.conftest import ROOT


def test_the_demand_of_base_is_what_a_hand_reckons() -> None:
    found = demand(size="base", crops_per_chip=4, window_px=120, num_gpus=64, global_batch=7168, num_chips=10**8)
    rate = 64 * 989e12 * 0.35 / found.sample_flops
    assert found.samples_per_s == pytest.approx(rate)
    assert found.step_s == pytest.approx(7168 / rate)
    assert found.epoch_s == pytest.approx(4e8 / rate)
    # b10 and radar 6 bands at 10 m, b20 6 at 20 m, b60 2 at 60 m, two bytes each.
    assert found.feed_bytes_per_s == pytest.approx(rate * 2 * (6 * 120**2 + 6 * 60**2 + 2 * 20**2))
    assert found.store_bytes_per_s == pytest.approx(rate / 4 * 0.68 * 2 * (6 * 264**2 + 6 * 132**2 + 2 * 44**2))
    assert found.node_bytes_per_s == pytest.approx((found.store_bytes_per_s + found.feed_bytes_per_s * 7 / 8) / 8)
    # Windows of 512 chips are 18.3 batches of 112 samples.
    block = 19 * 112
    assert found.blocks_per_s == pytest.approx(rate / block)
    assert found.block_bytes == pytest.approx(block * found.feed_bytes_per_s / rate)
    assert found.tasks == round(4e8 / block)
    assert (found.dealers, found.blocks_dealt_per_s) == (8, 8 * 1e3 / HANDOUT_CORE_MS)
    assert found.dealt_share == 1.0
    assert found.plan_s == pytest.approx(4e8 / block / 8 * PLAN_CORE_MS / 1e3, rel=1e-4)
    # Four crops of a chip at 0.31 ms of CPU.
    assert found.readers == pytest.approx(rate * 0.31e-3)
    assert found.gathered_bytes == 7168 * 2 * 768 * 4
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in CromaPretraining(BASE).parameters())
    assert found.gradient_bytes == 4 * parameters
    assert found.checkpoint_bytes == 12 * parameters
    assert found.exchanged_bytes == pytest.approx(63 / 64 * (3 * found.gathered_bytes + 8 * parameters))


def test_larger_windows_take_more_of_everything_but_the_store() -> None:
    plain, large = (demand(size="base", crops_per_chip=1, window_px=px) for px in (120, 180))
    assert large.feed_bytes_per_s == pytest.approx(2.25 * plain.feed_bytes_per_s)
    assert large.store_bytes_per_s == plain.store_bytes_per_s
    assert plain.readers < large.readers < 2.25 * plain.readers


def test_more_crops_take_less_of_the_store_and_longer_epochs() -> None:
    one, four = (demand(size="base", crops_per_chip=k, window_px=120) for k in (1, 4))
    assert four.store_bytes_per_s == pytest.approx(one.store_bytes_per_s / 4)
    assert four.epoch_s == pytest.approx(4 * one.epoch_s)
    # A task is as many samples, so an epoch has four times as many.
    assert four.start_share == pytest.approx(one.start_share, rel=1e-3)


def test_the_table_of_the_page_is_what_the_code_reckons() -> None:
    assert scale_table() in (ROOT / "infra" / "benchmarks.md").read_text()


def test_rows_of_the_layout_are_those_that_were_counted() -> None:
    names = [name for name in Layout().arrays() if name != "scl"]
    assert {name: int(np.prod(Layout().arrays()[name].shape[:-2])) for name in names} == {
        "b10": 4, "b20": 6, "b60": 2, "radar": 2,
    }  # fmt: skip
