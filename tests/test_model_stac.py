"""The STAC Item of a model: what it says, and that the schemas accept it."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonschema import Draft7Validator
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT7

from model.croma import Croma, CromaConfig, Objective
from model.normalisation import SSL4EO_S12
from model.pretrained import model_hash
from model.stac import model_item

SMALL = CromaConfig(width=32, optical_depth=2, radar_depth=1, joint_depth=1, heads=4)


def item_of(**changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "name": "twinlook-small",
        "href": "./model.safetensors",
        "num_bytes": 12,
        "sha256": "ab" * 32,
        "created": datetime(2026, 1, 2, tzinfo=UTC),
        "trained_on": "made-up chips",
    }
    return model_item(Croma(SMALL), SSL4EO_S12, **(values | changes))


def errors(item: dict[str, Any], schemas: Path, name: str) -> list[str]:
    """What a schema that lies beside the checkout has against an item."""
    folder = schemas / "stac-extensions"
    # By where they are published: one of them calls itself by its predecessor's name.
    resources = [
        (
            f"https://stac-extensions.github.io/{path.relative_to(folder).as_posix()}",
            Resource.from_contents(json.loads(path.read_text()), default_specification=DRAFT7),
        )
        for path in folder.rglob("schema.json")
    ]
    schema = json.loads((schemas / name).read_text())
    found = Draft7Validator(schema, registry=Registry().with_resources(resources)).iter_errors(item)
    return [f"{'/'.join(map(str, error.absolute_path))}: {error.message[:200]}" for error in found]


SCHEMAS = ["stac-extensions/mlm/v1.5.2/schema.json", "stac-extensions/file/v2.1.0/schema.json"]


@pytest.mark.parametrize("schema", SCHEMAS)
@pytest.mark.parametrize("placed", [False, True])
def test_schemas_accept_the_item(shared_data: Path, schema: str, placed: bool) -> None:
    square = {"type": "Polygon", "coordinates": [[[8.0, 49.0], [9.0, 49.0], [9.0, 50.0], [8.0, 49.0]]]}
    of_layout = {"layout": "torch-export", "objective": Objective(reconstruction_weight=0.0)}
    item = item_of(geometry=square, bbox=(8.0, 49.0, 9.0, 50.0), **of_layout) if placed else item_of()
    assert errors(json.loads(json.dumps(item)), shared_data.parent / "schemas", schema) == []


def test_the_schema_sees_what_is_wrong(shared_data: Path) -> None:
    item = item_of()
    del item["assets"]["weights"]["mlm:artifact_type"]
    item["properties"]["mlm:tasks"] = ["embedding"]
    assert len(errors(item, shared_data.parent / "schemas", SCHEMAS[0])) >= 2


def test_the_item_is_a_stac_item() -> None:
    pystac = pytest.importorskip("pystac")
    item = pystac.Item.from_dict(item_of())
    assert item.id == "twinlook-small"
    assert item.assets["weights"].href == "./model.safetensors"
    assert item.properties["mlm:total_parameters"] == sum(each.numel() for each in Croma(SMALL).parameters())


def test_inputs_say_bands_and_scaling_as_they_are_applied() -> None:
    optical, radar = item_of()["properties"]["mlm:input"]
    assert optical["bands"] == list(SSL4EO_S12.optical.bands)
    assert radar["bands"] == ["VV", "VH"]
    assert "dB" in radar["description"]
    for spoken, scaling in ((optical, SSL4EO_S12.optical), (radar, SSL4EO_S12.radar)):
        for index, limits in enumerate(spoken["value_scaling"]):
            pixels = torch.zeros(1, len(scaling.bands), 1, 3)
            middle = (limits["minimum"] + limits["maximum"]) / 2
            pixels[0, index, 0] = torch.tensor([limits["minimum"], middle, limits["maximum"]])
            torch.testing.assert_close(
                scaling.apply(pixels)[0, index, 0], torch.tensor([0.0, 0.5, 1.0]), atol=1e-5, rtol=0
            )


def test_outputs_are_those_of_the_model() -> None:
    torch.manual_seed(0)
    croma = Croma(SMALL).eval()
    item = model_item(
        croma, SSL4EO_S12, name="small", href="model.pt", num_bytes=1, sha256="00" * 32, created=datetime.now(UTC),
        trained_on="nothing", layout="official",
    )  # fmt: skip
    outputs = croma(torch.rand(2, 12, 16, 24), torch.rand(2, 2, 16, 24))
    spoken = {each["name"]: each["result"] for each in item["properties"]["mlm:output"]}
    assert spoken.keys() == outputs.keys()
    for name, result in spoken.items():
        assert len(result["dim_order"]) == outputs[name].dim()
        for said, size in zip(result["shape"], outputs[name].shape, strict=True):
            assert said in (-1, size)
    assert item["properties"]["twinlook:model_sha256"] == model_hash(croma, SSL4EO_S12)
    assert item["assets"]["weights"]["mlm:artifact_type"] == "torch.save"
    assert item["assets"]["weights"]["file:checksum"] == "1220" + "00" * 32


def test_an_unknown_layout_is_refused() -> None:
    with pytest.raises(ValueError, match="layout must be one of safetensors, official, torchgeo, torch-export"):
        item_of(layout="onnx")
    with pytest.raises(ValueError, match="go together"):
        item_of(bbox=(0.0, 0.0, 1.0, 1.0))
