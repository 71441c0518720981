"""CROMA's sizes, shapes, distances and masked encoding."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model.alibi import distance_bias, grid_bias, patch_positions, slopes
from model.croma import BASE, CONFIGS, LARGE, TINY, Croma, CromaConfig, CromaPretraining, Objective
from model.decoder import sine_cosine_positions
from model.layers import attend, patchify
from model.losses import ContrastiveGradient
from model.masking import Masks, draw_masks
from model.randomness import sample_keys
from tests.bench_model import peak_bytes

SMALL = CromaConfig(width=32, optical_depth=2, radar_depth=1, joint_depth=2, heads=4, decoder_width=32, decoder_heads=4)
CPU = torch.device("cpu")


def random_model(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Every parameter, LayerNorms and biases too, away from its trivial value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def images(height: int = 32, width: int = 32, samples: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.rand(samples, 12, height, width, generator=generator),
        torch.rand(samples, 2, height, width, generator=generator),
    )


def masks_of(num_patches: int, samples: int = 3, fraction: float = 0.75) -> Masks:
    rows = torch.arange(samples)
    keys = sample_keys(rows, torch.zeros_like(rows), seed=0, epoch=0)
    return draw_masks(keys, num_patches, mask_fraction=fraction)


def count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("config", "encoders", "everything", "parts"),
    [
        (BASE, 194_365_440, 199_667_585, (42_614_016, 85_618_944, 56_684_544, 4_723_968)),
        (LARGE, 672_557_056, 678_908_289, (151_251_968, 303_025_152, 201_488_384, 8_395_776)),
    ],
)
def test_parameters_are_as_many_as_in_the_reference(
    config: CromaConfig, encoders: int, everything: int, parts: tuple[int, ...]
) -> None:
    with torch.device("meta"):
        model = CromaPretraining(config)
    croma = model.croma
    assert count(croma) == encoders
    assert (count(croma.radar_encoder), count(croma.optical_encoder)) == parts[:2]
    assert (count(croma.joint_encoder), count(croma.radar_head), count(croma.optical_head)) == (*parts[2:], parts[3])
    # The reference counts its fixed position table of 15 x 15 patches; ours is computed for any grid.
    assert count(model) + 225 * config.decoder_width == everything


def test_tiny_is_as_agreed() -> None:
    assert CONFIGS["tiny"] is TINY
    assert (TINY.width, TINY.optical_depth, TINY.radar_depth, TINY.joint_depth) == (192, 4, 2, 2)
    assert (TINY.heads, TINY.decoder_width, TINY.patch_px) == (8, 128, 8)


@pytest.mark.parametrize("field", ["width", "heads", "optical_depth", "patch_px"])
def test_sizes_below_one_are_refused(field: str) -> None:
    values = {"width": 32, "optical_depth": 1, "radar_depth": 1, "joint_depth": 1, "heads": 4, "patch_px": 8}
    with pytest.raises(ValueError, match=f"{field} must be at least 1, got 0"):
        CromaConfig(**(values | {field: 0}))


def test_a_width_that_heads_cannot_share_is_refused() -> None:
    with pytest.raises(ValueError, match="width=30 is not a multiple of heads=4"):
        CromaConfig(width=30, optical_depth=1, radar_depth=1, joint_depth=1, heads=4)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (8, 40), (48, 16)])
def test_any_multiple_of_the_patch_is_encoded(height: int, width: int) -> None:
    croma = Croma(SMALL)
    outputs = croma(*images(height, width))
    patches = (height // 8) * (width // 8)
    for name in ("radar", "optical", "joint"):
        assert outputs[f"{name}_encodings"].shape == (3, patches, 32)
        assert outputs[f"{name}_embedding"].shape == (3, 32)


def test_each_sensor_alone_gives_what_it_gives_with_the_other() -> None:
    croma = random_model(Croma(SMALL))
    optical, radar = images()
    both = croma(optical, radar)
    for alone in (croma(optical, None), croma(None, radar)):
        assert len(alone) == 2
        for name, value in alone.items():
            torch.testing.assert_close(value, both[name])
    names = [f"{sensor}_{kind}" for sensor in ("radar", "optical", "joint") for kind in ("encodings", "embedding")]
    assert list(both) == names


def test_layers_and_feature_maps_come_on_request() -> None:
    croma = random_model(Croma(SMALL))
    optical, radar = images(16, 40)
    plain = croma(optical, radar)
    wanted = {"optical": (0, 1), "radar": (0,), "joint": (1,)}
    outputs = croma(optical, radar, layers=wanted, maps=True)
    for name, value in plain.items():
        assert torch.equal(outputs[name], value)
    tapped = {f"{name}_layer_{index}" for name, indices in wanted.items() for index in indices}
    maps = {f"{name}_map" for name in ("radar", "optical", "joint", *tapped)}
    assert outputs.keys() == plain.keys() | tapped | maps
    # The last layer is what the final norm turns into the encodings.
    for name in ("optical", "joint"):
        encoder = getattr(croma, f"{name}_encoder")
        torch.testing.assert_close(encoder.norm(outputs[f"{name}_layer_1"]), outputs[f"{name}_encodings"])
    patches = patchify(optical, 8)
    first = croma.optical_encoder.layers[0](croma.optical_encoder.patch_embedding(patches), grid_bias(2, 5, 4, CPU))
    torch.testing.assert_close(outputs["optical_layer_0"], first)
    for name in tapped | {"radar", "optical", "joint"}:
        tokens = outputs[name if name in tapped else f"{name}_encodings"]
        assert outputs[f"{name}_map"].shape == (3, 32, 2, 5)
        for row, column in itertools.product(range(2), range(5)):
            assert torch.equal(outputs[f"{name}_map"][:, :, row, column], tokens[:, row * 5 + column])


@pytest.mark.parametrize(
    ("layers", "named"),
    [
        ({"optical": (2,)}, r"layers \[2\] of optical: it has 2, counted from 0"),
        ({"radar": (-1,)}, r"layers \[-1\] of radar: it has 1"),
        ({"sar": (0,)}, "layers of 'sar': the encoders are radar, optical, joint"),
    ],
)
def test_layers_that_are_not_there_are_refused(layers: dict[str, tuple[int, ...]], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Croma(SMALL)(*images(), layers=layers)


@pytest.mark.parametrize(
    ("optical", "radar", "named"),
    [
        (None, None, "neither"),
        ((1, 13, 32, 32), None, r"optical must be \(B, 12, H, W\), got \(1, 13, 32, 32\)"),
        (None, (2, 32, 32), "radar must be"),
        ((1, 12, 32, 32), (1, 2, 32, 24), "of one size"),
        ((1, 12, 32, 32), (3, 2, 32, 32), "as many, .*: got 1 of 32 x 32 px on cpu and 3 of 32 x 32 px"),
        (None, (1, 2, 30, 32), "30 x 32 px is not a multiple of the patch, 8 px"),
    ],
)
def test_images_that_do_not_fit_are_refused(
    optical: tuple[int, ...] | None, radar: tuple[int, ...] | None, named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        Croma(SMALL)(*(None if shape is None else torch.zeros(shape) for shape in (optical, radar)))


def test_patches_run_row_by_row_with_the_channel_slowest() -> None:
    image = torch.arange(2 * 3 * 16 * 24.0).view(2, 3, 16, 24)
    patches = patchify(image, 8)
    for sample, row, column, channel, y, x in itertools.product(range(2), range(2), range(3), range(3), (0, 7), (0, 5)):
        expected = image[sample, channel, row * 8 + y, column * 8 + x]
        assert patches[sample, row * 3 + column, channel * 64 + y * 8 + x] == expected
    kept = torch.tensor([[5, 0], [1, 2]])
    assert torch.equal(patchify(image, 8, kept), torch.stack([patches[0, kept[0]], patches[1, kept[1]]]))


def test_the_bias_is_minus_slope_times_distance() -> None:
    rows, columns, heads = 3, 5, 4
    bias = grid_bias(rows, columns, heads, CPU)
    assert bias.shape == (1, heads, 15, 15)
    assert bias.dtype == torch.float32
    for head, i, j in itertools.product(range(heads), range(15), range(15)):
        distance = math.hypot(i // columns - j // columns, i % columns - j % columns)
        assert bias[0, head, i, j] == pytest.approx(-(2 ** (-8 * (head + 1) / heads)) * distance, rel=1e-6, abs=1e-9)


def test_slopes_follow_the_alibi_rule_for_any_number_of_heads() -> None:
    assert slopes(16)[:3] == pytest.approx((2**-0.5, 0.5, 2**-1.5))
    assert slopes(16)[-1] == 2**-8
    assert slopes(12) == pytest.approx((*slopes(8), *slopes(16)[0::2][:4]))
    for heads in range(1, 33):
        assert len(slopes(heads)) == len(set(slopes(heads))) == heads


def test_the_bias_of_kept_patches_is_gathered_from_the_whole() -> None:
    whole = grid_bias(4, 6, 8, CPU)[0]
    positions = patch_positions(4, 6)
    queries, keys = masks_of(24)
    bias = distance_bias(positions[queries], positions[keys], 8)
    for sample in range(3):
        torch.testing.assert_close(bias[sample], whole[:, queries[sample]][:, :, keys[sample]])


def test_the_bias_is_cached_and_usable_for_training_after_inference() -> None:
    croma = Croma(SMALL)
    with torch.inference_mode():
        croma(*images(40, 56))
    assert grid_bias(5, 7, 4, CPU) is grid_bias(5, 7, 4, CPU)
    sum(output.sum() for output in croma(*images(40, 56)).values()).backward()
    assert not any("bias" in name and "alibi" in name for name in croma.state_dict())
    assert len(list(croma.buffers())) == 0


def test_attention_is_softmax_of_scaled_products_plus_bias() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, 12, generator=generator) for n in (5, 7, 7))
    bias = torch.randn(2, 3, 5, 7, generator=generator)
    for given_bias in (bias, None):
        expected = torch.empty(2, 5, 12)
        for sample, head in itertools.product(range(2), range(3)):
            part = slice(4 * head, 4 * head + 4)
            logits = q[sample, :, part] @ k[sample, :, part].T / 2
            logits = logits if given_bias is None else logits + given_bias[sample, head]
            expected[sample, :, part] = logits.softmax(dim=-1) @ v[sample, :, part]
        torch.testing.assert_close(attend(q, k, v, given_bias, 3), expected)


class Outputs(TorchDispatchMode):
    """Sizes of all tensors that operations make, and the names of the operations."""

    def __init__(self) -> None:
        super().__init__()
        self.most_numbers = 0
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for each in made if isinstance(made, tuple | list) else (made,):
            if isinstance(each, torch.Tensor) and not func.is_view:
                self.most_numbers = max(self.most_numbers, each.numel())
        self.names.add(func.name())
        return made


def test_scores_of_all_samples_and_heads_never_lie_in_memory() -> None:
    croma, samples, patches = Croma(SMALL), 5, 24 * 24
    with Outputs() as seen:
        outputs = croma(*images(192, 192, samples=samples))
        outputs["joint_embedding"].sum().backward()
    assert any("flash" in name and "backward" in name for name in seen.names), seen.names
    bias = SMALL.heads * patches**2
    assert bias <= seen.most_numbers < samples * bias


def test_an_embedding_sees_distances_between_patches_not_their_places() -> None:
    croma = random_model(Croma(SMALL))
    # Every row of patches is alike inside, so that mirroring and shuffling move whole patches.
    sensors = [image[..., :1].expand(-1, -1, 32, 8) for image in images()]
    striped = [image * torch.arange(1.0, 5.0).repeat_interleave(8)[:, None] / 4 for image in sensors]
    shuffled = [image.unflatten(2, (4, 8))[:, :, [2, 0, 3, 1]].flatten(2, 3) for image in striped]
    mirrored = [image.unflatten(2, (4, 8)).flip(2).flatten(2, 3) for image in striped]
    for name in ("radar_embedding", "optical_embedding", "joint_embedding"):
        original = croma(*striped)[name]
        torch.testing.assert_close(croma(*mirrored)[name], original, atol=2e-5, rtol=1e-4)
        assert (croma(*shuffled)[name] - original).abs().max() > 1e-3


def test_with_all_patches_visible_pretraining_encodes_as_inference_does() -> None:
    model = random_model(CromaPretraining(SMALL))
    optical, radar = images()
    everything = torch.arange(16).expand(3, -1)
    seen: list[torch.Tensor] = []
    handle = model.croma.joint_encoder.register_forward_hook(lambda _module, _inputs, output: seen.append(output[0]))
    model(optical, radar, Masks(everything, everything))
    handle.remove()
    torch.testing.assert_close(seen[0], model.croma(optical, radar)["joint_encodings"], atol=1e-5, rtol=1e-5)


def test_hidden_pixels_do_not_reach_the_encoders() -> None:
    model = random_model(CromaPretraining(SMALL))
    optical, radar = images()
    masks = masks_of(16)
    changed = []
    for image, kept in ((optical, masks.optical), (radar, masks.radar)):
        visible = torch.zeros(3, 16).scatter(1, kept, 1.0).view(3, 1, 4, 4)
        visible = visible.repeat_interleave(8, -1).repeat_interleave(8, -2)
        changed.append(torch.where(visible.bool(), image, image.square()))
    before, after = model(optical, radar, masks), model(*changed, masks)
    torch.testing.assert_close(before.contrastive, after.contrastive)
    assert (before.total - after.total).abs() > 1e-3
    assert (before.contrastive - model(*(image.square() for image in (optical, radar)), masks).contrastive).abs() > 1e-4


def test_the_order_of_kept_patches_does_not_matter() -> None:
    model = random_model(CromaPretraining(SMALL))
    masks = masks_of(16)
    shuffled = Masks(masks.optical.flip(1), masks.radar.roll(1, 1))
    for one, other in zip(model(*images(), masks), model(*images(), shuffled), strict=True):
        torch.testing.assert_close(one, other)


def test_the_reference_cross_bias_is_a_named_option_that_differs_only_under_unequal_masks() -> None:
    ours = random_model(CromaPretraining(SMALL))
    theirs = CromaPretraining(SMALL, Objective(joint_self_bias="cross")).eval()
    theirs.load_state_dict(ours.state_dict())
    masks = masks_of(16)
    shared = Masks(masks.radar, masks.radar)
    assert torch.equal(ours(*images(), shared).total, theirs(*images(), shared).total)
    unequal = (ours(*images(), masks).total - theirs(*images(), masks).total).abs()
    assert unequal > 1e-6


def test_decoder_positions_are_those_of_masked_autoencoders() -> None:
    rows, columns, width = 3, 4, 16
    table = sine_cosine_positions(rows, columns, width, CPU)
    for row, column in itertools.product(range(rows), range(columns)):
        expected = []
        for coordinate in (column, row):
            angles = [coordinate / 10000 ** (index / (width / 4)) for index in range(width // 4)]
            expected += [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
        np.testing.assert_allclose(table[row * columns + column].numpy(), expected, atol=1e-6)


@settings(max_examples=10)
@given(rows=st.integers(1, 5), columns=st.integers(2, 5), fraction=st.floats(0.2, 0.8))
def test_pretraining_takes_any_grid_and_reaches_every_parameter(rows: int, columns: int, fraction: float) -> None:
    num_patches = rows * columns
    if not 0 < int(num_patches * (1 - fraction)) < num_patches:
        return
    model = random_model(CromaPretraining(SMALL)).train()
    losses = model(*images(8 * rows, 8 * columns), masks_of(num_patches, fraction=fraction))
    losses.total.backward()
    expected = losses.contrastive + losses.reconstruction_optical + losses.reconstruction_radar
    torch.testing.assert_close(losses.total, expected)
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)


def test_initial_weights_follow_the_reference() -> None:
    torch.manual_seed(0)
    model = CromaPretraining(TINY)
    assert model.logit_scale.item() == pytest.approx(math.log(1 / 0.07))
    assert model.decoder.mask_token.std().item() == pytest.approx(0.02, rel=0.3)
    weight = model.croma.optical_encoder.layers[0].feed_forward.contract.weight
    assert weight.abs().max().item() == pytest.approx(768**-0.5, rel=0.01)
    assert weight.std().item() == pytest.approx(768**-0.5 / 3**0.5, rel=0.02)
    assert (model.croma.radar_encoder.norm.weight == 1).all()


def test_one_seed_gives_one_model() -> None:
    first, second = (torch.manual_seed(7) and CromaPretraining(SMALL) for _ in range(2))
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("size", [(32, 32), (120, 248)])
def test_bfloat16_stays_close_to_float32(size: tuple[int, int]) -> None:
    croma = random_model(Croma(SMALL))
    exact = croma(*images(*size))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = croma(*images(*size))
    whole = copy.deepcopy(croma).bfloat16()(*(image.bfloat16() for image in images(*size)))
    for name, value in exact.items():
        assert value.dtype == torch.float32
        for rounded in (autocast, whole):
            # bfloat16 has 8 bits: half a per cent on each of some dozens of roundings.
            error = (rounded[name].float() - value).square().mean().sqrt() / value.square().mean().sqrt()
            assert error < 0.03, name
            assert functional.cosine_similarity(rounded[name].float(), value, dim=-1).min() > 0.995
    assert grid_bias(size[0] // 8, size[1] // 8, 4, CPU).dtype == torch.float32


def test_bfloat16_losses_are_float32_and_close() -> None:
    model = random_model(CromaPretraining(SMALL))
    masks = masks_of(16)
    exact = model(*images(), masks)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model(*images(), masks)
    for one, other in zip(exact[:4], rounded[:4], strict=True):
        assert other.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.02)


def test_pretraining_runs_whole_in_bfloat16() -> None:
    model = random_model(CromaPretraining(SMALL))
    masks = masks_of(16)
    exact = model(*images(), masks)
    rounded = copy.deepcopy(model).bfloat16()
    losses = rounded(*(image.bfloat16() for image in images()), masks)
    for one, other in zip(exact[:4], losses[:4], strict=True):
        assert other.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.02)
    losses.total.backward()
    assert all(each.grad is not None and each.grad.isfinite().all() for each in rounded.parameters())


def test_the_sum_that_layers_add_to_stays_float32_under_autocast() -> None:
    model = random_model(CromaPretraining(SMALL))
    seen = []
    for name, module in model.named_modules():
        if name.rpartition(".")[0].endswith("layers"):
            module.register_forward_hook(lambda _module, inputs, output: seen.extend((inputs[0].dtype, output.dtype)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(*images(), masks_of(16))
    depths = SMALL.optical_depth + SMALL.radar_depth + SMALL.joint_depth + SMALL.decoder_depth
    assert seen == [torch.float32] * (2 * depths)


class Rounded(TorchDispatchMode):
    """How many tensors of a shape were rounded to bfloat16."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if "_to_copy" in func.name() and made.dtype == torch.bfloat16:
            self.count += tuple(made.shape[1:]) == self.shape
        return made


