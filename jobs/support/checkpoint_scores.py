"""Probes of a checkpoint while training goes on: what Ray Train's validation task of a pretraining run does.

Ray Train starts one task at a time beside the workers, for checkpoints reported with `validation=True`; it keeps those
that wait, and after a lost driver it starts theirs again. But only an exception of the function counts there as a
failed validation: a task whose process or node dies would be a failure of the controller, and with it of the workers.
So the task that it starts (`evaluate_checkpoint`) takes no resources and does nothing but wait for another one
(`_score`), which takes what the settings say, and may die.

Chips are read and encoded within that one task, and not by the pools of `jobs.support.encoder`: those share the CPUs on
which the feed of the training runs.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import ray
import torch
from numpy.typing import NDArray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.train import Checkpoint

from jobs.support.encoder import check_units, encode
from jobs.support.evaluation import CHIPS_PER_BLOCK, OUTPUTS, collect_features, samples_of, score
from jobs.support.initial_weights import INITIAL_FILE, begin_with
from jobs.support.job import log_to_stderr
from jobs.support.probing import TRAINED, UNTRAINED, Features, run_probes
from jobs.support.training_loop import CHECKPOINT_FILE, samples_in
from jobs.support.windows import cut_windows
from model import pretrained
from model.averaging import restore_averaged
from model.croma import Croma, CromaPretraining
from model.normalisation import Normalisation
from pipeline.layout import MODEL_ARRAYS
from pipeline.objects import Objects, concurrently
from pipeline.redaction import describe
from pipeline.store import Store
from pipeline.whole_chips import whole_batches

log = logging.getLogger(__name__)

SCORES: Final = "scores"
"""Folder of a run: a file per evaluated checkpoint, named by the samples seen."""

SHOWN: Final = "balanced_accuracy"
"""The score that stands for all of them in the log and in pictures."""

_RESAMPLES: Final = 200
"""Behind each interval."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoringPlan:
    """What a checkpoint is asked; plain values, which travel to the task."""

    out: str
    """Directory of the run."""

    store: str
    """With labels."""

    windows: str
    """In the run's directory: the table of the windows that are asked for."""

    window_px: int
    group_cells: int
    neighbours: int
    batch_size: int
    seed: int
    """Of the run: that of the weights it began with, and of the resamples."""

    num_cpus: float
    num_gpus: float
    timeout_s: float


def evaluate_checkpoint(checkpoint: Checkpoint, **plan: Any) -> dict[str, Any]:
    """Score a checkpoint in a task of its own; what goes wrong is said and written down in place of the scores.

    Args:
        checkpoint: Of `jobs.support.training_loop`.
        plan: Of `ScoringPlan`.

    Returns:
        Nothing: the scores are in the run's directory.
    """
    what = ScoringPlan(**plan)
    out, samples = Objects.at(what.out), samples_in(Path(checkpoint.path).name)
    log_to_stderr()
    if out.exists(_file(samples)):
        return {}
    task = ray.remote(_score).options(
        num_cpus=what.num_cpus, num_gpus=what.num_gpus, max_retries=1, name="score a checkpoint"
    )
    running = task.remote(checkpoint, what)
    try:
        found = ray.get(running, timeout=what.timeout_s)
    except GetTimeoutError:
        ray.cancel(running, force=True)
        found = {samples: {"error": f"not done within evaluate.timeout_s={what.timeout_s:g}, waiting for "
                           f"{what.num_cpus:g} CPUs and {what.num_gpus:g} GPUs included"}}  # fmt: skip
    except RayError as error:
        cause = error.cause if isinstance(error, RayTaskError) else error
        found = {samples: {"error": describe(cause)}}
    for seen, scores in sorted(found.items()):
        _say(seen, scores)
        out.put_json(_file(seen), {"samples": seen, "written_s": time.time(), **scores})
    return {}


def read_scores(out: Objects) -> list[dict[str, Any]]:
    """What every evaluated checkpoint scored, in order of samples seen; one with `error` could not be evaluated."""
    return concurrently(out.get_json, out.list(SCORES))


