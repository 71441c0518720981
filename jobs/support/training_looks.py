"""What a run shows of its model while it trains: held-out chips completed, and found again by the other sensor.

Made by rank 0, which has the model at hand, of chips that are the same from first to last; kept as looks.json in the
run's directory, from which the report is written.
"""

from __future__ import annotations

import base64
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from jobs.support.chip_pictures import Picture, jpeg, radar_colour, true_colour
from model.croma import CromaPretraining
from model.masking import draw_masks
from model.normalisation import Normalisation
from model.preprocessing import CENTI_DB, NATIVE_GROUPS, prepare
from model.randomness import sample_keys
from model.reconstruction import completed, hidden_pixels
from model.training import NonFiniteError
from pipeline.layout import MODEL_ARRAYS
from pipeline.objects import Objects
from pipeline.store import Store
from pipeline.versions import Version
from pipeline.whole_chips import whole_batches

log = logging.getLogger(__name__)

LOOKS_FILE: Final = "looks.json"
_MOST_CHIPS: Final = 48
_COMPLETED: Final = 4
_QUERIES: Final = 4
_NEAREST: Final = 5
_AT_A_TIME: Final = 12
_EVERY_S: Final = 60.0
_SHARE: Final = 50
"""At most a fiftieth of a run's time goes into looking."""

_GREY: Final = 214


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """Chips to look at."""

    split: str
    """Which they are of: val, else test, else train."""

    rows: NDArray[np.int64]
    batch: dict[str, NDArray[Any]]
    """Their middle, as the feed would send it."""


class Looks:
    """Writes looks.json now and then; for one rank alone."""

    def __init__(self, plan: Mapping[str, Any]) -> None:
        """`plan` as `looks_plan` makes it."""
        self.plan = plan
        self._held_out: HeldOut | None = None
        self._next_s = 0.0

    def write(self, model: CromaPretraining, normalisation: Normalisation, samples: int, *, last: bool = False) -> None:
        """Look at the model, unless that was done a moment ago.

        A store that is away is said and borne, and so are weights that give no finite numbers any more.

        Args:
            model: Unwrapped; neither its weights nor any generator's state change.
            normalisation: Means and σ per band.
            samples: Seen so far.
            last: Look in any case.
        """
        start = time.monotonic()
        if start < self._next_s and not last:
            return
        try:
            if self._held_out is None:
                self._held_out = held_out(self.plan)
            looks = look(model, normalisation, self._held_out, self.plan)
            Objects.at(self.plan["out"]).put_json(LOOKS_FILE, {"samples": samples, **looks})
        except (OSError, NonFiniteError) as error:
            log.warning("no pictures for the report at %d samples: %s", samples, error)
        end = time.monotonic()
        self._next_s = end + max(_EVERY_S, _SHARE * (end - start))


def held_out(plan: Mapping[str, Any]) -> HeldOut:
    """Some chips that are not trained on, evenly from first to last; of the training ones where there are no others."""
    store, version = Store.open(plan["store"]), Version(plan["store"], plan["version"])
    of_splits = ((split, version.written_rows(split=split)) for split in ("val", "test", "train"))
    split, rows = next((split, rows) for split, rows in of_splits if rows.size)
    chosen = rows[np.unique(np.linspace(0, len(rows) - 1, _MOST_CHIPS).round().astype(int))]
    step_px, crop_px = store.layout.window_step_px, plan["crop_px"]
    corner_px = (store.layout.side_px - crop_px) // 2 // step_px * step_px
    (chips,) = whole_batches(store, chosen, arrays=MODEL_ARRAYS, batch_size=len(chosen))
    specs = store.layout.arrays()
    batch = {name: specs[name].window(chips[name], corner_px, corner_px, crop_px).copy() for name in MODEL_ARRAYS}
    return HeldOut(split=split, rows=chosen, batch=batch)


@torch.no_grad()
def look(
    model: CromaPretraining, normalisation: Normalisation, chips: HeldOut, plan: Mapping[str, Any]
) -> dict[str, Any]:
    """Pictures and numbers as JSON values.

    Args:
        model: Unwrapped.
        normalisation: Means and σ per band.
        chips: From `held_out`.
        plan: With seed, mask_fraction and shared_masks, from which what is hidden follows.

    Returns:
        split, rows; pictures (row -> sensor -> JPEG); completed (row, and per sensor what was seen and what was made
        of it); neighbours (sensor asked with -> row, nearest of the other sensor with its similarity); matched (sensor
        -> share of the chips whose own partner is the nearest). What is not trained for is empty.
    """
    device = model.logit_scale.device
    batch = {name: torch.from_numpy(pixels).to(device) for name, pixels in chips.batch.items()}
    optical, radar = prepare(batch, normalisation)
    assert optical is not None
    assert radar is not None
    found: dict[str, Any] = {"split": chips.split, "rows": chips.rows.tolist(), "completed": [], "neighbours": {}}
    shown: set[int] = set()
    if model.objective.reconstruction_weight:
        at = _evenly(len(chips.rows), _COMPLETED)
        found["completed"] = _completed(model, normalisation, optical[at], radar[at], chips.rows[at], plan)
        shown.update(at)
    if model.objective.contrastive_weight:
        similar = _similarities(model, optical, radar)
        ways = {"radar": similar.T, "optical": similar}
        found["neighbours"] = {sensor: _nearest(scores, chips.rows, shown) for sensor, scores in ways.items()}
        partner = np.arange(len(similar))
        found["matched"] = {sensor: float((each.argmax(axis=1) == partner).mean()) for sensor, each in ways.items()}
    found["pictures"] = {
        str(chips.rows[at]): {
            name: _jpeg(each) for name, each in _pictures(optical[at], radar[at], normalisation).items()
        }
        for at in sorted(shown)
    }
    return found


