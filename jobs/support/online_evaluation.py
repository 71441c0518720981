"""Evaluation beside pretraining: what is asked, what is refused, and the windows that all checkpoints are asked.

The windows are chosen once, before training starts, and kept in the run's directory, so that every checkpoint of a run
answers the same questions, also after a resume.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Final, Literal

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field
from ray.train import ValidationConfig, ValidationTaskConfig

from jobs.support.checkpoint_scores import ScoringPlan, as_keywords, evaluate_checkpoint
from jobs.support.evaluation import check_labelled, check_windows, choose_windows, count_windows, group_side
from jobs.support.evaluation_report import say_counts
from jobs.support.job import JobError
from jobs.support.settings import Group
from jobs.support.windows import KEPT
from pipeline.canonical import differences
from pipeline.chip_table import WRITTEN
from pipeline.fed_chips import Feed
from pipeline.layout import Layout
from pipeline.objects import Objects
from pipeline.quiet import quiet_data
from pipeline.redaction import redact
from pipeline.store import Store
from pipeline.versions import Version, latest_sealed

log = logging.getLogger(__name__)

REQUEST_FILE: Final = "evaluation/request.json"
WINDOWS_FILE: Final = "evaluation/windows.parquet"

_SCORED: Final = ("val", "test")
"""Splits whose windows probes are scored on, or chosen by; those of `train` only teach the probes what is where."""


class OnlineEvaluation(Group):
    """Probes on a labelled store while training goes on; fields as `evaluate` has them, whose report says more."""

    store: str | None = None
    """Chip store with labels and with train, val and test splits, val and test of places that the training chips do not
    show: another store, or the one that is trained on; unset: no evaluation."""

    version: int | None = Field(default=None, ge=1)
    """Sealed version of that store; unset: the newest."""

    label: str = "worldcover"
    """Which of the store's labels is asked for."""

    every_samples: int | None = Field(default=None, ge=1)
    """Samples between evaluations, each of the next checkpoint and always of the last; unset: of every checkpoint.
    They run one after another, and a checkpoint is kept until its turn."""

    window_px: int = Field(default=120, ge=24, multiple_of=24)
    """Side of the windows that chips are cut into, each a sample, pixels of 10 m."""

    min_majority: float = Field(default=0.5, ge=0, le=1)
    """Windows whose most frequent class covers less than this fraction are left out."""

    rare_classes: Literal["refuse", "leave-out"] = "leave-out"
    """What to do with classes that val or test windows show, but no train window."""

    max_windows: int = Field(default=1000, ge=10)
    """Windows of each split, drawn at random."""

    neighbours: int = Field(default=20, ge=1)
    """Windows of train that vote on the class of a test window, the nearest ones."""

    batch_size: int = Field(default=64, ge=1)
    """Windows encoded at a time."""

    num_cpus: float = Field(default=1.0, gt=0)
    """CPUs that are set aside for an evaluation while it runs."""

    num_gpus: float = Field(default=0.0, ge=0)
    """GPUs that are set aside for it; those of the training workers are taken. 0: it runs on CPUs, in float32."""

    timeout_s: float = Field(default=3600.0, gt=0)
    """After so long, waiting for CPUs and GPUs included, an evaluation is given up, seconds."""


def check_evaluation(settings: OnlineEvaluation, feed: Feed) -> Version | None:
    """The version that is evaluated on, if any.

    Raises:
        JobError: It is not sealed, lacks the label, or shows places that are trained on.
    """
    if settings.store is None:
        return None
    version = Version(settings.store, settings.version) if settings.version else latest_sealed(settings.store)
    if version.state != "sealed":
        raise JobError(f"evaluate.store: {version.name} is {version.state}: build it to the end first")
    store = Store.open(settings.store)
    check_labelled(store, settings.label)
    trained = Store.open(feed.url)
    for name in ("radar_product", "optical_level"):
        if (theirs := getattr(store.layout, name)) != (ours := getattr(trained.layout, name)):
            raise JobError(f"evaluate.store has {name} {theirs}, the store that is trained on {ours}")
    _check_held_out(version, store.layout, feed)
    return version


