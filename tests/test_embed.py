"""Embedding a region: rows and map pixels are the model's own, in their place, and every cell is accounted for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import geopandas
import matplotlib.image
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import rasterio
import ray
import shapely
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft7Validator
from numpy.testing import assert_allclose, assert_array_equal
from referencing import Registry
from referencing.jsonschema import DRAFT7
from rio_cogeo import cog_validate

from jobs.embed import Embed, chips_request, main
from jobs.support.dense_map import MapGrid
from jobs.support.encoder import encode
from jobs.support.geoparquet import to_geoparquet, vectors_column
from jobs.support.job import JobError
from jobs.support.principal import Moments, principal_basis
from jobs.support.settings import parse
from model.croma import Croma
from model.normalisation import SSL4EO_S12
from model.pretrained import model_hash
from pipeline.antimeridian import within_180
from pipeline.grid import Cell, cells_covering, is_owned
from pipeline.layout import Layout
from pipeline.regions import parse_region
from pipeline.store import chip_hash
from pipeline.types import ChipArrays
from tests.small_stores import Candidate, write_model, write_store

# Ray warns of its own settings whenever it copies them.
pytestmark = pytest.mark.filterwarnings("ignore:.* is deprecated:Warning:ray.data.context")

ROOT = Path(__file__).resolve().parent.parent
LAYOUT = Layout(side_px=48, shard_chips=8)
MODEL_ARRAYS = ("b10", "b20", "b60", "radar")
# Where two zones meet, north and south of the equator: both have cells there.
REGIONS = {"north": "11.994,48.0,12.006,48.006", "south": "35.994,-3.406,36.006,-3.40"}


def chip_of(row: int) -> ChipArrays:
    rng = np.random.default_rng(row)
    chip: ChipArrays = {}
    for name, spec in LAYOUT.arrays().items():
        low, high = (-2500, -500) if name == "radar" else (1, 12) if name == "scl" else (500, 4000)
        chip[name] = rng.integers(low, high, spec.shape).astype(spec.dtype)
    return chip


def settings(model: Path, out: Path, region: str, **more: Any) -> Embed:
    words = {"model": model, "out": out, "region": region, "period": "2023-07", "side_px": 48, "shard_chips": 8}
    words |= {"block_cells": 2, "archive": "http://127.0.0.1:9", "inference.num_actors": 1, "inference.batch_size": 3}
    return parse(Embed, [f"{key}={value}" for key, value in {**words, **more}.items()])


def build(asked: Embed) -> list[Candidate]:
    """The region's store as the build would leave it: three cells without a chip, for three reasons."""
    cells = cells_covering(parse_region(asked.region), side_m=480, owners_only=False)
    planned = [cell for cell in cells if cell != cells[4]]
    fates = {1: "rejected", 2: "failed"}
    candidates = [Candidate(cell=cell, status=fates.get(n, "written")) for n, cell in enumerate(planned)]
    rejections = [
        {"cell": cells[4].id, "optical": "S2_x", "reason": "cloudy_scene", "detail": "90.0 %"},
        {"cell": cells[4].id, "optical": "S2_y", "reason": "no_radar_in_time", "detail": "nearest is 5 days away"},
    ]
    write_store(
        f"{asked.out}/chips.zarr",
        LAYOUT,
        candidates,
        chip_of,
        request=chips_request(asked),
        rejections=rejections,
    )
    return candidates


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=200_000_000)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Croma]:
    path = tmp_path_factory.mktemp("model") / "model.pt"
    return path, write_model(path)


Run = tuple[Embed, list[Candidate]]


@pytest.fixture(scope="module", params=list(REGIONS))
def run(
    request: pytest.FixtureRequest,
    cluster: None,
    model: tuple[Path, Croma],
    tmp_path_factory: pytest.TempPathFactory,
) -> Run:
    """A finished run."""
    asked = settings(model[0], tmp_path_factory.mktemp(request.param) / "embedded", REGIONS[request.param])
    candidates = build(asked)
    main(asked)
    return asked, candidates


def direct(croma: Croma, row: int) -> dict[str, Any]:
    """What the model says of a chip, without the job."""
    return encode(croma, SSL4EO_S12, {name: chip_of(row)[name][np.newaxis] for name in MODEL_ARRAYS})