def flat_scores(scores: Mapping[str, Any], *, source: str = TRAINED) -> dict[str, float]:
    """`probe/kind/score` -> value, of the results of one source in a file of scores."""
    return {
        f"{row['probe']}/{row['kind']}/{name}": float(value["value"])
        for row in scores.get("scores", [])
        if row["source"] == source
        for name, value in row.items()
        if isinstance(value, Mapping)
    }


def _score(checkpoint: Checkpoint, plan: ScoringPlan) -> dict[int, dict[str, Any]]:
    """Scores by samples seen: of the checkpoint, and once of the weights the run began with, at 0."""
    with checkpoint.as_directory() as folder, (Path(folder) / CHECKPOINT_FILE).open("rb") as file:
        model, normalisation = restore_averaged(pretrained.load(file))
    out, store, gpu = Objects.at(plan.out), Store.open(plan.store), plan.num_gpus > 0
    check_units(store.layout, normalisation)
    kept = out.get_table(plan.windows)
    samples = samples_of(kept, side_px=store.layout.side_px, group_cells=plan.group_cells)
    models = {samples_in(Path(checkpoint.path).name): (TRAINED, model.croma)}
    if not out.exists(_file(0)):
        models[0] = (UNTRAINED, initial_model(model, seed=plan.seed, out=out))
    found = {}
    for seen, (source, croma) in models.items():
        croma = croma.eval().to("cuda" if gpu else "cpu")
        features = embed_windows(store, kept, {source: croma}, normalisation, plan, bfloat16=gpu)
        if seen:
            # They are the same for every model.
            features = [each for each in features if each.source == source]
        results = [result for each in features for result in run_probes(each, samples, k=plan.neighbours)]
        board = score(results, samples, num_resamples=_RESAMPLES, seed=plan.seed)
        found[seen] = {name: board[name] for name in ("scores", "test_groups")}
    return found


def initial_model(model: CromaPretraining, *, seed: int, out: Objects) -> Croma:
    """The encoders that a run with this seed began with, in its directory; no generator's state changes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        initial = CromaPretraining(model.config, model.objective)
    if out.exists(INITIAL_FILE):
        begin_with(initial, out)
    return initial.croma


def embed_windows(
    store: Store,
    kept: pa.Table,
    models: Mapping[str, Croma],
    normalisation: Normalisation,
    plan: ScoringPlan,
    *,
    bfloat16: bool,
) -> list[Features]:
    """What `jobs.support.evaluation.encode_windows` gives, within this process."""
    places = {name: kept[name].to_numpy() for name in ("row", "y_px", "x_px", "window")}
    specs = [*store.layout.arrays_of(MODEL_ARRAYS).values()]

    def batches() -> Iterator[dict[str, NDArray[Any]]]:
        rows = np.unique(places["row"])
        for chips in whole_batches(store, rows, arrays=MODEL_ARRAYS, batch_size=CHIPS_PER_BLOCK):
            cut = cut_windows(chips, windows=places, specs=specs, window_px=plan.window_px)
            for start in range(0, len(cut["window"]), plan.batch_size):
                part = {name: values[start : start + plan.batch_size] for name, values in cut.items()}
                encoded = {
                    name: encode(croma, normalisation, part, bfloat16=bfloat16) for name, croma in models.items()
                }
                yield {
                    **{name: part[name] for name in ("window", "band_statistics")},
                    **{f"{name}/{output}": values[output] for name, values in encoded.items() for output in OUTPUTS},
                }

    return collect_features(batches(), kept, sources=list(models))


def as_keywords(plan: ScoringPlan) -> dict[str, Any]:
    """The plan as JSON values, as Ray Train wants them."""
    return asdict(plan)


def _say(samples: int, scores: Mapping[str, Any]) -> None:
    if "error" in scores:
        log.warning("the checkpoint at %d samples was not evaluated: %s", samples, scores["error"])
        return
    found = flat_scores(scores, source=TRAINED if samples else UNTRAINED)
    text = ", ".join(f"{name.rpartition('/')[0]} {value:.3f}" for name, value in found.items() if name.endswith(SHOWN))
    log.info("%d samples: %s: %s", samples, SHOWN.replace("_", " "), text)


def _file(samples: int) -> str:
    return f"{SCORES}/{samples:012d}.json"
