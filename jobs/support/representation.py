"""The health of representations over all ranks, measured at every report on the batch just trained on."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from jobs.support.ranks import of_all_ranks
from model.croma import CromaPretraining
from model.health import Representations, health, representations
from model.losses import Projections, num_ranks
from model.normalisation import Normalisation
from model.training import StepSettings

_MOST = 1024
"""Samples of all ranks; the rank of so many says enough of a width of as many, and a report takes no longer for it."""


def measured_health(
    model: CromaPretraining, batch: Mapping[str, Tensor], *, normalisation: Normalisation, settings: StepSettings
) -> dict[str, float]:
    """What `model.health.health` says, the same on every rank; every rank takes part.

    Args:
        model: Unwrapped.
        batch: This rank's samples.
        normalisation: Means and σ per band.
        settings: The same for all steps of a run.
    """
    wanted = min(max(1, _MOST // num_ranks()), settings.micro_batch or _MOST)
    part = {name: values[:wanted] for name, values in batch.items()}
    own = representations(model, part, normalisation=normalisation, settings=settings)
    projections = None if own.projections is None else Projections(*map(of_all_ranks, own.projections))
    found = Representations(of_all_ranks(own.optical), of_all_ranks(own.radar), projections)
    if not all(each.isfinite().all() for each in (found.optical, found.radar, *(projections or ()))):
        return {}
    return health(found)


def said_health(values: Mapping[str, float]) -> list[str]:
    """In words for the log; empty where nothing was measured."""
    if "rank_optical" not in values:
        return []
    said = [f"rank {values['rank_optical']:.1f} optical and {values['rank_radar']:.1f} radar"]
    if "alignment" in values:
        said.append(
            f"alignment {values['alignment']:.2f}, uniformity {values['uniformity_optical']:.2f} and "
            f"{values['uniformity_radar']:.2f}"
        )
    return said
