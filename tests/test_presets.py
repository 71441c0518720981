"""Presets of pretrain: each loads, and whatever is given goes before it."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.pretrain import Pretrain
from jobs.support.presets import PRESETS
from jobs.support.settings import parse

NEEDED = ["store=chips.zarr", "out=run"]


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_loads_and_its_values_are_the_settings(name: str) -> None:
    settings = parse(Pretrain, [*NEEDED, f"preset={name}"]).model_dump()
    preset = dict(PRESETS[name])
    assert settings["objective"].items() >= dict(preset.pop("objective", {})).items()
    assert settings.items() >= preset.items()
    assert settings["global_batch"] % settings["num_workers"] == 0


def test_the_presets_of_the_paper_hold_what_is_said_of_it() -> None:
    base, large = (parse(Pretrain, [*NEEDED, f"preset=croma-{size}-ssl4eo"]) for size in ("base", "large"))
    assert (base.size, base.epochs, large.size, large.epochs) == ("base", 300, "large", 600)
    for settings in (base, large):
        assert settings.learning_rate == pytest.approx(4e-6 * settings.global_batch / 256)
        assert (settings.crop_px, settings.scale_augmentation, settings.mask_fraction) == (120, True, 0.75)
        assert settings.objective.contrastive_weight == settings.objective.reconstruction_weight


def test_words_go_before_the_file_and_the_file_before_the_preset(tmp_path: Path) -> None:
    path = tmp_path / "pretrain.yaml"
    path.write_text("preset: croma-base-ssl4eo\nepochs: 10\nglobal_batch: 512\nobjective: {contrastive_weight: 2}\n")
    settings = parse(Pretrain, [f"config={path}", *NEEDED, "global_batch=64", "objective.gathered_gradient=false"])
    assert (settings.epochs, settings.global_batch, settings.normalisation) == (10, 64, "ssl4eo-s12")
    objective = settings.objective
    assert (objective.contrastive_weight, objective.reconstruction_weight) == (2.0, 1.0)
    assert not objective.gathered_gradient


def test_printed_settings_of_a_preset_can_be_read_again(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = [*NEEDED, "preset=croma-large-ssl4eo", "epochs=7"]
    with pytest.raises(SystemExit) as done:
        parse(Pretrain, [*words, "--print-config"])
    assert done.value.code == 0
    path = tmp_path / "printed.yaml"
    path.write_text(capsys.readouterr().out)
    for line in ("preset: croma-large-ssl4eo", "size: large", "epochs: 7", "global_batch: 7200"):
        assert line in path.read_text().splitlines()
    assert parse(Pretrain, [f"config={path}"]) == parse(Pretrain, words)


def test_an_unknown_preset_is_refused_with_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(Pretrain, [*NEEDED, "preset=croma-huge"])
    said = capsys.readouterr().err
    assert "preset='croma-huge'" in said
    assert all(name in said for name in PRESETS)
