"""The objectives, on one process and over ranks."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import distributed, multiprocessing
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from model.croma import REFERENCE_OBJECTIVE, CromaConfig, CromaPretraining, Objective
from model.losses import Projections, info_nce, num_ranks, patch_targets, reconstruction_loss
from model.masking import draw_masks
from model.randomness import sample_keys
from tests import plain_croma

SMALL = CromaConfig(width=16, optical_depth=1, radar_depth=1, joint_depth=1, heads=2, decoder_width=16, decoder_heads=2)
BATCH = 8


def test_info_nce_is_the_mean_of_both_directions() -> None:
    generator = torch.Generator().manual_seed(0)
    optical, radar = (torch.randn(5, 8, generator=generator) for _ in range(2))
    loss, match_fraction = info_nce(Projections(optical, radar), torch.tensor(1.5))
    a, b = (each.numpy() / np.linalg.norm(each.numpy(), axis=1, keepdims=True) for each in (optical, radar))
    similarity = math.exp(1.5) * a @ b.T
    expected, matches = 0.0, 0
    for scores in (similarity, similarity.T):
        for row in range(5):
            expected += (np.log(np.exp(scores[row]).sum()) - scores[row, row]) / 10
            matches += int(scores[row].argmax() == row)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert match_fraction.item() == pytest.approx(matches / 10)


def test_equal_features_cost_the_logarithm_of_the_batch_and_matching_ones_nothing() -> None:
    loss, _ = info_nce(Projections(torch.ones(4, 3), torch.ones(4, 3)), torch.tensor(2.0))
    assert loss.item() == pytest.approx(math.log(4))
    loss, match_fraction = info_nce(Projections(torch.eye(4), torch.eye(4)), torch.tensor(4.0))
    assert loss.item() < 1e-6
    assert match_fraction == 1


def test_no_process_group_means_one_rank() -> None:
    assert num_ranks() == 1


def test_detached_gathering_keeps_the_value_and_halves_the_gradient() -> None:
    optical = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    radar = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    scale = torch.tensor(1.0)
    gradients = []
    values = []
    for gathered_gradient in (True, False):
        loss, _ = info_nce(Projections(optical, radar), scale, gathered_gradient=gathered_gradient)
        values.append(loss)
        gradients.append(torch.autograd.grad(loss, optical)[0])
    assert torch.equal(*values)
    assert gradients[1].norm() < 0.8 * gradients[0].norm()
    assert functional.cosine_similarity(gradients[0].flatten(), gradients[1].flatten(), dim=0) > 0.5


def test_targets_share_one_mean_and_unbiased_variance_over_both_sensors() -> None:
    patches = torch.rand(2, 3, 14 * 4, generator=torch.Generator().manual_seed(0))
    expected = (patches.numpy() - patches.numpy().mean(-1, keepdims=True)) / np.sqrt(
        patches.numpy().var(-1, ddof=1, keepdims=True) + 1e-6
    )
    np.testing.assert_allclose(patch_targets(patches).numpy(), expected, atol=1e-5)
    assert patch_targets(torch.full((1, 1, 56), 0.5)).abs().max() == 0


def test_reconstruction_counts_hidden_patches_only() -> None:
    generator = torch.Generator().manual_seed(0)
    predicted, target = (torch.randn(2, 5, 7, generator=generator) for _ in range(2))
    hidden = torch.tensor([[True, False, True, False, False], [False, False, False, False, True]])
    errors = (predicted - target).square()[hidden]
    assert reconstruction_loss(predicted, target, hidden).item() == pytest.approx(errors.mean().item(), rel=1e-6)


def test_targets_of_each_sensor_alone_are_a_named_option() -> None:
    model = CromaPretraining(SMALL, Objective(target_statistics="per_sensor"))
    optical, radar, keys = whole_batch()
    masks = draw_masks(keys, 16)
    seen = []
    handle = model.decoder.register_forward_hook(lambda _module, _inputs, output: seen.append(output.detach()))
    losses = model(optical, radar, masks)
    handle.remove()
    for image, part, mask, loss in (
        (optical, slice(12 * 64), masks.optical, losses.reconstruction_optical),
        (radar, slice(12 * 64, None), masks.radar, losses.reconstruction_radar),
    ):
        patches = image.numpy().reshape(BATCH, -1, 4, 8, 4, 8).transpose(0, 2, 4, 1, 3, 5).reshape(BATCH, 16, -1)
        centred = patches - patches.mean(-1, keepdims=True)
        target = centred / np.sqrt(patches.var(-1, ddof=1, keepdims=True) + 1e-6)
        error = ((seen[0][..., part].numpy() - target) ** 2).mean(-1)
        hidden = np.ones((BATCH, 16), dtype=bool)
        np.put_along_axis(hidden, mask.numpy(), False, axis=1)
        assert loss.item() == pytest.approx(error[hidden].mean(), rel=1e-5)


def test_the_reference_objective_gives_its_losses_and_gradients() -> None:
    """Of the step as the reference's code reads; `plain_croma` stands in for that code."""
    torch.manual_seed(0)
    config = CromaConfig(
        width=32, optical_depth=2, radar_depth=1, joint_depth=2, heads=4, decoder_width=32, decoder_heads=2
    )
    model = CromaPretraining(config, REFERENCE_OBJECTIVE)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    optical, radar, keys = whole_batch()
    masks = draw_masks(keys, 16)
    results = []
    for values in (plain_croma.losses(model, optical, radar, masks), model(optical, radar, masks)[1:4]):
        model.zero_grad()
        sum(values).backward()
        results.append([*values, *(parameter.grad for parameter in model.parameters())])
    for (name, _), one, other in zip(
        [("contrastive", None), ("optical", None), ("radar", None), *model.named_parameters()], *results, strict=True
    ):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("absent", ["contrastive", "reconstruction"])
