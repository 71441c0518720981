"""Steps without finite losses: their chips are written down where they were, and counted everywhere."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from jobs.support.nonfinite import FOLDER, RunEndedError, SkippedSteps, explain, forget_after, places_of
from model.training import NonFiniteError
from pipeline.grid import Cell
from pipeline.objects import Objects
from pipeline.sources import Source
from pipeline.versions import Version
from tests.sample_chips import LAYOUT, make_chip
from tests.small_stores import Candidate, write_store

CELLS = [Cell(epsg=32633, column=100 + n, row=2000, side_m=240) for n in range(11)]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    url = str(tmp_path_factory.mktemp("stores") / "chips.zarr")
    write_store(url, LAYOUT, [Candidate(cell=cell) for cell in CELLS], make_chip, request={})
    return url


def batch_of(rows: list[int]) -> dict[str, torch.Tensor]:
    other = torch.arange(len(rows), dtype=torch.int32)
    return {"row": torch.tensor(rows), "k": other, "epoch": other + 7}


def error(*, here: bool) -> NonFiniteError:
    return NonFiniteError("not finite on 1 of 2 ranks", here=here, values={"loss": math.nan, "temperature": 0.07})


def plan(store: str, out: Path, **more: object) -> dict[str, object]:
    sources = (Source(url=store, version=1),)
    return {"out": str(out), "sources": sources, "on_nonfinite": "skip", "max_skipped_steps": 2, **more}


def test_rows_have_the_cells_of_the_plan(store: str) -> None:
    rows = np.array([10, 0, 7, 0])
    assert places_of(Version(store, 1), rows)[7] == (CELLS[7].id, "pair-7")
    assert {0, 7, 10} <= places_of(Version(store, 1), rows).keys()
    assert places_of(Version(store, 1), np.array([999])) == {}


def test_every_rank_counts_and_those_at_fault_write_until_the_bound_ends_the_run_on_all(
    store: str, tmp_path: Path
) -> None:
    out = Objects.at(tmp_path)
    ranks = [SkippedSteps(plan(store, tmp_path), rank=rank) for rank in range(2)]
    for samples in (4, 8):
        for steps in ranks:
            steps.step(error(here=steps.rank == 1), batch_of([3, 9]), samples)
    for steps in ranks:
        with pytest.raises(RunEndedError) as ended:
            steps.step(error(here=steps.rank == 1), batch_of([3, 9]), 12)
        assert (ended.value.samples, ended.value.skipped) == (12, 3)
    assert out.list(FOLDER) == [f"{FOLDER}/{samples:012d}-00001.json" for samples in (4, 8, 12)]
    record = out.get_json(f"{FOLDER}/000000000008-00001.json")
    assert record["values"] == {"loss": "nan", "temperature": "0.07"}
    assert record["chips"] == [
        {"store": store, "row": 3, "k": 0, "epoch": 7, "cell": CELLS[3].id, "pair": "pair-3"},
        {"store": store, "row": 9, "k": 1, "epoch": 8, "cell": CELLS[9].id, "pair": "pair-9"},
    ]
    said = explain(out, samples=12, skipped=3)
    assert "on rank 1 in the step to 12 samples, after 2 that were skipped" in said
    assert f"2 chips: row 3 (cell {CELLS[3].id}), row 9 (cell {CELLS[9].id})" in said

    forget_after(out, 8)
    assert out.list(FOLDER) == [f"{FOLDER}/{samples:012d}-00001.json" for samples in (4, 8)]


def test_a_run_that_is_to_end_ends_with_the_first(store: str, tmp_path: Path) -> None:
    steps = SkippedSteps(plan(store, tmp_path, on_nonfinite="end"), rank=0)
    with pytest.raises(RunEndedError):
        steps.step(error(here=True), batch_of([0]), 4)


def test_what_was_skipped_before_a_resume_counts(store: str, tmp_path: Path) -> None:
    with pytest.raises(RunEndedError):
        SkippedSteps(plan(store, tmp_path), rank=0, count=2).step(error(here=False), batch_of([0]), 4)
