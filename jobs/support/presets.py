"""Named settings of `pretrain`: what is given on the command line or in the YAML file goes before them.

Of the paper's recipe little is written down where it can be read. Each preset says which of its values are known, and
by whom; the rest is a choice, to be made better by whoever measures.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal

from jobs.support.settings import merge

PresetName = Literal["croma-base-ssl4eo", "croma-large-ssl4eo", "tiny-demo"]

CROMA_BASE_SSL4EO: Final[Mapping[str, Any]] = {
    "size": "base",
    "epochs": 300,
    "crop_px": 120,
    "scale_augmentation": True,
    "augment": True,
    "mask_fraction": 0.75,
    "shared_masks": False,
    "global_batch": 7200,
    "num_workers": 8,
    "learning_rate": 1.125e-4,
    "warmup_fraction": 0.05,
    "weight_decay": 0.01,
    "precision": "auto",
    "normalisation": "ssl4eo-s12",
    "objective": {"contrastive_weight": 1.0, "reconstruction_weight": 1.0, "target_statistics": "shared"},
}
"""CROMA base on SSL4EO-S12, as far as the paper's recipe is known.

Known from the released code: the architecture; independent masks of three quarters of the patches; both objectives; the
statistics that targets are scaled by; bands scaled by mean and 2 deviations. Known from summaries of the paper, not
from its text: 8 A100 of 80 GB, bfloat16, AdamW, and squares of 60 to 180 px brought to 120.

From memory, and not confirmed: 300 epochs, batches of 7200, weights 1 : 1, a weight decay of 0.01, a warm-up over 5 %
and a cosine. The learning rate is the weakest of them: 4e-6 per 256 samples, which makes 1.125e-4 of a batch of 7200.

Nowhere to be found, so ours: the betas of AdamW (0.9 and 0.95), gradients cut at norm 1, one crop of a chip per epoch,
and flips and turns always drawn where the paper may have drawn them half of the time. Two slips of the released code
are put right: `objective.joint_self_bias=cross` and `objective.gathered_gradient=false` bring them back. Whether this
reaches the released weights, nobody has tried."""

CROMA_LARGE_SSL4EO: Final[Mapping[str, Any]] = {
    **CROMA_BASE_SSL4EO,
    "size": "large",
    "epochs": 600,
    "micro_batch": 300,
}
"""CROMA large on SSL4EO-S12: as `CROMA_BASE_SSL4EO`, for 600 epochs.

The number of epochs is from memory, and not confirmed. That batch and learning rate are those of base is an assumption:
nothing says so, and nothing says otherwise. 900 samples at a time would take more than the 80 GB of a GPU by our
count, so `micro_batch` has 300 of them in memory, which changes nothing but rounding."""

TINY_DEMO: Final[Mapping[str, Any]] = {
    "size": "tiny",
    "epochs": 14,
    "crop_px": 72,
    "crops_per_chip": 6,
    "global_batch": 64,
    "num_workers": 2,
    "learning_rate": 5e-4,
    "normalisation": "store",
}
"""A network of 5 million parameters on a small store, for two CPUs and a few minutes: what `demo` trains.

Nothing of it is the paper's. Crops of 72 px are a third of the work of 120 px, and the model reads larger images
all the same; six of each chip make a small store last."""

PRESETS: Final[Mapping[PresetName, Mapping[str, Any]]] = {
    "croma-base-ssl4eo": CROMA_BASE_SSL4EO,
    "croma-large-ssl4eo": CROMA_LARGE_SSL4EO,
    "tiny-demo": TINY_DEMO,
}


def with_preset(given: Mapping[str, Any]) -> dict[str, Any]:
    """What was given, over the preset that it names; without one, or with an unknown one, as it is."""
    preset = next((values for name, values in PRESETS.items() if name == given.get("preset")), {})
    return merge(preset, given)