def test_every_chip_has_a_row_with_the_models_own_embeddings(run: Run, model: tuple[Path, Croma]) -> None:
    asked, candidates = run
    found = geopandas.read_parquet(f"{asked.out}/embeddings.parquet").set_index("cell")
    written = {each.cell.id: row for row, each in enumerate(candidates) if each.status == "written"}
    assert set(found.index) == set(written)
    for cell, row in written.items():
        expected = direct(model[1], row)
        for kind in ("optical", "radar", "joint"):
            got = found.loc[cell, f"{kind}_embedding"]
            assert (got.dtype, got.shape) == (np.float16, (32,))
            assert_allclose(got, expected[f"{kind}_embedding"][0], rtol=1e-3, atol=1e-3)
        assert found.loc[cell, "chip_sha256"] == chip_hash(chip_of(row))
        assert found.loc[cell, "optical_items"].tolist() == [f"S2_{row}"]
        assert found.loc[cell, "dt_s"] == 21600 - row
        assert found.loc[cell, "owned"] == is_owned(candidates[row].cell)
    assert set(found["model_sha256"]) == {model_hash(model[1], SSL4EO_S12)}
    assert {str(moment.date()) for moment in found["period_end"]} == {"2023-08-01"}
    assert set(found["dataset_version"]) == {1}


def test_map_pixels_are_the_models_encodings_of_the_cell_there(run: Run, model: tuple[Path, Croma]) -> None:
    asked, candidates = run
    zones = sorted({each.cell.epsg for each in candidates})
    assert len(zones) == 2
    num_pixels = 0
    for epsg in zones:
        with (
            rasterio.open(f"{asked.out}/dense-{epsg}.tif") as dense,
            rasterio.open(f"{asked.out}/pca-{epsg}.tif") as pca,
        ):
            assert (dense.crs.to_epsg(), pca.crs.to_epsg(), dense.count, pca.count) == (epsg, epsg, 32, 3)
            assert dense.transform == pca.transform
            assert dense.res == (80.0, 80.0)
            assert dense.tags()["model_sha256"] == model_hash(model[1], SSL4EO_S12)
            for row, candidate in enumerate(candidates):
                if candidate.cell.epsg != epsg or candidate.status != "written":
                    continue
                left, _, _, top = candidate.cell.bounds
                encodings = direct(model[1], row)["joint_encodings"][0].reshape(6, 6, 32)
                # Token (y, x) of a chip covers 8 px of it, from the north-west corner on.
                points = [(left + 80 * x + 40, top - 80 * y - 40) for y in range(6) for x in range(6)]
                assert_allclose(np.array(list(dense.sample(points))), encodings.reshape(36, 32), atol=2e-5)
                assert (np.array(list(pca.sample(points))) > 0).all()
                num_pixels += 36
            everything = dense.read()
            assert np.isnan(everything[:, np.isnan(everything[0])]).all()
            assert_array_equal(np.isnan(everything[0]), (pca.read() == 0).all(axis=0))
            num_pixels -= int(np.isfinite(everything[0]).sum())
    assert num_pixels == 0


def test_maps_are_cloud_optimised_and_the_picture_shows_the_same(run: Run) -> None:
    asked, _ = run
    for path in [*Path(asked.out).glob("dense-*.tif"), *Path(asked.out).glob("pca-*.tif")]:
        valid, errors, warnings = cog_validate(path, strict=True, quiet=True)
        assert (valid, errors, warnings) == (True, [], []), path
    for path in Path(asked.out).glob("pca-*.tif"):
        with rasterio.open(path) as file:
            painted = file.read().transpose(1, 2, 0)
        picture = (matplotlib.image.imread(path.with_suffix(".png")) * 255).round()
        assert_array_equal(picture[..., :3], painted)
        assert_array_equal(picture[..., 3] > 0, painted.any(axis=2))


def test_all_zones_are_painted_with_one_basis(run: Run, model: tuple[Path, Croma]) -> None:
    asked, candidates = run
    basis = json.loads((Path(asked.out) / "pca.json").read_text())
    rows = [row for row, each in enumerate(candidates) if each.status == "written"]
    tokens = np.concatenate([direct(model[1], row)["joint_encodings"][0] for row in rows]).astype(np.float64)
    _, singular, directions = np.linalg.svd(tokens - tokens.mean(axis=0), full_matrices=False)
    assert_allclose(np.abs(np.sum(directions[:3] * basis["components"], axis=1)), 1, atol=1e-3)
    assert_allclose(basis["explained_variance_ratio"], (singular**2 / (singular**2).sum())[:3], rtol=1e-3)


