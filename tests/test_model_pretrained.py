"""Checkpoints: what they hold, what they refuse, and the released layout."""

from __future__ import annotations

import hashlib
import io
import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from model.croma import CONFIGS, REFERENCE_OBJECTIVE, TINY, Croma, CromaConfig, CromaPretraining, Objective
from model.normalisation import SSL4EO_S12, from_statistics
from model.pretrained import load, model_hash, read, restore, restore_pretraining, save, save_weights, to_checkpoint
from model.released import (
    NORMALISATION,
    from_any,
    from_reference_pretraining,
    from_released,
    from_torchgeo,
    reference_name,
    released_name,
    to_reference_pretraining,
    to_released,
    to_torchgeo,
)
from model.training import build_optimizer

SMALL = CromaConfig(width=32, optical_depth=2, radar_depth=1, joint_depth=1, heads=4, decoder_width=32, decoder_heads=4)
OTHER = from_statistics([0.0] * 14, [1.0] * 14, source="made up")


def through_a_file(checkpoint: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    save(checkpoint, file)
    file.seek(0)
    return load(file)


def through_safetensors(checkpoint: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    save_weights(checkpoint, file)
    file.seek(0)
    return load(file)


def images() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(2, 12, 16, 24, generator=generator), torch.rand(2, 2, 16, 24, generator=generator)


def equal_states(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_the_encoders_come_back_from_a_pretraining_checkpoint() -> None:
    model = CromaPretraining(SMALL)
    croma, normalisation = restore(through_a_file(to_checkpoint(model, OTHER)))
    assert normalisation == OTHER
    assert not croma.training
    assert croma.config == SMALL
    for name, value in model.croma(*images()).items():
        assert torch.equal(croma(*images())[name], value)


def test_pretraining_comes_back_whole_with_its_training_state() -> None:
    model = CromaPretraining(SMALL, Objective(joint_self_bias="cross"))
    optimizer = build_optimizer(model)
    checkpoint = through_a_file(
        to_checkpoint(model, OTHER, training={"samples_seen": 64, "optimizer": optimizer.state_dict()})
    )
    restored, normalisation = restore_pretraining(checkpoint)
    assert normalisation == OTHER
    assert restored.objective == model.objective
    assert equal_states(restored, model)
    build_optimizer(restored).load_state_dict(checkpoint["training"]["optimizer"])
    assert checkpoint["training"]["samples_seen"] == 64


@pytest.mark.parametrize("objective", [Objective(), Objective(contrastive_weight=0.0, target_statistics="per_sensor")])
def test_safetensors_hold_all_that_a_checkpoint_does_but_training_state(objective: Objective) -> None:
    model = CromaPretraining(SMALL, objective)
    restored, normalisation = restore_pretraining(through_safetensors(to_checkpoint(model, OTHER)))
    assert equal_states(restored, model)
    assert (restored.objective, restored.config, normalisation) == (objective, SMALL, OTHER)
    croma, _ = restore(through_safetensors(to_checkpoint(model.croma, OTHER)))
    assert equal_states(croma, model.croma)
    with pytest.raises(ValueError, match="encoders alone"):
        restore_pretraining(through_safetensors(to_checkpoint(model.croma, OTHER)))
    with pytest.raises(ValueError, match="no training state: samples_seen"):
        save_weights(to_checkpoint(model, OTHER, training={"samples_seen": 3}), io.BytesIO())


def test_any_reader_of_safetensors_sees_the_weights_and_the_normalisation() -> None:
    file = io.BytesIO()
    model = Croma(SMALL)
    save_weights(to_checkpoint(model, OTHER), file)
    tensors = safetensors.torch.load(file.getvalue())
    assert torch.equal(tensors["model.radar_head.expand.bias"], model.radar_head.expand.bias)
    header = json.loads(file.getvalue()[8 : 8 + int.from_bytes(file.getvalue()[:8], "little")])
    assert json.loads(header["__metadata__"]["normalisation"]) == OTHER.to_dict()


def test_pretraining_does_not_go_on_from_encoders_alone() -> None:
    with pytest.raises(ValueError, match="encoders alone"):
        restore_pretraining(to_checkpoint(Croma(SMALL), OTHER))


def file_of(content: object) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(content, file)
    file.seek(0)
    return file


class Code:
    """Something a checkpoint must not be able to bring along."""


@pytest.mark.parametrize(
    ("file", "named"),
    [
        (io.BytesIO(b"no checkpoint"), "not a checkpoint"),
        (io.BytesIO(b""), "not a checkpoint"),
        (io.BytesIO(file_of({"weight": torch.zeros(1000)}).getvalue()[:-500]), "not a checkpoint"),
        (file_of(Code()), "not a checkpoint"),
        (file_of([1, 2]), "its format is 'list'"),
        (file_of({"state_dict": {}}), "its format is None"),
        (file_of({"format": "twinlook-croma", "version": 99}), "version 99 is not 1"),
        (io.BytesIO(safetensors.torch.save({"a": torch.zeros(1)})), "its format is None"),
        (io.BytesIO(safetensors.torch.save({"a": torch.zeros(9)})[:-20]), "not a checkpoint"),
    ],
)
def test_what_is_no_checkpoint_is_refused(file: io.BytesIO, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        load(file)


def test_keys_and_shapes_that_do_not_fit_are_named() -> None:
    checkpoint = to_checkpoint(Croma(SMALL), OTHER)
    weights = dict(checkpoint["model"])
    for index in range(2):
        del weights[f"optical_encoder.layers.{index}.attention.to_out.weight"]
        del weights[f"optical_encoder.layers.{index}.attention.to_out.bias"]
    weights["surprise"] = torch.zeros(1)
    weights["joint_encoder.norm.weight"] = torch.zeros(3)
    with pytest.raises(
        ValueError, match=r"4 missing: optical_encoder\.layers\.0\.attention\.to_out\.bias, .*…"
    ) as caught:
        restore(checkpoint | {"model": weights})
    assert "1 not expected: surprise" in str(caught.value)
    assert "joint_encoder.norm.weight is (3,) instead of (32,)" in str(caught.value)


def test_a_configuration_of_another_kind_is_refused() -> None:
    checkpoint = to_checkpoint(Croma(SMALL), OTHER)
    with pytest.raises(ValueError, match="widht"):
        restore(checkpoint | {"config": {"widht": 3}})


def test_the_hash_follows_what_decides_an_embedding_and_nothing_else() -> None:
    torch.manual_seed(0)
    model = CromaPretraining(SMALL)
    digest = model_hash(model, OTHER)
    assert len(digest) == 64
    restored, normalisation = restore(through_a_file(to_checkpoint(model, OTHER)))
    assert model_hash(restored, normalisation) == digest
    with torch.no_grad():
        model.logit_scale += 1
        model.decoder.mask_token += 1
    assert model_hash(model, OTHER) == digest
    assert model_hash(model, SSL4EO_S12) != digest
    with torch.no_grad():
        model.croma.radar_encoder.norm.bias[3] += 1e-7
    assert model_hash(model, OTHER) != digest


def test_the_hash_is_that_of_sizes_scaling_and_bytes_by_name() -> None:
    croma = Croma(SMALL)
    sizes = {name: value for name, value in asdict(SMALL).items() if not name.startswith("decoder")}
    scaling = {name: value for name, value in SSL4EO_S12.to_dict().items() if name != "level"}
    expected = hashlib.sha256(json.dumps([sizes, scaling], sort_keys=True).encode())
    for name, tensor in sorted(croma.state_dict().items()):
        expected.update(f"{name} torch.float32 {tuple(tensor.shape)}\n".encode())
        expected.update(tensor.numpy().tobytes())
    # Which stores a model takes decides no embedding.
    for level in ("l2a", "l1c", None):
        assert model_hash(croma, replace(SSL4EO_S12, level=level)) == expected.hexdigest()
    # Of a buffer without dimensions too.
    croma.register_buffer("scalar", torch.tensor(2.5))
    assert model_hash(croma, SSL4EO_S12) != expected.hexdigest()


def test_weights_in_bfloat16_have_a_hash_of_their_own() -> None:
    torch.manual_seed(0)
    croma = Croma(SMALL)
    exact, rounded = model_hash(croma, OTHER), model_hash(croma.bfloat16(), OTHER)
    assert exact != rounded
    assert model_hash(croma.float(), OTHER) not in (exact, rounded)


def test_the_number_of_heads_is_part_of_the_hash() -> None:
    four = Croma(SMALL)
    values = {field: getattr(SMALL, field) for field in ("width", "optical_depth", "radar_depth", "joint_depth")}
    eight = Croma(CromaConfig(**values, heads=8))
    eight.load_state_dict(four.state_dict())
    assert model_hash(four, OTHER) != model_hash(eight, OTHER)


def test_the_released_layout_goes_there_and_back() -> None:
    croma = Croma(SMALL)
    restored, normalisation = from_released(through_a_zip(to_released(croma)), heads=SMALL.heads)
    assert normalisation == replace(SSL4EO_S12, level=None)
    assert equal_states(restored, croma)
    assert restored.config.optical_depth == 2


def through_a_zip(released: dict[str, dict[str, torch.Tensor]]) -> dict[str, dict[str, torch.Tensor]]:
    loaded: dict[str, dict[str, torch.Tensor]] = torch.load(file_of(released), weights_only=True)
    return loaded


def test_released_names_are_those_of_the_reference() -> None:
    assert released_name("optical_encoder.patch_embedding.weight") == ("s2_encoder", "linear_input.weight")
    assert released_name("radar_encoder.layers.5.attention.to_qkv.weight") == (
        "s1_encoder",
        "transformer.layers.5.0.to_qkv.weight",
    )
    assert released_name("radar_encoder.layers.5.feed_forward.contract.bias") == (
        "s1_encoder",
        "transformer.layers.5.1.net.3.bias",
    )
    assert released_name("joint_encoder.layers.0.cross_attention.norm.bias") == (
        "joint_encoder",
        "layers.0.1.input_norm.bias",
    )
    assert released_name("joint_encoder.norm.weight") == ("joint_encoder", "norm_out.weight")
    assert released_name("radar_head.expand.weight") == ("s1_GAP_FFN", "1.weight")


@pytest.mark.parametrize(("size", "tensors"), [("base", (70, 6, 136, 6, 110)), ("large", (136, 6, 268, 6, 218))])
def test_a_released_checkpoint_holds_as_many_tensors_as_the_reference(size: str, tensors: tuple[int, ...]) -> None:
    with torch.device("meta"):
        released = to_released(Croma(CONFIGS[size]))
    order = ("s1_encoder", "s1_GAP_FFN", "s2_encoder", "s2_GAP_FFN", "joint_encoder")
    assert tuple(len(released[part]) for part in order) == tensors


def test_released_checkpoints_that_do_not_fit_are_refused() -> None:
    released = to_released(Croma(TINY))
    with pytest.raises(ValueError, match="s2_GAP_FFN is missing"):
        from_released({part: state for part, state in released.items() if part != "s2_GAP_FFN"}, heads=8)
    with pytest.raises(ValueError, match=r"no linear_input\.weight"):
        from_released(released | {"s2_encoder": {}}, heads=8)
    extra = released["joint_encoder"] | {"extra.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"1 not expected: joint_encoder\.extra\.weight"):
        from_released(released | {"joint_encoder": extra}, heads=8)


@pytest.mark.parametrize("image_px", [None, 32])
def test_a_torchgeo_state_dict_goes_there_and_back_with_and_without_its_bias(image_px: int | None) -> None:
    croma = Croma(SMALL)
    state = to_torchgeo(croma, image_px=image_px)
    assert ("attn_bias" in state) == (image_px is not None)
    if image_px is not None:
        assert state["attn_bias"].shape == (1, 4, 16, 16)
    restored, normalisation = from_torchgeo(state, heads=4)
    assert equal_states(restored, croma)
    assert normalisation == NORMALISATION


def test_a_torchgeo_state_dict_that_does_not_fit_is_refused_by_its_own_names() -> None:
    state = to_torchgeo(Croma(SMALL))
    del state["s1_encoder.transformer.layers.0.0.to_qkv.weight"]
    with pytest.raises(ValueError, match=r"1 missing: radar_encoder\.layers\.0\.attention\.to_qkv\.weight"):
        from_torchgeo(state, heads=4)
    with pytest.raises(ValueError, match="s1_encoder, s1_GAP_FFN, s2_encoder, s2_GAP_FFN, joint_encoder is missing"):
        from_torchgeo({"weight": torch.zeros(1)})
    radar_alone = {key: tensor for key, tensor in to_torchgeo(Croma(SMALL)).items() if key.startswith("s1_")}
    with pytest.raises(ValueError, match=r"joint_encoder is missing; weights of one sensor alone are not taken"):
        from_torchgeo(radar_alone)


@pytest.mark.parametrize("kind", ["ours", "released", "torchgeo", "torchgeo in safetensors"])
def test_encoders_come_out_of_any_file(kind: str) -> None:
    croma, file = Croma(SMALL), io.BytesIO()
    if kind == "ours":
        save_weights(to_checkpoint(CromaPretraining(SMALL), OTHER) | {"model": croma.state_dict()}, file)
    elif kind == "released":
        torch.save(to_released(croma), file)
    elif kind == "torchgeo":
        torch.save(to_torchgeo(croma, image_px=32), file)
    else:
        file.write(safetensors.torch.save(to_torchgeo(croma, image_px=32)))
    file.seek(0)
    restored, normalisation = from_any(read(file), heads=4)
    assert equal_states(restored, croma)
    assert normalisation == (OTHER if kind == "ours" else NORMALISATION)


@pytest.mark.parametrize("content", [[1, 2], {"state_dict": {}}, {"format": "twinlook-croma", "version": 99}])
def test_what_holds_no_encoders_is_refused(content: object) -> None:
    with pytest.raises(ValueError, match=r"not a twinlook-croma checkpoint|version 99"):
        from_any(content)


def test_the_reference_pretraining_names_go_there_and_back() -> None:
    model = CromaPretraining(SMALL, REFERENCE_OBJECTIVE)
    state = to_reference_pretraining(model)
    assert state["decoder.decoder_pos_embed"].shape == (1, 225, 32)
    assert state["decoder.mask_token"].shape == (1, 1, 32)
    for prefix in ("", "module."):
        restored, normalisation = from_reference_pretraining(
            {prefix + key: tensor for key, tensor in state.items()},
            heads=4,
            decoder_heads=SMALL.decoder_heads,
            objective=REFERENCE_OBJECTIVE,
        )
        assert equal_states(restored, model)
        assert (restored.objective, normalisation) == (REFERENCE_OBJECTIVE, NORMALISATION)
    assert equal_states(from_released(to_released(restored.croma), heads=4)[0], model.croma)
    with pytest.raises(ValueError, match=r"decoder\.mask_token is missing"):
        from_reference_pretraining({key: value for key, value in state.items() if "mask_token" not in key})


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("croma.radar_encoder.patch_embedding.bias", "radar_encoder.linear_input.bias"),
        (
            "croma.optical_encoder.layers.1.attention.to_qkv.weight",
            "optical_encoder.transformer.layers.1.0.create_qkv.weight",
        ),
        ("croma.radar_encoder.layers.0.attention.to_out.bias", "radar_encoder.transformer.layers.0.0.out.bias"),
        ("croma.joint_encoder.layers.0.self_attention.to_out.bias", "cross_encoder.layers.0.0.out.bias"),
        ("croma.joint_encoder.layers.0.cross_attention.to_out.bias", "cross_encoder.layers.0.1.to_out.bias"),
        ("croma.joint_encoder.layers.0.cross_attention.to_k.weight", "cross_encoder.layers.0.1.create_k.weight"),
        ("croma.joint_encoder.layers.0.feed_forward.contract.bias", "cross_encoder.layers.0.2.net.2.bias"),
        ("croma.optical_head.contract.weight", "GAP_FFN_optical.3.weight"),
        ("decoder.embedding.weight", "decoder.encoder_to_decoder.weight"),
        ("decoder.layers.0.attention.norm.weight", "decoder.decoder.layers.0.0.input_norm.weight"),
        ("decoder.norm.bias", "decoder.decoder.norm_out.bias"),
        ("decoder.prediction.weight", "decoder.linear_output.weight"),
        ("radar_projection.weight", "global_contrast_loss.radar_proj.weight"),
        ("logit_scale", "global_contrast_loss.logit_scale"),
    ],
)
def test_reference_pretraining_names_are_those_of_its_code(ours: str, theirs: str) -> None:
    assert ours in CromaPretraining(SMALL).state_dict()
    assert reference_name(ours) == theirs


@pytest.mark.parametrize(("size", "everything"), [("base", 199_667_585), ("large", 678_908_289)])
def test_the_reference_pretraining_layout_has_as_many_numbers_as_the_reference(size: str, everything: int) -> None:
    with torch.device("meta"):
        state = to_reference_pretraining(CromaPretraining(CONFIGS[size]))
    assert sum(tensor.numel() for tensor in state.values()) == everything


def test_the_lines_of_the_readme_embed_an_array(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with Path("weights.pt").open("wb") as file:
        save(to_checkpoint(CromaPretraining(SMALL), SSL4EO_S12), file)
    text = (Path(__file__).parent.parent / "model" / "README.md").read_text()
    code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]
    optical, radar = images()
    names: dict[str, Any] = {"optical": 5000 * optical, "radar": -30 * radar}
    exec(code, names)
    for name in ("radar", "optical", "joint"):
        assert names["outputs"][f"{name}_embedding"].shape == (2, 32)
        assert f"`{name}_encodings`, `{name}_embedding`" in text
