"""What measures CROMA on a GPU measures a small one on a CPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model.croma import TINY
from tests.bench_device import Case, attention_seconds, measure, step_of, where_time_goes

CPU = torch.device("cpu")
SMALL = Case(config=TINY, what="pretraining", batch=2, image_px=24)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", r"ignore:The \.grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize(("what", "backend"), [("pretraining", None), ("pretraining", "eager"), ("inference", "eager")])
def test_speed_and_operations_belong_together(what: str, backend: str | None) -> None:
    case = replace(SMALL, what=what, backend=backend)
    found = measure(case, CPU, seconds=0.1)
    assert found.flops_per_s == pytest.approx(case.flops * found.samples_per_s)
    assert found.samples_per_s > 0
    assert found.memory_bytes is None
    torch.compiler.reset()


def test_operations_are_those_of_the_whole_step() -> None:
    step = step_of(SMALL, CPU)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step()
    # Pixels need no gradient, which the count does not know.
    assert counter.get_total_flops() == pytest.approx(SMALL.batch * SMALL.flops, rel=0.05)


@pytest.mark.filterwarnings("ignore:.*:UserWarning:torch.profiler")
def test_the_profile_names_operations_and_their_shares() -> None:
    rows = where_time_goes(SMALL, CPU)
    shares = [share for _, share in rows]
    assert shares == sorted(shares, reverse=True)
    assert 0 < sum(shares) <= 1
    assert any("mm" in name for name, _ in rows)


@pytest.mark.parametrize("shared_bias", [True, False])
def test_a_backend_without_a_kernel_is_told(shared_bias: bool) -> None:
    found = attention_seconds(16, 2, 4, 48, CPU, shared_bias=shared_bias, repeat=1)
    assert set(found) == {"flash", "efficient", "cudnn", "math"}
    assert found["math"] > 0
    assert found["cudnn"] is None