def prepare_evaluation(
    settings: OnlineEvaluation, version: Version | None, out: Objects, *, seed: int
) -> ValidationConfig | None:
    """Choose the windows, unless that was done, and say how checkpoints are evaluated on them.

    Needs Ray.

    Args:
        settings: Of the job.
        version: From `check_evaluation`.
        out: Directory of the run.
        seed: Of the run.

    Returns:
        What a trainer takes, if anything is to be evaluated.

    Raises:
        JobError: The windows cannot be probed, or the run holds scores of another evaluation.
    """
    if version is None:
        return None
    store = Store.open(version.url)
    request = _request(settings, version, seed=seed)
    if out.exists(REQUEST_FILE):
        if changed := list(differences(out.get_json(REQUEST_FILE), request)):
            raise JobError(
                f"{out.url} holds scores of another evaluation: {'; '.join(changed)}; ask as before, or remove its "
                "folders evaluation and scores"
            )
    else:
        out.put_table(WINDOWS_FILE, _kept_windows(settings, store, version, seed=seed))
        # Last: where it is, the windows are there.
        out.put_json(REQUEST_FILE, request)
    plan = ScoringPlan(
        out=out.url,
        store=store.url,
        windows=WINDOWS_FILE,
        window_px=settings.window_px,
        group_cells=group_side(version),
        neighbours=settings.neighbours,
        batch_size=settings.batch_size,
        seed=seed,
        num_cpus=settings.num_cpus,
        num_gpus=settings.num_gpus,
        timeout_s=settings.timeout_s,
    )
    return ValidationConfig(
        evaluate_checkpoint,
        task_config=ValidationTaskConfig(fn_kwargs=as_keywords(plan)),
        # It only waits; where its node is lost, it waits elsewhere.
        ray_remote_kwargs={"num_cpus": 0, "max_retries": -1},
    )


def _kept_windows(settings: OnlineEvaluation, store: Store, version: Version, *, seed: int) -> pa.Table:
    quiet_data()
    how = ("label", "window_px", "min_majority", "max_windows", "rare_classes")
    windows = choose_windows(store, version, **{name: getattr(settings, name) for name in how}, seed=seed)
    classes = store.layout.labels[settings.label]
    say_counts(count_windows(windows, classes), windows)
    check_windows(windows, version, classes)
    return windows.filter(pc.equal(windows["status"], KEPT))


def _check_held_out(version: Version, layout: Layout, feed: Feed) -> None:
    """Refuse to score on places that are trained on: a model would be praised for what it has seen."""
    columns = ["cell", "split", "status"]
    scored = _cells(version.all_chips(columns=columns), _SCORED)
    for source in feed.sources:
        if Store.open(source.url).layout.side_px != layout.side_px:
            # Cells of other sides have other names.
            continue
        learnt = Version(source.url, source.version)
        both = scored.filter(pc.is_in(scored, value_set=_cells(learnt.all_chips(columns=columns), [feed.split])))
        if len(both):
            raise JobError(
                f"evaluate.store: {len(both)} cells of {version.name} that are val or test, {both[0].as_py()} among "
                f"them, are trained on in {learnt.name} (split {feed.split}): evaluate on places that training never "
                "sees"
            )


def _cells(chips: pa.Table, splits: Sequence[str]) -> pa.Array:
    """Cells, each once, of the written chips of some splits; chips off the grid have none."""
    wanted = pc.is_in(chips["split"], value_set=pa.array(splits, pa.string()))
    chosen = chips.filter(pc.and_(pc.equal(chips["status"], WRITTEN), wanted))
    return chosen["cell"].drop_null().unique()


def _request(settings: OnlineEvaluation, version: Version, *, seed: int) -> dict[str, Any]:
    """What decides the scores of a checkpoint."""
    how = {"every_samples", "batch_size", "num_cpus", "num_gpus", "timeout_s", "store", "version"}
    chosen = settings.model_dump(mode="json", exclude=how)
    return {**chosen, "store": redact(version.url), "version": version.number, "seed": seed}
