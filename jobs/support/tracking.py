"""A run in MLflow: what it was asked, its losses, rates and scores over samples seen, and at the end its report.

Everything is taken from the run's directory, and how far it was taken stands in the MLflow run itself: what a server
that was away has missed is caught up, a resumed run goes on in the same MLflow run, and no step is there twice. One
process writes at a time: the driver before the training and after it, in between Ray Train's controller.

MLflow sends telemetry and repeats requests for minutes; here it does neither, unless its variables say so.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

from pydantic import Field
from ray.train import Checkpoint, UserCallback

from jobs.support.checkpoint_scores import flat_scores, read_scores
from jobs.support.job import JobError
from jobs.support.model_files import ITEM_FILE
from jobs.support.probing import TRAINED, UNTRAINED
from jobs.support.settings import Group
from jobs.support.training_report import REPORT_FILE, REQUEST_FILE
from pipeline.objects import Objects
from pipeline.redaction import describe, redact_values

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

log = logging.getLogger(__name__)

TRACKING_FILE: Final = "mlflow.json"
"""In the run's directory: the id of its MLflow run."""

DATABASE: Final = "mlflow.db"
EXPERIMENT: Final = "twinlook"

_LOGGED: Final = "twinlook.samples_logged"
"""Tag of the MLflow run; written with the losses, in one request."""

_POINTS: Final = 50
"""At most so many per report; steps between are averaged."""

_AT_ONCE: Final = 500
"""Metrics in a request; a server takes 1000."""

_PARAMS_AT_ONCE: Final = 100
_EVERY_S: Final = 30.0
_SHARE: Final = 50
"""At most a fiftieth of the controller's time goes into tracking, also where a server lets it wait."""

_QUIETLY: Final = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    # It prints the address of a run that ended, with the password that may be in it.
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    # It would tell of every table of a new database.
    "MLFLOW_LOGGING_LEVEL": "WARNING",
}


class Mlflow(Group):
    """Tracking in MLflow; needs the extra `tracking`, see README."""

    enabled: bool | None = None
    """Whether the run is tracked; unset: if tracking_uri or experiment is set."""

    tracking_uri: str | None = None
    """Of a server (http://…) or a database (sqlite:///…); unset: the file mlflow.db in out. Credentials of a server
    belong into MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD or MLFLOW_TRACKING_TOKEN."""

    experiment: str | None = Field(default=None, min_length=1)
    """Name of the experiment; made if it is not there. Unset: twinlook."""

    @property
    def wanted(self) -> bool:
        """Whether the run is tracked."""
        return bool(self.tracking_uri or self.experiment) if self.enabled is None else self.enabled


class Tracker(UserCallback):
    """Brings MLflow up to date with a run's directory; in Ray Train's controller now and then.

    Whatever MLflow does, the run goes on.
    """

    def __init__(self, out: Objects, *, tracking_uri: str, experiment: str) -> None:
        self.out = out
        self._uri = tracking_uri
        self._experiment = experiment
        self._next_s = 0.0

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Checkpoint | None) -> None:
        """Catch up, unless that was done a moment ago."""
        start = time.monotonic()
        if start < self._next_s:
            return
        self.catch_up()
        end = time.monotonic()
        self._next_s = end + max(_EVERY_S, _SHARE * (end - start))

    def catch_up(self, *, status: str = "RUNNING", artifacts: bool = False) -> bool:
        """Log what the run's directory holds and MLflow does not; says on the log if it could not.

        Args:
            status: Of the MLflow run from now on.
            artifacts: Whether the report and the model's Item are copied, too.

        Returns:
            Whether MLflow has everything.
        """
        try:
            client = _client(self._uri)
            run = _run(client, self.out, self._experiment, uri=self._uri)
            ended = status != "RUNNING"
            if not ended and run.info.status != status:
                client.update_run(run.info.run_id, status=status)
            _log_losses(client, run, self.out)
            _log_scores(client, run.info.run_id, self.out)
            if artifacts:
                _log_artifacts(client, run.info.run_id, self.out)
            if ended and run.info.status != status:
                client.set_terminated(run.info.run_id, status)
        # What a client of some server or database raises is without end, and none of it may end a training.
        except Exception as error:  # noqa: BLE001
            log.warning("MLflow was not brought up to date: %s", describe(error))
            return False
        return True


@contextmanager
def tracked(tracker: Tracker | None) -> Iterator[None]:
    """A run from its start to its end, however it ends."""
    if tracker is None:
        yield
        return
    tracker.catch_up()
    try:
        yield
    except BaseException as error:
        tracker.catch_up(status="KILLED" if isinstance(error, KeyboardInterrupt | SystemExit) else "FAILED")
        raise
    if not tracker.catch_up(status="FINISHED", artifacts=True):
        log.warning("run the same command again to bring MLflow up to date")


def tracker_of(settings: Mlflow, out: str) -> Tracker | None:
    """What tracks a run in this directory, if it is to be tracked.

    Raises:
        JobError: MLflow is not installed, or there is nowhere to write to.
    """
    if not settings.wanted:
        return None
    if importlib.util.find_spec("mlflow") is None:
        raise JobError("mlflow.enabled needs MLflow's client: pip install 'twinlook[tracking]'")
    objects, uri = Objects.at(out), settings.tracking_uri
    if uri is None:
        if "://" in objects.url:
            raise JobError(f"no database file can be in {objects.url}: give mlflow.tracking_uri")
        uri = f"sqlite:///{quote(f'{objects.url}/{DATABASE}')}"
    return Tracker(objects, tracking_uri=uri, experiment=settings.experiment or EXPERIMENT)