def test_what_has_no_weight_is_neither_computed_nor_trained(absent: str) -> None:
    model = CromaPretraining(SMALL, Objective(**{f"{absent}_weight": 0.0}))
    both = CromaPretraining(SMALL)
    both.load_state_dict(model.state_dict())
    ran = []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda _module, _inputs, _output, name=name: ran.append(name))
    optical, radar, keys = whole_batch()
    losses = model(optical, radar, draw_masks(keys, 16))
    idle = {
        "contrastive": ("croma.optical_head", "croma.radar_head", "optical_projection", "radar_projection"),
        "reconstruction": ("croma.joint_encoder", "decoder"),
    }[absent]
    assert not set(ran) & set(idle)
    losses.total.backward()
    expected = both(optical, radar, draw_masks(keys, 16))
    if absent == "contrastive":
        assert losses.contrastive == 0
        torch.testing.assert_close(losses.total, expected.reconstruction_optical + expected.reconstruction_radar)
    else:
        assert losses.reconstruction_optical == losses.reconstruction_radar == 0
        torch.testing.assert_close(losses.total, expected.contrastive)
    for name, parameter in model.named_parameters():
        spared = name.startswith(idle) or (absent == "contrastive" and name == "logit_scale")
        assert (parameter.grad is None) == spared == (not parameter.requires_grad), name


def test_an_objective_without_weight_is_refused() -> None:
    for weights in ((0.0, 0.0), (-1.0, 1.0)):
        with pytest.raises(ValueError, match="weights must be 0 or more"):
            Objective(contrastive_weight=weights[0], reconstruction_weight=weights[1])


def whole_batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    rows = torch.arange(BATCH)
    return (
        torch.rand(BATCH, 12, 32, 32, generator=generator),
        torch.rand(BATCH, 2, 32, 32, generator=generator),
        sample_keys(rows, torch.zeros_like(rows), seed=1, epoch=0),
    )


def new_model(objective: Objective | None = None) -> CromaPretraining:
    torch.manual_seed(0)
    return CromaPretraining(SMALL, objective)


def losses_and_gradients(model: torch.nn.Module, part: slice) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Losses (5,) and gradients by name of one part of the batch."""
    optical, radar, keys = (each[part] for each in whole_batch())
    losses = model(optical, radar, draw_masks(keys, 16))
    losses.total.backward()
    named = getattr(model, "module", model).named_parameters()
    gradients = {name: each.grad for name, each in named if each.grad is not None}
    return torch.stack([each.detach() for each in losses]), gradients


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_loss_over_ranks_compiles_without_a_graph_break(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = new_model()
    optical, radar, keys = whole_batch()
    # One process that takes the way of many.
    monkeypatch.setattr("model.losses.num_ranks", lambda: 2)
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        explained = torch._dynamo.explain(model)(optical, radar, draw_masks(keys, 16))
    finally:
        distributed.destroy_process_group()
        torch.compiler.reset()
    assert explained.graph_break_count == 0


ALONE = [Objective(reconstruction_weight=0.0), Objective(contrastive_weight=0.0)]
OBJECTIVES = {2: [Objective(), Objective(gathered_gradient=False), *ALONE], 4: [Objective()]}
"""By number of ranks."""


def run_rank(rank: int, num_ranks: int, folder: str) -> None:
    """What one process of several does; results go to files."""
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=num_ranks)
    share = BATCH // num_ranks
    part = slice(rank * share, (rank + 1) * share)
    results = [losses_and_gradients(DistributedDataParallel(new_model(each)), part) for each in OBJECTIVES[num_ranks]]
    torch.save(results, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ranks_learn_what_one_process_with_the_whole_batch_learns(tmp_path: Path, num_ranks: int) -> None:
    multiprocessing.spawn(run_rank, (num_ranks, str(tmp_path)), nprocs=num_ranks)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(num_ranks)]
    for objective, *of_ranks in zip(OBJECTIVES[num_ranks], *ranks, strict=True):
        losses, gradients = losses_and_gradients(new_model(objective), slice(None))
        torch.testing.assert_close(torch.stack([each for each, _ in of_ranks]).mean(dim=0), losses)
        for _, of_rank in of_ranks:
            assert of_rank.keys() == gradients.keys()
            for name, gradient in gradients.items():
                torch.testing.assert_close(of_rank[name], gradient, atol=1e-6, rtol=1e-4, msg=name)
