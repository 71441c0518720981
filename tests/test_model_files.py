"""A model written for others in every layout: its file, the Item beside it, and the job that writes both."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from jobs.export_model import ExportModel, main
from jobs.support.encoder import load_model
from jobs.support.job import JobError
from jobs.support.model_files import FILES, ITEMS, write_model
from jobs.support.settings import parse
from model.croma import CromaConfig, CromaPretraining, Objective
from model.normalisation import SSL4EO_S12
from model.pretrained import model_hash
from model.released import NORMALISATION, to_released, to_torchgeo
from model.stac import LAYOUTS
from pipeline.objects import Objects

# As many heads as the released models: their weights do not tell.
SMALL = CromaConfig(
    width=32, optical_depth=1, radar_depth=1, joint_depth=1, heads=16, decoder_width=32, decoder_heads=4
)


def small_model(objective: Objective | None = None) -> CromaPretraining:
    torch.manual_seed(0)
    return CromaPretraining(SMALL, objective).eval()


def checked_item(folder: Path, layout: str) -> dict[str, Any]:
    """The Item of a layout, whose sizes and hashes are those of the file."""
    item: dict[str, Any] = json.loads((folder / ITEMS[layout]).read_text())
    weights = item["assets"]["weights"]
    content = (folder / weights["href"]).read_bytes()
    assert weights["file:size"] == len(content)
    assert weights["file:checksum"] == "1220" + hashlib.sha256(content).hexdigest()
    return item


def test_what_is_written_can_be_loaded_and_is_what_the_item_says(tmp_path: Path) -> None:
    model = small_model()
    digest = write_model(Objects.at(str(tmp_path)), model, SSL4EO_S12, name="twinlook-small", trained_on="chips")
    loaded = load_model(f"{tmp_path}/model.safetensors")
    assert loaded.sha256 == digest == model_hash(model, SSL4EO_S12)
    assert (loaded.normalisation, loaded.objective) == (SSL4EO_S12, Objective())
    item = checked_item(tmp_path, "safetensors")
    assert item["properties"]["twinlook:model_sha256"] == digest
    assert item["properties"]["twinlook:optical_level"] == "l2a"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    write_model(Objects.at(str(folder)), small_model(), SSL4EO_S12, name="twinlook-small", trained_on="chips")
    return folder / "model.safetensors"


def exported(model: Path, out: Path, layout: str, *words: str) -> dict[str, Any]:
    main(parse(ExportModel, [f"model={model}", f"out={out}", f"layout={layout}", *words]))
    return checked_item(out, layout)


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix("model."): tensor
        for name, tensor in safetensors.torch.load_file(path).items()
        if name.startswith("model.")
    }


def test_every_layout_has_a_file_and_a_kind() -> None:
    assert FILES.keys() == ITEMS.keys() == LAYOUTS.keys()
    assert len(set(FILES.values())) == len(set(ITEMS.values())) == len(FILES)


@pytest.mark.parametrize(
    ("layout", "read", "state"),
    [
        ("safetensors", read_safetensors, lambda croma: croma.state_dict()),
        (
            "official",
            lambda path: {
                f"{part}.{key}": tensor
                for part, parts in torch.load(path, weights_only=True).items()
                for key, tensor in parts.items()
            },
            lambda croma: {
                f"{p}.{key}": tensor for p, parts in to_released(croma).items() for key, tensor in parts.items()
            },
        ),
        ("torchgeo", lambda path: torch.load(path, weights_only=True), lambda croma: to_torchgeo(croma, image_px=64)),
    ],
)
def test_a_model_is_exported_with_an_item_beside_it(
    trained: Path, tmp_path: Path, layout: str, read: Callable[..., Any], state: Callable[..., Any]
) -> None:
    item = exported(trained, tmp_path, layout, "image_px=64", "name=mine", "trained_on=chips")
    assert item["id"] == "mine"
    assert item["properties"]["twinlook:layout"] == layout
    assert item["properties"]["mlm:pretrained_source"] == "chips"
    weights = item["assets"]["weights"]
    assert (weights["mlm:artifact_type"], weights["type"], weights["title"]) == LAYOUTS[layout]
    got, expected = read(tmp_path / FILES[layout]), state(load_model(str(trained)).croma)
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())
    record = json.loads(Path(f"{tmp_path}.run/run.json").read_text())
    assert record["status"] == "succeeded"
    # Again, without harm.
    assert exported(trained, tmp_path, layout, "image_px=64")["properties"]["twinlook:layout"] == layout


def test_the_exported_program_runs_without_our_code(trained: Path, tmp_path: Path) -> None:
    item = exported(trained, tmp_path, "torch-export")
    assert item["assets"]["weights"]["mlm:artifact_type"] == "torch.export.save"
    program = torch.export.load(tmp_path / "encoders.pt2").module()
    optical, radar = torch.rand(2, 12, 24, 40), torch.rand(2, 2, 24, 40)
    for name, value in load_model(str(trained)).croma(optical, radar).items():
        torch.testing.assert_close(program(optical, radar)[name], value)


@pytest.mark.parametrize("layout", ["official", "torchgeo"])
def test_weights_of_others_become_ours(trained: Path, tmp_path: Path, layout: str) -> None:
    exported(trained, tmp_path / "theirs", layout)
    theirs = load_model(str(tmp_path / "theirs" / FILES[layout]))
    assert theirs.normalisation == NORMALISATION
    item = exported(tmp_path / "theirs" / FILES[layout], tmp_path / "ours", "safetensors")
    ours = load_model(str(tmp_path / "ours" / "model.safetensors"))
    # The same statistics, with or without a level: the same embeddings, and the same hash.
    assert theirs.sha256 == ours.sha256 == load_model(str(trained)).sha256
    assert item["properties"]["mlm:pretrained_source"] == NORMALISATION.source


def test_another_model_is_not_written_over(trained: Path, tmp_path: Path) -> None:
    other = small_model()
    with torch.no_grad():
        other.croma.radar_encoder.norm.bias += 1
    write_model(Objects.at(str(tmp_path)), other, NORMALISATION, name="other", trained_on="chips")
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(JobError, match="is of another model"):
        exported(trained, tmp_path, "safetensors")
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_a_dry_run_writes_nothing(trained: Path, tmp_path: Path) -> None:
    main(parse(ExportModel, [f"model={trained}", f"out={tmp_path}/out", "layout=official", "--dry-run"]))
    assert not (tmp_path / "out").exists()
    assert parse(ExportModel, [f"model={trained}", "out=x", "layout=torchgeo", "image_px=None"]).image_px is None


@pytest.mark.parametrize(
    ("objective", "untrained"),
    [
        (Objective(reconstruction_weight=0.0), ["joint_encodings", "joint_embedding"]),
        (Objective(contrastive_weight=0.0), ["radar_embedding", "optical_embedding"]),
        (Objective(), []),
    ],
)
def test_the_item_says_which_outputs_no_objective_reached(
    tmp_path: Path, objective: Objective, untrained: list[str]
) -> None:
    model = small_model(objective)
    write_model(Objects.at(str(tmp_path)), model, SSL4EO_S12, name="one-sided", trained_on="chips")
    for item in (
        checked_item(tmp_path, "safetensors"),
        exported(tmp_path / "model.safetensors", tmp_path / "official", "official"),
    ):
        assert item["properties"]["twinlook:untrained_outputs"] == untrained
        said = {each["name"] for each in item["properties"]["mlm:output"] if "not trained" in each["description"]}
        assert said == set(untrained)
    # Those are the ones that weights without a gradient lie behind.
    still = [each for each in model.croma.parameters() if not each.requires_grad]
    model.requires_grad_(True)
    outputs = model.croma(torch.rand(1, 12, 16, 16), torch.rand(1, 2, 16, 16))
    for name, value in outputs.items():
        gradients = torch.autograd.grad(value.sum(), still, allow_unused=True, retain_graph=True) if still else ()
        assert any(gradient is not None for gradient in gradients) == (name in untrained), name