@pytest.mark.parametrize("joint_self_bias", ["radar", "cross"])
def test_each_distance_bias_is_computed_and_rounded_once(monkeypatch: pytest.MonkeyPatch, joint_self_bias: Any) -> None:
    computed = []

    def counted(queries: torch.Tensor, keys: torch.Tensor, heads: int) -> torch.Tensor:
        computed.append((queries, keys))
        return distance_bias(queries, keys, heads)

    monkeypatch.setattr("model.croma.distance_bias", counted)
    model = CromaPretraining(SMALL, Objective(joint_self_bias=joint_self_bias))
    masks = masks_of(64)
    with torch.autocast("cpu", dtype=torch.bfloat16), Rounded((4, 16, 16)) as seen:
        model(*images(64, 64), masks)
    # Radar to radar, optical to optical, radar to optical.
    assert (len(computed), seen.count) == (3, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16), Rounded((4, 64, 64)) as seen:
        model.croma(*images(64, 64))
    assert seen.count == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_no_graph_breaks_and_one_graph_for_any_size() -> None:
    torch.compiler.reset()
    croma = random_model(Croma(SMALL))
    for sensors in ((True, True), (True, False), (False, True)):
        given = [image if there else None for image, there in zip(images(), sensors, strict=True)]
        assert torch._dynamo.explain(croma)(*given).graph_break_count == 0
    model = CromaPretraining(SMALL)
    assert torch._dynamo.explain(model)(*images(), masks_of(16)).graph_break_count == 0
    gradient = ContrastiveGradient(torch.rand(3, 32), torch.rand(3, 32), torch.tensor(0.5))
    model.croma.recompute_activations()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        explained = torch._dynamo.explain(model)(*images(), masks_of(16), gradient)
    assert explained.graph_break_count == 0

    torch.compiler.reset()
    counter = CompileCounter()
    compiled = torch.compile(croma, backend=counter, fullgraph=True, dynamic=True)
    for size in ((32, 40), (48, 24), (120, 168)):
        for name, value in croma(*images(*size)).items():
            torch.testing.assert_close(compiled(*images(*size))[name], value)
    assert counter.frame_count == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_pretraining_gives_the_same_losses_and_gradients() -> None:
    torch.compiler.reset()
    model = random_model(CromaPretraining(SMALL)).train()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    results = []
    for each in (model, compiled):
        model.zero_grad()
        losses = each(*images(), masks_of(16))
        losses.total.backward()
        results.append([*losses, *(parameter.grad for parameter in model.parameters())])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