def points_of(
    steps: Sequence[Mapping[str, float]], *, global_batch: int, at_most: int = _POINTS
) -> list[dict[str, float]]:
    """Averages over runs of consecutive steps, about equally many in each; samples and epoch are those of the last.

    samples_per_s, over all workers, and waited_fraction are added.
    """
    count = min(at_most, len(steps))
    points = []
    for number in range(count):
        part = steps[number * len(steps) // count : (number + 1) * len(steps) // count]
        # What only some steps have, such as the health of representations, is averaged over those.
        names = dict.fromkeys(name for step in part for name in step if name not in ("samples", "epoch"))
        found = {name: [step[name] for step in part if name in step] for name in names}
        point = {name: sum(values) / len(values) for name, values in found.items()}
        took_s = max(point["waited_s"] + point["step_s"], 1e-9)
        rates = {"samples_per_s": global_batch / took_s, "waited_fraction": point["waited_s"] / took_s}
        points.append({**point, **rates, "samples": part[-1]["samples"], "epoch": part[-1]["epoch"]})
    return points


def flat_params(request: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """A request as `group.field` -> text."""
    found: dict[str, str] = {}
    for name, value in request.items():
        key = f"{prefix}{name}"
        found |= flat_params(value, f"{key}.") if isinstance(value, Mapping) else {key: str(value)}
    return found


def _client(uri: str) -> MlflowClient:
    for name, value in _QUIETLY.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient  # optional, and takes seconds

    return MlflowClient(tracking_uri=uri)


def _run(client: MlflowClient, out: Objects, experiment: str, *, uri: str) -> Run:
    """The MLflow run of a directory; begun, with the request as its parameters, where there is none."""
    from mlflow.entities import Param

    try:
        run_id: str = out.get_json(TRACKING_FILE)["run_id"]
    except FileNotFoundError:
        found = client.get_experiment_by_name(experiment)
        # A server decides itself where artifacts go; beside a database file they would go to where the job was started.
        local = {"artifact_location": Path(out.url, "mlflow").as_uri()} if uri.startswith("sqlite:") else {}
        experiment_id = found.experiment_id if found else client.create_experiment(experiment, **local)
        tags = {"twinlook.out": out.url}
        run_id = client.create_run(experiment_id, run_name=out.url.rpartition("/")[2], tags=tags).info.run_id
        out.put_json(TRACKING_FILE, {"run_id": run_id, "experiment": experiment})
    run = client.get_run(run_id)
    params = flat_params(redact_values(out.get_json(REQUEST_FILE)))
    missing = [Param(name, value) for name, value in params.items() if name not in run.data.params]
    for start in range(0, len(missing), _PARAMS_AT_ONCE):
        client.log_batch(run_id, params=missing[start : start + _PARAMS_AT_ONCE])
    return run


def _log_losses(client: MlflowClient, run: Run, out: Objects) -> None:
    """Every file of losses after what was logged, each in as few requests as can be."""
    from mlflow.entities import Metric, RunTag

    logged = int(run.data.tags.get(_LOGGED, 0))
    global_batch: int = out.get_json(REQUEST_FILE)["global_batch"]
    for path in out.list("losses"):
        last = int(Path(path).stem)
        if last <= logged:
            continue
        content = out.get_json(path)
        steps = [step for step in content["steps"] if step["samples"] > logged]
        written_ms = int(1000 * content["written_s"])
        metrics: list[Metric] = []
        for point in points_of(steps, global_batch=global_batch):
            seen = int(point.pop("samples"))
            metrics += [Metric(name, value, written_ms, seen) for name, value in point.items()]
            if len(metrics) >= _AT_ONCE or seen == last:
                client.log_batch(run.info.run_id, metrics=metrics, tags=[RunTag(_LOGGED, str(seen))])
                metrics = []


def _log_scores(client: MlflowClient, run_id: str, out: Objects) -> None:
    """Scores of every checkpoint that has some and is not there yet, a request each."""
    from mlflow.entities import Metric

    files = [(each, flat_scores(each, source=TRAINED if each["samples"] else UNTRAINED)) for each in read_scores(out)]
    files = [(each, found) for each, found in files if found]
    if not files:
        return
    some = next(iter(files[0][1]))
    there = {metric.step for metric in client.get_metric_history(run_id, some)}
    for scores, found in files:
        if (seen := scores["samples"]) not in there:
            written_ms = int(1000 * scores["written_s"])
            client.log_batch(run_id, metrics=[Metric(name, value, written_ms, seen) for name, value in found.items()])


def _log_artifacts(client: MlflowClient, run_id: str, out: Objects) -> None:
    """The report and what describes the model, hashes included; the weights stay where they are."""
    with tempfile.TemporaryDirectory(prefix="twinlook-") as folder:
        for name in (REPORT_FILE, ITEM_FILE):
            if out.exists(name):
                Path(folder, name).write_bytes(out.get(name))
                client.log_artifact(run_id, str(Path(folder, name)))
