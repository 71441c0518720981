"""A moving average of the weights, measured in samples, so that it is the same for any batch size."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from model.croma import CromaPretraining
from model.normalisation import Normalisation
from model.pretrained import load_weights, restore_pretraining

DECAY_SAMPLES: Final = 1024
"""A decay is what is left of the past after so many samples."""

RAMP: Final = 0.1
"""The average reaches back over no more than this share of the samples seen: else a short run's would be the weights
that it began with (as in the training of GANs and diffusion models, Karras et al. 2022)."""

_PREFIX: Final = "module."


def kept_over(num_samples: int, *, decay: float, seen: int) -> float:
    """What the average keeps of its past over some samples, from 0 to 1.

    Args:
        num_samples: Since the average was last brought up to date.
        decay: What is kept over `DECAY_SAMPLES`, between 0 and 1.
        seen: Samples of the run, these included.
    """
    reach = min(DECAY_SAMPLES / -math.log(decay), RAMP * seen)
    return math.exp(-num_samples / reach)


class WeightAverage:
    """The average beside a model in training; on the model's device."""

    def __init__(self, model: CromaPretraining, *, decay: float) -> None:
        """Begin with the model's weights; `decay` as in `kept_over`."""
        self.decay = decay
        self._averaged = AveragedModel(model)

    @property
    def model(self) -> CromaPretraining:
        """With the averaged weights; not to be trained."""
        model = self._averaged.module
        assert isinstance(model, CromaPretraining), type(model)
        return model

    def update(self, model: CromaPretraining, *, num_samples: int, seen: int) -> None:
        """Take in the weights after a step.

        Args:
            model: Unwrapped.
            num_samples: Of the step, over all ranks.
            seen: Of the run, these included.
        """
        kept = kept_over(num_samples, decay=self.decay, seen=seen)
        self._averaged.multi_avg_fn = get_ema_multi_avg_fn(kept)  # type: ignore[no-untyped-call]
        self._averaged.update_parameters(model)

    def state_dict(self) -> dict[str, Tensor]:
        """For a checkpoint."""
        return self._averaged.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a checkpoint."""
        self._averaged.load_state_dict(state)


def restore_averaged(checkpoint: Mapping[str, Any]) -> tuple[CromaPretraining, Normalisation]:
    """The pretraining model of a checkpoint with its averaged weights, or the last step's where there is no average.

    The average is looked for in the training state, under ``average``.
    """
    model, normalisation = restore_pretraining(checkpoint)
    if average := checkpoint["training"].get("average"):
        weights = {key.removeprefix(_PREFIX): value for key, value in average.items() if key.startswith(_PREFIX)}
        load_weights(model, weights)
    return model, normalisation
