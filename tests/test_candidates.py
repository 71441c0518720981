"""What an archive offers, before anything is built: whom is asked, for when, and what comes of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from jobs.build_dataset import BuildDataset
from jobs.support.candidates import ask_archive
from jobs.support.cell_choice import Wanted
from jobs.support.region_build import candidates_of
from jobs.support.settings import parse
from pipeline.archives import archive_named, known_archives
from pipeline.catalog import SearchError
from pipeline.splits import SplitRules
from tests.building import words
from tests.stac_proxy import StacProxy

SPLITS = SplitRules(block_cells=16, val_fraction=0.1, test_fraction=0.1, buffer_cells=1, seed=0)
WANTED = Wanted(per_cell="all", owners_only=True, splits=SPLITS)


def offered(stac: str, **more: object) -> set[tuple[str, str]]:
    """(pair, date of its optical look) of every pair."""
    settings = parse(BuildDataset, words(stac, Path("chips.zarr"), **more))
    with candidates_of(settings, WANTED) as (_, candidates):
        looks = candidates.planner.looks()
    return {(row["pair"], f"{row['optical_datetime']:%Y-%m-%d}") for row in looks.to_pylist()}


def test_a_days_pairs_are_those_whose_optical_look_is_of_the_day(simulated_stac: str) -> None:
    whole = offered(simulated_stac)
    assert {day for _, day in whole} >= {"2022-06-12", "2022-07-15"}
    for day in sorted({day for _, day in whole}):
        # On the twelfth of June, the radar came a day later.
        assert offered(simulated_stac, period=day) == {look for look in whole if look[1] == day}


def test_an_archive_without_usable_radar_is_refused_before_anything_is_asked(
    monkeypatch: pytest.MonkeyPatch, simulated_stac: str
) -> None:
    for name in ("earth-search", "earth-search/sentinel-2-c1-l2a"):
        with StacProxy(simulated_stac) as proxy:
            monkeypatch.setitem(known_archives(), name, replace(archive_named(name), stac_url=proxy.url))
            for sampling in ("all", "stratified"):
                asked = {"sampling.method": sampling, "sampling.num_cells": 2}
                settings = parse(BuildDataset, words(name, Path("chips.zarr"), **asked))
                wanted = replace(WANTED, sampling=settings.sampling)
                with pytest.raises(SearchError, match=r"has no Sentinel-1 that can be used: .* slant geometry"):
                    ask_archive(settings, wanted, cache=None)
            assert proxy.asked == []
