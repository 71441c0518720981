"""A model written for others: its weights, and the Item beside them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch

from jobs.support.encoder import load_model
from jobs.support.model_files import write_model
from model.croma import CromaConfig, CromaPretraining
from model.normalisation import SSL4EO_S12
from model.pretrained import model_hash
from pipeline.objects import Objects

SMALL = CromaConfig(width=32, optical_depth=2, radar_depth=1, joint_depth=1, heads=4, decoder_width=32, decoder_heads=4)


def test_what_is_written_can_be_loaded_and_is_what_the_item_says(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = CromaPretraining(SMALL)
    digest = write_model(Objects.at(str(tmp_path)), model, SSL4EO_S12, name="twinlook-small", trained_on="chips")
    loaded = load_model(f"{tmp_path}/model.safetensors")
    assert loaded.sha256 == digest == model_hash(model, SSL4EO_S12)
    assert loaded.normalisation == SSL4EO_S12
    item = json.loads((tmp_path / "model.stac.json").read_text())
    weights = item["assets"]["weights"]
    content = (tmp_path / weights["href"]).read_bytes()
    assert weights["file:size"] == len(content)
    assert weights["file:checksum"] == "1220" + hashlib.sha256(content).hexdigest()
    assert item["properties"]["twinlook:model_sha256"] == digest