def test_every_cell_that_was_asked_for_is_accounted_for(run: Run) -> None:
    asked, candidates = run
    cells = cells_covering(parse_region(asked.region), side_m=480, owners_only=False)
    found = geopandas.read_parquet(f"{asked.out}/coverage.parquet").set_index("cell")
    assert set(found.index) == {cell.id for cell in cells}
    assert found["status"].value_counts().to_dict() == {
        "embedded": len(cells) - 3,
        "rejected": 1,
        "failed": 1,
        "no_pair": 1,
    }
    assert found.loc[candidates[1].cell.id, "reason"] == "cloudy"
    assert "decode error" in found.loc[candidates[2].cell.id, "detail"]
    missing = found.loc[cells[4].id]
    assert (missing["status"], missing["reason"]) == ("no_pair", "no_radar_in_time")
    assert "S2_x: cloudy_scene (90.0 %)" in missing["detail"]
    done = json.loads((Path(asked.out) / "embeddings.json").read_text())
    assert done["counts"]["requested"] == len(cells)
    assert set(done["files"]) <= {path.name for path in Path(asked.out).iterdir()}


def test_readers_of_geoparquet_take_it_and_a_box_reads_what_lies_in_it(run: Run) -> None:
    asked, _ = run
    path = f"{asked.out}/embeddings.parquet"
    everything = geopandas.read_parquet(path)
    assert everything.crs == "OGC:CRS84"
    assert everything.geometry.is_valid.all()
    box = everything.geometry.iloc[0].buffer(-1e-4).bounds
    part = geopandas.read_parquet(path, bbox=box)
    assert 0 < len(part) < len(everything)
    assert set(part["cell"]) == set(everything["cell"][everything.intersects(shapely.box(*box))])
    for name in ("optical", "radar", "joint"):
        column = pq.read_metadata(path).row_group(0)
        places = [i for i in range(column.num_columns) if column.column(i).path_in_schema.startswith(f"{name}_emb")]
        assert [column.column(i).compression for i in places] == ["ZSTD"]
        assert all("BYTE_STREAM_SPLIT" in column.column(i).encodings for i in places)


def test_the_footer_is_what_the_specification_asks_for(run: Run) -> None:
    schema = ROOT.parent / "shared" / "schemas" / "geoparquet" / "schema-1.1.0.json"
    if not schema.is_file():
        pytest.skip(f"no schema at {schema}")
    # The schema of coordinate systems is another standard's; pyproj wrote that part.
    registry: Registry[Any] = Registry().with_resource(
        "https://proj.org/schemas/v0.7/projjson.schema.json", DRAFT7.create_resource({})
    )
    validator = Draft7Validator(json.loads(schema.read_text()), registry=registry)
    for name in ("embeddings", "coverage"):
        footer = pq.read_schema(f"{run[0].out}/{name}.parquet").metadata
        validator.validate(json.loads(footer[b"geo"]))
        assert json.loads(footer[b"twinlook"])["dataset_version"] == 1


