"""Weights to begin with: any file that holds encoders, whatever else it has, is the same model afterwards."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from jobs.pretrain import Pretrain
from jobs.support.initial_weights import INITIAL_FILE, begin_with, initial_normalisation, read_weights
from jobs.support.job import JobError
from jobs.support.settings import parse
from model.croma import Croma, CromaPretraining
from model.normalisation import SSL4EO_S12
from model.pretrained import save_weights, to_checkpoint
from model.released import to_released, to_torchgeo
from pipeline.objects import Objects
from tests.sample_chips import LAYOUT
from tests.small_stores import SMALL, write_model

SCALING = replace(SSL4EO_S12, source="elsewhere")
FRESH = ["decoder", "logit_scale", "optical_projection", "radar_projection"]


def another(seed: int = 1) -> CromaPretraining:
    torch.manual_seed(seed)
    model = CromaPretraining(SMALL)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    return model


def write(path: Path, content: object) -> str:
    torch.save(content, path)
    return str(path)


def write_ours(path: Path, model: Croma | CromaPretraining) -> str:
    buffer = io.BytesIO()
    save_weights(to_checkpoint(model, SCALING), buffer)
    path.write_bytes(buffer.getvalue())
    return str(path)


def files(folder: Path, model: CromaPretraining) -> dict[str, str]:
    return {
        "whole": write_ours(folder / "whole.safetensors", model),
        "encoders": write_ours(folder / "encoders.safetensors", model.croma),
        "released": write(folder / "released.pt", to_released(model.croma)),
        "torchgeo": write(folder / "torchgeo.pt", to_torchgeo(model.croma, image_px=120)),
    }


@pytest.mark.parametrize("kind", ["whole", "encoders", "released", "torchgeo"])
def test_every_kind_of_file_gives_its_encoders_and_what_else_it_has(kind: str, tmp_path: Path) -> None:
    given, out = another(), Objects.at(tmp_path / "run")
    url = files(tmp_path, given)[kind]
    out.put(INITIAL_FILE, read_weights(url, config=SMALL, layout=LAYOUT, own_scaling=True))
    torch.manual_seed(2)
    model = CromaPretraining(SMALL)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert begin_with(model, out) == ([] if kind == "whole" else FRESH)
    for name, value in model.state_dict().items():
        taken = kind == "whole" or name.startswith("croma.")
        assert torch.equal(value, given.state_dict()[name] if taken else before[name]), name
    ours = kind in ("whole", "encoders")
    assert initial_normalisation(out).source == ("elsewhere" if ours else SSL4EO_S12.source)


def test_weights_of_another_size_level_or_none_are_refused(tmp_path: Path) -> None:
    write_model(tmp_path / "model.safetensors")
    url, how = str(tmp_path / "model.safetensors"), {"layout": LAYOUT, "own_scaling": True}
    with pytest.raises(JobError, match="of another size: width 32 instead of 64; give its size"):
        read_weights(url, config=replace(SMALL, width=64), **how)
    # Of encoders alone, the decoder does not matter.
    read_weights(url, config=replace(SMALL, decoder_width=32), **how)
    write_ours(tmp_path / "whole.safetensors", another())
    with pytest.raises(JobError, match="decoder_width 16 instead of 32"):
        read_weights(str(tmp_path / "whole.safetensors"), config=replace(SMALL, decoder_width=32), **how)
    with pytest.raises(JobError, match="no weights at"):
        read_weights(str(tmp_path / "nothing.safetensors"), config=SMALL, **how)
    (tmp_path / "text").write_text("no weights")
    with pytest.raises(JobError, match="not a checkpoint"):
        read_weights(str(tmp_path / "text"), config=SMALL, **how)
    other = {"config": SMALL, "layout": replace(LAYOUT, optical_level="l1c")}
    with pytest.raises(ValueError, match="level l1c were given where l2a is expected"):
        read_weights(url, own_scaling=True, **other)
    read_weights(url, own_scaling=False, **other)


def test_scaling_comes_with_the_weights_unless_another_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["store=s", "out=o"]
    assert parse(Pretrain, words).normalisation == "store"
    assert parse(Pretrain, [*words, "from_weights=w"]).normalisation == "weights"
    assert parse(Pretrain, [*words, "from_weights=w", "normalisation=store"]).normalisation == "store"
    with pytest.raises(SystemExit):
        parse(Pretrain, [*words, "normalisation=weights"])
    assert "normalisation=weights needs from_weights" in capsys.readouterr().err
