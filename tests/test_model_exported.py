"""The exported encoders: any size, the same numbers."""

from __future__ import annotations

import io

import pytest
import torch

from model.croma import Croma, CromaConfig
from model.exported import export_encoders

SMALL = CromaConfig(width=32, optical_depth=2, radar_depth=1, joint_depth=2, heads=4)


def images(samples: int, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(samples, 12, height, width), torch.rand(samples, 2, height, width)


def test_one_program_takes_any_batch_and_size() -> None:
    torch.manual_seed(0)
    croma = Croma(SMALL).eval()
    file = io.BytesIO()
    torch.export.save(export_encoders(croma), file)
    file.seek(0)
    program = torch.export.load(file).module()
    for size in ((1, 16, 16), (2, 120, 120), (3, 40, 64), (5, 168, 24)):
        optical, radar = images(*size)
        got, expected = program(optical, radar), croma(optical, radar)
        assert got.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(got[name], value)


@pytest.mark.parametrize("sensor", ["optical", "radar"])
def test_one_sensor_can_be_exported_alone(sensor: str) -> None:
    croma = Croma(SMALL).eval()
    program = export_encoders(croma, sensors=[sensor]).module()
    optical, radar = images(2, 24, 48)
    given = (optical, None) if sensor == "optical" else (None, radar)
    for name, value in croma(*given).items():
        torch.testing.assert_close(program(*given)[name], value)


def test_no_sensor_is_refused() -> None:
    with pytest.raises(ValueError, match="got sar"):
        export_encoders(Croma(SMALL), sensors=["sar"])