class Places(TorchDispatchMode):
    """Devices of all tensors that operations make."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.found |= {each.device.type for each in tree_leaves(made) if isinstance(each, torch.Tensor)}
        return made


def test_distances_and_positions_are_made_on_the_device_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    # As in a compiled program, which sees no caches; on a GPU that need not be there.
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    gpu = torch.device("cuda")
    with FakeTensorMode(), Places() as places:
        at = patch_positions(3, 5, gpu)
        made = [distance_bias(at, at, 12), grid_bias(3, 5, 12, gpu), sine_cosine_positions(3, 5, 16, gpu)]
    assert [tuple(each.shape) for each in made] == [(12, 15, 15), (1, 12, 15, 15), (15, 16)]
    assert places.found == {"cuda"}


def wide_image(size_px: int) -> dict[str, Any]:
    """One layer each, and as many heads as base."""
    config = CromaConfig(width=64, optical_depth=1, radar_depth=1, joint_depth=1, heads=16)
    croma, inputs = Croma(config).eval(), images(size_px, size_px, samples=2)
    return {"ours": torch.inference_mode()(lambda: croma(*inputs))}


@pytest.mark.slow
def test_504_px_need_little_more_memory_than_their_bias() -> None:
    bias_bytes = 16 * (63 * 63) ** 2 * 4
    # Scores of both samples would be twice that again.
    assert bias_bytes < peak_bytes(wide_image, (504,)) < 1.4 * bias_bytes


def test_recomputed_activations_change_memory_and_nothing_else() -> None:
    def step(recompute: bool) -> tuple[int, list[torch.Tensor]]:
        torch.manual_seed(0)
        model = CromaPretraining(dataclasses.replace(SMALL, optical_depth=8)).train()
        model.croma.recompute_activations(recompute)
        held = 0

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal held
            held += 0 if isinstance(tensor, torch.nn.Parameter) else tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            losses = model(*images(64, 64), masks_of(64))
        losses.total.backward()
        return held, [*losses, *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)]

    (plain_held, plain), (held, recomputed) = step(False), step(True)
    assert held < 0.6 * plain_held
    for one, other in zip(plain, recomputed, strict=True):
        assert torch.equal(one, other)


def test_the_first_layer_starts_as_if_its_inputs_were_standardised() -> None:
    torch.manual_seed(0)
    encoder = Croma(TINY).optical_encoder
    standard = torch.randn(512, 12 * 64)
    tokens = encoder.patch_embedding(0.5 + 0.25 * standard)
    # Uniform weights within 1/sqrt(inputs) on standardised inputs: mean 0 and variance 1/3 over samples.
    assert tokens.mean(dim=0).abs().max() < 0.15
    torch.testing.assert_close(tokens.var(dim=0).mean(), torch.tensor(1 / 3), rtol=0.1, atol=0.0)
