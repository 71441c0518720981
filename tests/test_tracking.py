"""Runs in MLflow: a real database, filled from a run's directory and read back with MLflow's own client."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow import MlflowClient

from jobs.support.job import JobError
from jobs.support.tracking import Mlflow, Tracker, flat_params, points_of, tracked, tracker_of
from pipeline.objects import Objects

BATCH = 8
REQUEST = {
    "size": "tiny",
    "store": "https://a.example/chips?sig=abcsecret",
    "global_batch": BATCH,
    "objective": {"w": 1},
}


def step(number: int, **more: float) -> dict[str, float]:
    return {"samples": float(BATCH * number), "epoch": 0.0, "waited_s": 1.0, "step_s": 3.0, "loss": 1 / number, **more}


def put_losses(out: Objects, first: int, last: int, **more: float) -> None:
    content = {"steps": [step(number, **more) for number in range(first, last + 1)], "written_s": 1e9 + last}
    out.put_json(f"losses/{BATCH * last:012d}.json", content)


def put_scores(out: Objects, samples: int, value: float, *, source: str = "trained") -> None:
    row = {"source": source, "probe": "knn", "kind": "joint", "accuracy": {"value": value, "low": None, "high": None}}
    other = {"source": "band statistics", "probe": "knn", "kind": "both", "accuracy": {"value": 0.1}}
    out.put_json(f"scores/{samples:012d}.json", {"samples": samples, "written_s": 1e9, "scores": [row, other]})


def history(client: MlflowClient, run_id: str, name: str) -> list[tuple[int, float]]:
    return [(metric.step, metric.value) for metric in client.get_metric_history(run_id, name)]


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of all tests: to make its tables takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture
def out(tmp_path: Path) -> Objects:
    objects = Objects.at(tmp_path / "run")
    objects.put_json("request.json", REQUEST)
    return objects


@given(st.integers(1, 40), st.integers(1, 12))
def test_points_are_averages_of_all_steps_each_in_one(count: int, at_most: int) -> None:
    steps = [step(number) for number in range(1, count + 1)]
    points = points_of(steps, global_batch=BATCH, at_most=at_most)
    assert len(points) == min(count, at_most)
    ends = [0, *(int(point["samples"]) // BATCH for point in points)]
    assert ends[-1] == count
    sizes = [end - start for start, end in pairwise(ends)]
    assert max(sizes) - min(sizes) <= 1
    for point, (start, end) in zip(points, pairwise(ends), strict=True):
        assert point["loss"] == pytest.approx(sum(1 / n for n in range(start + 1, end + 1)) / (end - start))
        assert point["samples_per_s"] == pytest.approx(BATCH / 4)
        assert point["waited_fraction"] == pytest.approx(1 / 4)


def test_a_request_is_parameters_by_dotted_names() -> None:
    assert flat_params({"a": 1, "b": {"c": None, "d": {"e": "x"}}}) == {"a": "1", "b.c": "None", "b.d.e": "x"}


@pytest.mark.slow
def test_a_run_is_brought_up_to_date_without_a_step_twice(database: str, out: Objects) -> None:
    put_losses(out, 1, 3)
    put_scores(out, 0, 0.25, source="untrained")
    assert Tracker(out, tracking_uri=database, experiment="one").catch_up()
    run_id = out.get_json("mlflow.json")["run_id"]
    client = MlflowClient(tracking_uri=database)
    run = client.get_run(run_id)
    assert run.info.status == "RUNNING"
    assert run.data.params["objective.w"] == "1"
    assert "abcsecret" not in str(run.to_dictionary())
    assert history(client, run_id, "loss") == [(8, 1.0), (16, 0.5), (24, pytest.approx(1 / 3))]
    assert history(client, run_id, "knn/joint/accuracy") == [(0, 0.25)]

    # As after a resume: another process, some steps taken again, others new.
    put_losses(out, 3, 5, loss=9.0)
    put_losses(out, 6, 6)
    put_scores(out, 40, 0.75)
    out.put_json("scores/000000000048.json", {"samples": 48, "written_s": 1e9, "error": "the store was away"})
    out.put_json("report.html", {})
    for _ in range(2):
        assert Tracker(out, tracking_uri=database, experiment="one").catch_up(status="FINISHED", artifacts=True)
    assert out.get_json("mlflow.json")["run_id"] == run_id
    assert [seen for seen, _ in history(client, run_id, "loss")] == [8, 16, 24, 32, 40, 48]
    assert history(client, run_id, "loss")[3] == (32, 9.0)
    assert history(client, run_id, "knn/joint/accuracy") == [(0, 0.25), (40, 0.75)]
    assert {metric.timestamp for metric in client.get_metric_history(run_id, "loss")} > {int(1000 * (1e9 + 3))}
    assert client.get_run(run_id).info.status == "FINISHED"
    artifact_names = [artifact.path for artifact in client.list_artifacts(run_id)]
    assert artifact_names == ["report.html"]
    assert [run.info.run_id for run in client.search_runs([client.get_experiment_by_name("one").experiment_id])] == [
        run_id
    ]


def test_many_steps_are_few_points(database: str, out: Objects) -> None:
    put_losses(out, 1, 400)
    Tracker(out, tracking_uri=database, experiment="many").catch_up()
    found = history(MlflowClient(tracking_uri=database), out.get_json("mlflow.json")["run_id"], "loss")
    assert len(found) == 50
    assert found[-1][0] == 400 * BATCH


def test_a_run_ends_in_mlflow_as_it_ended(database: str, out: Objects) -> None:
    tracker, client = Tracker(out, tracking_uri=database, experiment="ends"), MlflowClient(tracking_uri=database)
    for error, status in ((ValueError, "FAILED"), (KeyboardInterrupt, "KILLED"), (None, "FINISHED")):
        with pytest.raises(error) if error else nullcontext(), tracked(tracker):
            assert client.get_run(out.get_json("mlflow.json")["run_id"]).info.status == "RUNNING"
            if error:
                raise error
        assert client.get_run(out.get_json("mlflow.json")["run_id"]).info.status == status
    with tracked(None):
        pass


def test_a_server_that_is_away_is_said_without_its_password_and_borne(
    database: str, out: Objects, caplog: pytest.LogCaptureFixture
) -> None:
    put_losses(out, 1, 2)
    away = Tracker(out, tracking_uri="http://somebody:verysecret@127.0.0.1:9", experiment="away")
    with caplog.at_level(logging.DEBUG):
        away.after_report(None, [], None)
        with tracked(away):
            pass
    assert "MLflow was not brought up to date" in caplog.text
    assert "run the same command again" in caplog.text
    assert "127.0.0.1" in caplog.text
    assert "verysecret" not in caplog.text
    assert not out.exists("mlflow.json")
    # It is back, as a database here: everything is caught up.
    Tracker(out, tracking_uri=database, experiment="away").after_report(None, [], None)
    found = history(MlflowClient(tracking_uri=database), out.get_json("mlflow.json")["run_id"], "loss")
    assert [seen for seen, _ in found] == [8, 16]


def test_the_controller_does_not_wait_for_mlflow_at_every_report(
    out: Objects, caplog: pytest.LogCaptureFixture
) -> None:
    away = Tracker(out, tracking_uri="http://127.0.0.1:9", experiment="away")
    away.after_report(None, [], None)
    caplog.clear()
    away.after_report(None, [], None)
    assert "MLflow" not in caplog.text


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, False),
        ({"enabled": True}, True),
        ({"experiment": "a"}, True),
        ({"tracking_uri": "http://a.example"}, True),
        ({"experiment": "a", "enabled": False}, False),
    ],
)
def test_a_run_is_tracked_where_that_is_asked_for(settings: dict[str, Any], expected: bool, tmp_path: Path) -> None:
    assert (tracker_of(Mlflow(**settings), str(tmp_path / "run")) is not None) is expected
    assert not (tmp_path / "run").exists()


def test_an_object_store_holds_no_database_file() -> None:
    with pytest.raises(JobError, match=r"give mlflow.tracking_uri"):
        tracker_of(Mlflow(enabled=True), "gs://bucket/run")
