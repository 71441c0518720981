"""Several stores as one: rows unique and led back, only what fits together, only what meets the conditions."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from pipeline.chip_filter import ChipFilter, choose, region_hash
from pipeline.crops import cut_batches
from pipeline.epochs import crop_windows
from pipeline.fed_chips import MODEL_COLUMNS, FedChips, Feed
from pipeline.grid import Cell
from pipeline.layout import Layout
from pipeline.mixture import parts_by_weight
from pipeline.regions import parse_region
from pipeline.sources import Source, Sources, choose_all
from pipeline.store import Store, StoreError
from pipeline.versions import Version
from tests.sample_chips import LAYOUT, make_chip
from tests.small_stores import Candidate, write_store

OTHER = replace(LAYOUT, shard_chips=6, codec="none", labels={})


def write(url: Path, layout: Layout, num_chips: int, first: int) -> Source:
    """Chips in a row of cells from west to east; every fifth is for validation, every seventh was rejected."""
    cells = [Cell(epsg=32633, column=100 + n, row=2000, side_m=240) for n in range(num_chips)]
    candidates = [
        Candidate(
            cell=cell,
            split="val" if n % 5 == 4 else "train",
            status="rejected" if n % 7 == 6 else "written",
            dt_s=(-1) ** n * n * 3600,
            orbit_state="ascending" if n % 2 else "descending",
            cloud_fraction=n / 100,
        )
        for n, cell in enumerate(cells)
    ]
    write_store(str(url), layout, candidates, lambda row: make_chip(first + row, layout), request={}, statistics=True)
    return Source(url=str(url), version=1)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Source, Source]:
    folder = tmp_path_factory.mktemp("stores")
    return write(folder / "a.zarr", LAYOUT, 30, 0), write(folder / "b.zarr", OTHER, 17, 1000)


@settings(max_examples=20)
@given(number=st.integers(0, 1), own=st.integers(0, 40))
def test_rows_are_unique_and_led_back(two: tuple[Source, Source], number: int, own: int) -> None:
    sources = Sources(two)
    (row,) = sources.rows_of(number, np.array([own % 30 if number == 0 else own])).tolist()
    assert sources.origin(row) == (two[number], own % 30 if number == 0 else own)
    everything = np.concatenate([sources.rows_of(0, np.arange(30)), sources.rows_of(1, np.arange(17))])
    assert np.all(np.diff(everything) > 0)
    # No shard of what is planned has chips of two stores, or of two shards of one.
    shards: dict[int, set[tuple[int, int]]] = {}
    for which, (count, chips) in enumerate(((30, 4), (17, 6))):
        for place, each in enumerate(sources.rows_of(which, np.arange(count)).tolist()):
            shards.setdefault(each // sources.layout.shard_chips, set()).add((which, place // chips))
    assert all(len(held) == 1 for held in shards.values())


def test_one_store_keeps_its_rows(two: tuple[Source, Source]) -> None:
    alone = Sources(two[:1])
    assert alone.rows_of(0, np.arange(30)).tolist() == list(range(30))
    assert alone.layout == Store.open(two[0].url).layout
    assert [alone.origin(row) for row in (3, 7)] == [(two[0], 3), (two[0], 7)]


def test_crops_of_a_mixture_are_those_that_each_store_has(two: tuple[Source, Source]) -> None:
    # The second gives three times what it has.
    chosen = choose_all(two, ChipFilter(), split="train")
    parts = parts_by_weight([len(each.rows) for each in chosen], [0.2, 1.0])
    assert parts[1].taken > 2 * parts[1].num_chips
    feed = Feed(
        url=two[0].url, version=1, others=two[1:], parts=parts, crop_px=12, crops_per_chip=2, global_batch=8,
        window_chips=12,
    )  # fmt: skip
    source, sources = FedChips(feed), Sources(two)
    samples = Counter[tuple[int, ...]]()
    for epoch in range(2):
        for batch in (each for span in source.plan(epoch) for each in cut_batches(sources, span, feed=feed)):
            for at, (row, k, of_epoch) in enumerate(zip(batch["row"], batch["k"], batch["epoch"], strict=True)):
                held, own = sources.origin(int(row))
                sample = np.array([(row, k)])
                (corner,) = crop_windows(sample, seed=0, epoch=int(of_epoch), side_px=24, crop_px=12).tolist()
                window = Store.open(held.url).read_window(own, *corner, 12)
                for name in batch.keys() - MODEL_COLUMNS.keys():
                    assert_array_equal(batch[name][at], window[name])
                samples[int(of_epoch), int(row), int(k)] += 1
    assert set(samples.values()) == {1}
    of_first = [sample for sample in samples if sample[0] == 0]
    assert Counter(sources.origin(row)[0] for _, row, _ in of_first) == {
        each: 2 * part.taken for each, part in zip(two, parts, strict=True)
    }
    assert max(k for *_, k in of_first) >= 4
    assert sources.origin(int(sources.rows_of(1, np.array([5]))[0])) == (two[1], 5)
    assert sources.origin(2) == (two[0], 2)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (replace(LAYOUT, side_px=48), r"cannot be mixed with .*: side_px: 24 -> 48"),
        (replace(LAYOUT, optical_level="l1c"), "optical_level: 'l2a' -> 'l1c'"),
        (replace(LAYOUT, radar_product="sigma0_grd"), "radar_product: 'gamma0_rtc' -> 'sigma0_grd'"),
        (replace(LAYOUT, has_radar=False), "has_radar: True -> False"),
        (replace(LAYOUT, optical_grid="10m"), "optical_grid: 'native' -> '10m'"),
    ],
)
def test_stores_that_are_not_alike_are_refused_with_what_differs(
    two: tuple[Source, Source], tmp_path: Path, layout: Layout, message: str
) -> None:
    Store.create(str(tmp_path / "c.zarr"), layout)
    with pytest.raises(StoreError, match=message):
        Sources([two[0], Source(url=str(tmp_path / "c.zarr"), version=1)])


def kept(only: ChipFilter) -> list[int]:
    """Rows of the first store by the rules they were written by."""
    lon, _ = zip(
        *(Cell(epsg=32633, column=100 + n, row=2000, side_m=240).centre_lonlat for n in range(30)), strict=True
    )
    area = None if only.region is None else shapely.from_wkb(only.region).bounds
    return [
        n
        for n in range(30)
        if n % 7 != 6
        and n % 5 != 4
        and (only.max_dt_days is None or n * 3600 <= only.max_dt_days * 86400)
        and (only.max_cloud_fraction is None or np.float32(n / 100) <= np.float32(only.max_cloud_fraction))
        and (only.orbit == "any" or (n % 2 == 1) == (only.orbit == "ascending"))
        and (area is None or area[0] <= lon[n] <= area[2])
    ]


def middle_third() -> bytes:
    ends = [Cell(epsg=32633, column=100 + n, row=2000, side_m=240).footprint.bounds for n in (10, 20)]
    return bytes(shapely.to_wkb(shapely.box(ends[0][0], 0, ends[1][2], 20)))


some_filters = st.builds(
    ChipFilter,
    max_dt_days=st.none() | st.floats(0, 1.5),
    max_cloud_fraction=st.none() | st.floats(0, 0.35),
    orbit=st.sampled_from(["any", "ascending", "descending"]),
    region=st.none() | st.just(middle_third()),
)


@settings(max_examples=25)
@given(only=some_filters)
def test_chips_that_meet_every_condition_are_chosen_and_no_others(two: tuple[Source, Source], only: ChipFilter) -> None:
    chosen = choose(Version(two[0].url, 1), only, split="train")
    assert chosen.rows.tolist() == kept(only)
    counts = list(chosen.left.values())
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] == len(kept(only))


def test_nothing_left_is_refused_with_what_each_condition_left(two: tuple[Source, Source]) -> None:
    only = ChipFilter(max_cloud_fraction=0.1, orbit="ascending", max_dt_days=0.001)
    with pytest.raises(StoreError) as refused:
        choose_all(two, only, split="train")
    assert str(refused.value).endswith(
        "version 1 holds no chips of split train that are to be fed; left after each condition: "
        "written: 26, split=train: 20, max_cloud_fraction=0.1: 8, max_dt_days=0.001: 1, orbit=ascending: 0"
    )


def test_a_region_is_known_by_its_area_not_by_its_spelling() -> None:
    one, other = (shapely.to_wkb(parse_region(text)) for text in ("11,48,12,49", "11.0,48.00,12.0,49"))
    assert region_hash(one) == region_hash(other) != region_hash(middle_third())