def test_the_same_again_is_reused_and_another_request_refused(
    run: Run, model: tuple[Path, Croma], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asked, _ = run
    before = {path: path.read_bytes() for path in Path(asked.out).iterdir() if path.is_file()}
    with caplog.at_level("INFO"):
        main(asked)
    assert "complete already" in caplog.text
    assert {path: path.read_bytes() for path in before} == before
    other = tmp_path / "other.pt"
    write_model(other, seed=1)
    with pytest.raises(JobError, match="holds another run: model_sha256"):
        main(asked.model_copy(update={"model": str(other)}))
    with pytest.raises(JobError, match="holds another run: period: '2023-07' -> '2023-08'"):
        main(asked.model_copy(update={"period": "2023-08"}))


def test_a_run_that_was_killed_before_its_end_is_completed(run: Run) -> None:
    asked, _ = run
    out = Path(asked.out)
    before = {path: path.read_bytes() for path in out.iterdir() if path.is_file()}
    for name in ("embeddings.json", "embeddings.parquet", "pca.json", "coverage.parquet"):
        (out / name).unlink()
    main(asked)
    assert {path: path.read_bytes() for path in out.iterdir() if path.is_file()} == before


def test_what_cannot_be_embedded_is_refused_before_anything_is_written(
    model: tuple[Path, Croma], tmp_path: Path
) -> None:
    out = tmp_path / "embedded"
    with pytest.raises(JobError, match="no model at"):
        main(settings(tmp_path / "model.pt", out, REGIONS["north"]))
    with pytest.raises(ValueError, match=r"side_px=66 is no multiple of the model's patch, 8 px"):
        main(settings(model[0], out, REGIONS["north"], side_px=66))
    assert not list(tmp_path.iterdir())


def test_a_region_without_any_chip_says_why(cluster: None, model: tuple[Path, Croma], tmp_path: Path) -> None:
    asked = settings(model[0], tmp_path / "embedded", REGIONS["north"])
    cells = cells_covering(parse_region(asked.region), side_m=480, owners_only=False)
    candidates = [Candidate(cell=cell, status="rejected") for cell in cells]
    write_store(f"{asked.out}/chips.zarr", LAYOUT, candidates, chip_of, request=chips_request(asked))
    with pytest.raises(JobError, match=rf"none of {len(cells)} cells has a chip: {{'cloudy': {len(cells)}}}"):
        main(asked)
    assert set(pq.read_table(f"{asked.out}/coverage.parquet")["status"].to_pylist()) == {"rejected"}


@given(
    epsg=st.sampled_from([32633, 32733]),
    places=st.lists(st.tuples(st.integers(100, 130), st.integers(-20, 20)), min_size=1, max_size=8, unique=True),
    side_px=st.sampled_from([24, 120, 264]),
)
def test_every_cell_has_its_own_window_of_the_map(epsg: int, places: list[tuple[int, int]], side_px: int) -> None:
    cells = [Cell(epsg=epsg, column=column, row=row, side_m=10 * side_px) for column, row in places]
    grid = MapGrid.around(cells, patch_px=8)
    rows, columns = grid.shape
    seen = np.zeros((rows, columns), int)
    transform = grid.profile(count=1, dtype="float32", nodata=0)["transform"]
    for cell in cells:
        window = grid.window(cell)
        assert rasterio.windows.bounds(window, transform) == cell.bounds
        seen[window.toslices()] += 1
    assert seen.sum() == len(cells) * (side_px // 8) ** 2
    assert seen.max() == 1
    assert all(edge.any() for edge in (seen[0], seen[-1], seen[:, 0], seen[:, -1]))


@given(st.integers(0, 2**32 - 1))
def test_components_are_those_of_all_vectors_together(seed: int) -> None:
    rng = np.random.default_rng(seed)
    vectors = (rng.normal(0, 1, (60, 5)) * [9, 5, 3, 1, 0.5] + rng.normal(0, 10, 5)).astype(np.float32)
    moments = Moments(5)
    for part in np.array_split(vectors, [7, 7, 40]):
        moments.add(part)
    assert_allclose(moments.covariance, np.cov(vectors.T.astype(np.float64), bias=True), rtol=1e-6, atol=1e-6)
    basis = principal_basis(moments)
    _, singular, directions = np.linalg.svd(vectors - vectors.mean(axis=0, dtype=np.float64), full_matrices=False)
    assert_allclose(np.abs(np.sum(directions[:3] * basis.components, axis=1)), 1, atol=1e-6)
    assert_allclose(basis.std**2 * 60, singular[:3] ** 2, rtol=1e-6)
    assert_allclose(basis.explained, (singular**2 / (singular**2).sum())[:3], rtol=1e-6)
    assert (np.take_along_axis(basis.components, np.abs(basis.components).argmax(axis=1)[:, None], axis=1) > 0).all()
    colours = basis.colours(np.stack([basis.mean, basis.mean + 9 * basis.std[0] * basis.components[0]]))
    assert colours.tolist()[0] == [128, 128, 128]
    assert colours.tolist()[1] == [255, 128, 128]


def test_vectors_without_any_variance_are_painted_grey() -> None:
    moments = Moments(4)
    moments.add(np.ones((10, 4), np.float32))
    assert (principal_basis(moments).colours(np.ones((2, 4), np.float32)) == 128).all()


def test_an_outline_across_the_antimeridian_is_cut_in_two() -> None:
    cell = Cell(epsg=32601, column=62, row=2000, side_m=2640)
    crossing = next(
        Cell(epsg=32601, column=column, row=0, side_m=2640)
        for column in range(50, 80)
        if Cell(epsg=32601, column=column, row=0, side_m=2640).footprint.bounds[2] > 180
    )
    halves = within_180(crossing.footprint)
    assert halves.geom_type == "MultiPolygon"
    assert -180 <= halves.bounds[0] < halves.bounds[2] <= 180
    assert halves.area == pytest.approx(crossing.footprint.area)
    assert within_180(cell.footprint).geom_type == "Polygon"
    table = pa.table({"cell": [crossing.id, cell.id]})
    content = to_geoparquet(table, [crossing.footprint, cell.footprint], about={})
    footer = json.loads(pq.read_schema(pa.BufferReader(content)).metadata[b"geo"])
    assert footer["columns"]["geometry"]["geometry_types"] == ["MultiPolygon", "Polygon"]


@pytest.mark.parametrize("bad", [np.nan, np.inf, 70000.0])
def test_an_embedding_that_half_precision_cannot_hold_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="not finite or too large"):
        vectors_column(np.array([[1.0, bad]], np.float32))
