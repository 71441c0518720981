"""The description of a store for other tools: valid by the published schemas, read back by the tools themselves."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import geopandas
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pystac
import pytest
import rustac
import shapely
import stac_geoparquet.arrow
import xarray
import zarr
from jsonschema import Draft7Validator
from referencing import Registry, Resource

from jobs.support.store_catalog import write_catalog
from pipeline.chip_table import FROM_MANIFEST, chip_table
from pipeline.grid import Cell, cell_at
from pipeline.layout import Layout
from pipeline.manifest import ITEMS_SCHEMA, MANIFEST_SCHEMA, REJECTIONS_SCHEMA
from pipeline.store import Store, StoreError
from pipeline.versions import Version, begin
from tests.conftest import ROOT
from tests.sample_chips import LAYOUT, make_chip
from tests.small_stores import Candidate, write_store

SIDE_M = LAYOUT.side_px * 10
PLACES = [(11.5, 48.2), (11.6, 48.2), (-70.3, -54.0), (179.9999, -16.5), (-179.9, -16.5), (12.5, 48.0), (3.0, 0.0)]
REQUEST = {"archive": "planetary-computer", "period": "2023-07", "region": "sha"}


def make_store(folder: Path, *, name: str = "chips") -> Version:
    splits = ("train", "val", "test", "buffer")
    candidates = [
        Candidate(cell=cell_at(*lonlat, side_m=SIDE_M), split=splits[n % 4], status="rejected" if n == 1 else "written")
        for n, lonlat in enumerate(PLACES)
    ]
    return write_store(str(folder / f"{name}.zarr"), LAYOUT, candidates, make_chip, request=REQUEST)


def append(version: Version, cells: list[Cell]) -> Version:
    """A second version of some more chips."""
    store = Store.open(version.url)
    later = begin(version.url, {**REQUEST, "period": "2023-08"}, number=version.number + 1)
    first = later.first_shard() * LAYOUT.shard_chips
    rows = [
        {
            "row": first + n, "shard": (first + n) // LAYOUT.shard_chips, "unit": "u", "block": "b", "cell": cell.id,
            "epsg": cell.epsg, "column": cell.column, "cell_row": cell.row, "pair": "p", "optical_items": ["S2"],
            "radar_items": ["S1"], "dt_s": 0, "orbit_state": "descending", "relative_orbit": 7, "baseline": "05.10",
            "offset_dn": 1000, "split": "train", "overlap": 1.0,
            "optical_datetime": datetime(2023, 8, 2, tzinfo=UTC), "radar_datetime": datetime(2023, 8, 3, tzinfo=UTC),
        }
        for n, cell in enumerate(cells)
    ]  # fmt: skip
    manifest = pa.table({name: [row[name] for row in rows] for name in MANIFEST_SCHEMA.names}, schema=MANIFEST_SCHEMA)
    later.write_plan(ITEMS_SCHEMA.empty_table(), REJECTIONS_SCHEMA.empty_table(), [manifest])
    for shard in later.shards():
        here = [row for row in rows if row["shard"] == shard]
        hashes = store.write_shard(shard, [(row["row"], make_chip(row["row"])) for row in here])
        fates = [
            {**{name: row[name] for name in FROM_MANIFEST}, "status": "written", "sha256": hashes[row["row"]]}
            for row in here
        ]
        later.write_part(shard, chip_table(fates))
    later.seal()
    return later


def read_items(collection: str) -> list[dict[str, Any]]:
    """All items by stac-geoparquet, from the files that a collection names."""
    links = [link["href"] for link in json.loads(Path(collection).read_text())["links"] if link["rel"] == "items"]
    tables = [pq.read_table(Path(collection).parent / href) for href in links]
    return [item for table in tables for item in stac_geoparquet.arrow.stac_table_to_items(table)]


@pytest.fixture(scope="module")
def validate() -> Any:
    """Validates by the published schemas; skips where they are not."""
    folder = ROOT.parent / "shared" / "schemas"
    if not folder.is_dir():
        pytest.skip(f"no JSON schemas at {folder}: this test needs the published ones, which are not in the repository")
    known = {"https://proj.org/schemas/v0.7/projjson.schema.json": {}}
    for path in folder.rglob("*.json"):
        schema = json.loads(path.read_text())
        if isinstance(schema, dict) and "$schema" in schema and "$id" in schema:
            # One of the published schemas misspells its own name.
            schema["$id"] = schema["$id"].rstrip("#").replace("commonjson", "common.json")
            known[schema["$id"]] = schema
    draft = {"$schema": "http://json-schema.org/draft-07/schema#"}
    registry: Registry[Any] = Registry().with_resources(
        [(name, Resource.from_contents({**draft, **schema})) for name, schema in known.items()]
    )

    def check(content: dict[str, Any], kind: str) -> None:
        core = f"https://schemas.stacspec.org/v1.1.0/{kind}-spec/json-schema/{kind}.json"
        for name in (core, *content["stac_extensions"]):
            Draft7Validator(known[name], registry=registry).validate(content)

    return check


def test_collection_and_items_are_valid_by_the_published_schemas(tmp_path: Path, validate: Any) -> None:
    version = make_store(tmp_path)
    url = write_catalog(version)
    collection = json.loads(Path(url).read_text())
    assert len(collection["stac_extensions"]) == 4
    validate(collection, "collection")
    items = read_items(url)
    for item in items:
        validate(json.loads(json.dumps(item, default=str, allow_nan=False)), "item")
    assert len(items) == len(PLACES) - 1
    broken = {**collection, "license": 7}
    with pytest.raises(Exception, match="7 is not of type"):
        validate(broken, "collection")


def test_pystac_finds_the_store_from_the_collection(tmp_path: Path) -> None:
    version = make_store(tmp_path)
    collection = pystac.Collection.from_file(write_catalog(version))
    assert collection.id == "chips"
    href = collection.assets["chips"].get_absolute_href()
    assert href is not None
    assert Path(href).resolve() == Path(version.url)
    b10 = collection.assets["b10"].get_absolute_href()
    assert b10 is not None
    array = zarr.open_array(str(Path(b10).resolve()), mode="r")
    assert np.array_equal(array[0], make_chip(0)["b10"])
    assert [band["name"] for band in collection.assets["b10"].extra_fields["bands"]] == ["B02", "B03", "B04", "B08"]
    assert collection.extent.temporal.intervals[0][0].isoformat() == "2023-07-01T10:00:00+00:00"
    west, south, east, north = collection.extent.spatial.bboxes[0]
    assert (round(west), round(south), round(east), round(north)) == (-180, -54, 180, 48)
    assert collection.summaries.get_list("twinlook:split") == ["buffer", "test", "train", "val"]


def test_geopandas_reads_a_row_per_chip(tmp_path: Path) -> None:
    version = make_store(tmp_path)
    frame = geopandas.read_parquet(Path(write_catalog(version)).parent / "items-00000.parquet")
    chips = {row["row"]: row for row in version.chips().to_pylist() if row["status"] == "written"}
    assert sorted(frame["twinlook:row"]) == sorted(chips)
    assert frame.crs == "OGC:CRS84"
    for _, item in frame.iterrows():
        chip = chips[item["twinlook:row"]]
        cell = Cell.from_id(chip["cell"], side_m=SIDE_M)
        assert item["twinlook:cell"] == chip["cell"]
        assert item["twinlook:sha256"] == chip["sha256"]
        assert item["twinlook:split"] == chip["split"]
        assert item["proj:code"] == f"EPSG:{cell.epsg}"
        assert item["proj:transform"].tolist() == [10, 0, cell.bounds[0], 0, -10, cell.bounds[3]]
        assert item["proj:shape"].tolist() == [24, 24]
        exact = cell.footprint if cell.footprint.bounds[2] <= 180 else None
        if exact is not None:
            assert item.geometry.symmetric_difference(exact).area < 1e-4 * exact.area
    near = frame.cx[11:12, 48:49]
    assert near["twinlook:cell"].tolist() == [cell_at(11.5, 48.2, side_m=SIDE_M).id]


def test_a_chip_across_the_antimeridian_is_two_pieces(tmp_path: Path) -> None:
    url = write_catalog(make_store(tmp_path))
    frame = geopandas.read_parquet(Path(url).parent / "items-00000.parquet")
    torn = frame[frame.geometry.geom_type == "MultiPolygon"]
    assert len(torn) == 1
    item = torn.iloc[0]
    assert item.geometry.is_valid
    # Readers of GeoParquet take the boxes for themselves.
    found = next(each for each in read_items(url) if each["id"] == item["id"])
    west, _, east, _ = found["bbox"]
    assert west > 179
    assert east < -179
    assert shapely.area(item.geometry) < 0.001


def test_rustac_reads_the_items(tmp_path: Path) -> None:
    path = Path(write_catalog(make_store(tmp_path))).parent / "items-00000.parquet"
    found = rustac.read_sync(str(path)) if hasattr(rustac, "read_sync") else run(rustac.read(str(path)))
    assert {item["properties"]["twinlook:row"] for item in found["features"]} == {0, 2, 3, 4, 5, 6}
    assert found["features"][0]["assets"]["chips"]["href"] == "../../.."


def run(coroutine: Any) -> Any:
    import asyncio

    return asyncio.run(coroutine)


def test_an_item_leads_to_its_pixels(tmp_path: Path) -> None:
    url = write_catalog(make_store(tmp_path))
    item = read_items(url)[0]
    pystac.Item.from_dict(item)
    group = urljoin(f"{url.rpartition('/')[0]}/", item["assets"]["chips"]["href"])
    pixels = zarr.open_group(group, mode="r")["radar"][item["properties"]["twinlook:row"]]
    assert np.array_equal(pixels, make_chip(item["properties"]["twinlook:row"])["radar"])
    assert item["properties"]["datetime"].startswith("2023-07-01T10:00")
    assert item["properties"]["end_datetime"].startswith("2023-07-01T16:00")


def test_the_readme_opens_a_store_as_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    version = make_store(tmp_path)
    write_catalog(version)
    (snippet,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(snippet, found)
    row = found["row"]
    assert row in version.written_rows(split="train")
    np.testing.assert_array_equal(found["red"], make_chip(row)["b10"][2] * 1e-4)
    np.testing.assert_array_equal(found["b10"][row], make_chip(row)["b10"])
    assert len(found["items"]) == len(version.written_rows())


def test_zarr_readers_see_nothing_of_it(tmp_path: Path) -> None:
    version = make_store(tmp_path)

    def members() -> Iterator[str]:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            yield from sorted(name for name, _ in zarr.open_group(version.url, mode="r").members())

    before = list(members())
    write_catalog(version)
    assert list(members()) == before
    assert "b10" in xarray.open_zarr(version.url, consolidated=False, chunks=None)


def test_files_are_of_bounded_size_and_the_same_every_time(tmp_path: Path) -> None:
    version = make_store(tmp_path)
    url = write_catalog(version, rows_per_file=4)
    folder = Path(url).parent
    assert [pq.read_metadata(path).num_rows for path in sorted(folder.glob("items-*"))] == [4, 2]
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / "collection.json").unlink()
    assert write_catalog(version, rows_per_file=4) == url
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == first
    assert len(read_items(url)) == 6


def test_an_append_names_the_items_of_all_versions_and_changes_none(tmp_path: Path, validate: Any) -> None:
    version = make_store(tmp_path)
    later = append(version, [cell_at(20 + n / 10, 50.0, side_m=SIDE_M) for n in range(6)])
    url = write_catalog(later)
    assert url == f"{later.url}/versions/0002/stac/collection.json"
    assert (Path(version.url) / "versions/0001/stac/collection.json").exists(), "the version before has one too"
    items = read_items(url)
    assert len({item["id"] for item in items}) == len(items) == 12
    collection = json.loads(Path(url).read_text())
    validate(collection, "collection")
    assert collection["version"] == "2"
    assert collection["summaries"]["sat:orbit_state"] == ["ascending", "descending"]
    assert collection["extent"]["temporal"]["interval"] == [["2023-07-01T10:00:00Z", "2023-08-03T00:00:00Z"]]
    predecessor = next(link["href"] for link in collection["links"] if link["rel"] == "predecessor-version")
    assert (Path(url).parent / predecessor).resolve() == Path(version.url) / "versions/0001/stac/collection.json"
    assert collection["twinlook:files"][0]["name"] == "../../0001/stac/items-00000.parquet"


def test_an_unfinished_version_has_no_description(tmp_path: Path) -> None:
    store = Store.create(str(tmp_path / "chips.zarr"), LAYOUT)
    with pytest.raises(StoreError, match="version 1 is not sealed"):
        write_catalog(begin(store.url, {}))


def test_chips_off_the_grid_and_without_dates_are_items_too(tmp_path: Path, validate: Any) -> None:
    layout = Layout(side_px=64, shard_chips=4, grid=None, has_radar=False, optical_level="l1c", optical_grid="10m",
                    chip_labels={"scene": {0: "forest", 1: "river"}})  # fmt: skip
    store = Store.create(str(tmp_path / "patches.zarr"), layout)
    version = begin(store.url, {"dataset": "patches"})
    own = [("crs", pa.string()), ("transform", pa.list_(pa.float64())), ("label_scene", pa.int64())]
    named = {"shard": 0, "unit": "u", "split": "train", "optical_items": ["x"], "radar_items": []}
    utm = {"crs": "EPSG:32633", "transform": [10, 0, 5e5, 0, -10, 5.5e6]}
    rows = [
        {"row": 0, "pair": "a", "label_scene": 1, **named, **utm},
        {"row": 1, "pair": "b", "label_scene": 0, **named},
        {"row": 2, "pair": "c", "label_scene": 0, **named, "crs": "EPSG:4326", "transform": [1e-4, 0, 7, 0, -1e-4, 50]},
    ]
    manifest = pa.Table.from_pylist(rows, schema=pa.schema([*MANIFEST_SCHEMA, *own]))
    version.write_plan(ITEMS_SCHEMA.empty_table(), REJECTIONS_SCHEMA.empty_table(), [manifest])
    hashes = store.write_shard(0, [(row, make_chip(row, layout)) for row in range(3)])
    fates = [
        {
            **{name: row.get(name) for name in (*FROM_MANIFEST, "label_scene")},
            "status": "written",
            "sha256": hashes[number],
        }
        for number, row in enumerate(rows)
    ]
    version.write_part(0, chip_table(fates))
    version.seal()
    url = write_catalog(version)
    items = sorted(read_items(url), key=lambda item: item["properties"]["twinlook:row"])
    assert [item["properties"]["twinlook:row"] for item in items] == [0, 2], "a chip of no known place is no item"
    assert items[0]["properties"]["twinlook:label_scene"] == 1
    assert items[1]["bbox"] == pytest.approx([7, 49.9936, 7.0064, 50])
    validate(json.loads(Path(url).read_text()), "collection")
    for item in items:
        validate(json.loads(json.dumps(item, default=str, allow_nan=False)), "item")