def _completed(
    model: CromaPretraining,
    normalisation: Normalisation,
    optical: Tensor,
    radar: Tensor,
    rows: NDArray[np.int64],
    plan: Mapping[str, Any],
) -> list[dict[str, Any]]:
    patch_px = model.config.patch_px
    grid = optical.shape[-2] // patch_px, optical.shape[-1] // patch_px
    row = torch.from_numpy(rows).to(optical.device)
    keys = sample_keys(row, torch.zeros_like(row), seed=plan["seed"], epoch=0)
    masks = draw_masks(keys, grid[0] * grid[1], mask_fraction=plan["mask_fraction"], shared=plan["shared_masks"])
    made = completed(model, optical, radar, masks)
    hidden = {name: hidden_pixels(kept, patch_px, *grid).cpu().numpy() for name, kept in masks._asdict().items()}
    found = []
    for at in range(len(rows)):
        truth = _pictures(optical[at], radar[at], normalisation)
        guess = _pictures(made[0][at], made[1][at], normalisation)
        sensors = {}
        for name in ("optical", "radar"):
            seen = np.where(hidden[name][at][..., None], np.uint8(_GREY), truth[name])
            sensors[name] = {"seen": _jpeg(seen), "made": _jpeg(guess[name])}
        found.append({"row": int(rows[at]), **sensors})
    return found


def _similarities(model: CromaPretraining, optical: Tensor, radar: Tensor) -> NDArray[np.float32]:
    """(optical chip, radar chip) cosines of what the contrastive loss compares, of whole crops.

    Raises:
        NonFiniteError: Some are no numbers.
    """
    parts = []
    for start in range(0, len(optical), _AT_A_TIME):
        encoded = model.croma(optical[start : start + _AT_A_TIME], None)
        other = model.croma(None, radar[start : start + _AT_A_TIME])
        parts.append(
            (
                model.optical_projection(encoded["optical_embedding"]),
                model.radar_projection(other["radar_embedding"]),
            )
        )
    of_optical, of_radar = (functional.normalize(torch.cat(each).float(), dim=-1) for each in zip(*parts, strict=True))
    similar: NDArray[np.float32] = (of_optical @ of_radar.T).cpu().numpy()
    if not np.isfinite(similar).all():
        raise NonFiniteError("similarities between sensors are not finite")
    return similar


def _nearest(scores: NDArray[np.float32], rows: NDArray[np.int64], shown: set[int]) -> list[dict[str, Any]]:
    """For some chips the nearest of the other sensor, best first; all their places go into `shown`."""
    found = []
    for at in _evenly(len(rows), _QUERIES):
        order = np.argsort(-scores[at], kind="stable").tolist()
        best, place = order[:_NEAREST], order.index(at) + 1
        shown.update([at, *best])
        nearest = [{"row": int(rows[each]), "similarity": round(float(scores[at, each]), 3)} for each in best]
        found.append({"row": int(rows[at]), "place_of_partner": place, "nearest": nearest})
    return found


def _pictures(optical: Tensor, radar: Tensor, normalisation: Normalisation) -> dict[str, Picture]:
    """Model input, (12, H, W) and (2, H, W), in colours that a person knows."""
    pixels = {}
    for name, image, scaling in (("optical", optical, normalisation.optical), ("radar", radar, normalisation.radar)):
        factor, offset = scaling.affine(image.device)
        pixels[name] = ((image.clamp(0, 1) - offset) / factor).cpu().numpy()
    at = [normalisation.optical.bands.index(band) for band in NATIVE_GROUPS["b10"]]
    b10 = pixels["optical"][at].clip(1, 20_000).astype(np.uint16)
    centi_db = (pixels["radar"] / CENTI_DB).clip(-5000, 5000).astype(np.int16)
    return {"optical": true_colour({"b10": b10}), "radar": radar_colour({"radar": centi_db})}


def _jpeg(picture: Picture) -> str:
    return base64.b64encode(jpeg(picture)).decode()


def _evenly(number: int, wanted: int) -> list[int]:
    found: list[int] = np.unique(np.linspace(0, number - 1, wanted).round().astype(int)).tolist()
    return found
