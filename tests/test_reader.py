"""Reading: rasterio's own pixels are the oracle; what cannot be read is an error, never nodata."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import rasterio
from rasterio._env import get_gdal_config
from rasterio.windows import from_bounds

from pipeline.access import DirectAccess
from pipeline.bands import NATIVE_GROUPS, RADAR_BANDS, RESOLUTION_M
from pipeline.reader import Patience, Reader, ReaderName, ReadError, View, Window, reader_named
from pipeline.reader_gdal import gdal_options
from pipeline.types import Acquisition, ChipArrays, Item, Sensor
from tests.distinct_scenes import distinct, optical_item, radar_item, write_tif

NORTH = {"epsg": 32633, "left": 300_000, "top": 5_400_000}
SOUTH = {"epsg": 32733, "left": 300_000, "top": 7_300_000 - 20}  # 10 000 000 m less a multiple of 60 m
SIDE_PX = 96


@pytest.fixture(params=["window", "stackstac"])
def reader(request: pytest.FixtureRequest) -> Reader:
    name: ReaderName = request.param
    return reader_named(name, DirectAccess(), Patience(attempts=2, backoff_s=0.01, timeout_s=2))


def optical(reader: Reader, window: Window, *items: Item) -> ChipArrays:
    return reader.pixels([view(window, look("optical", *items))]).arrays[0]


def radar(reader: Reader, window: Window, *items: Item) -> np.ndarray:
    return reader.pixels([view(window, look("radar", *items))]).arrays[0]["radar"]


def look(sensor: Sensor, *items: Item) -> Acquisition:
    return Acquisition(sensor=sensor, items=items)


def view(window: Window, *looks: Acquisition) -> View:
    return View(window=window, looks=looks)


def inner(place: dict[str, int], *, edge_m: int = 120, side_m: int = 480) -> Window:
    left, top = place["left"] + edge_m, place["top"] - edge_m
    return Window(epsg=place["epsg"], bounds=(left, top - side_m, left + side_m, top))


def rasterio_reads(path: str, window: Window) -> np.ndarray:
    with rasterio.open(path) as file:
        pixels: np.ndarray = file.read(1, window=from_bounds(*window.bounds, transform=file.transform))
        return pixels


@pytest.mark.parametrize("place", [NORTH, SOUTH], ids=["north", "south"])
@pytest.mark.parametrize("offset", [0, 1000])
def test_an_aligned_scene_is_copied_under_the_stated_formula(
    reader: Reader, place: dict[str, int], offset: int, tmp_path: Path
) -> None:
    item = optical_item(tmp_path, **place, side_px=SIDE_PX, offset_dn=offset)
    window = inner(place)
    arrays = optical(reader, window, item)
    for group, bands in NATIVE_GROUPS.items():
        assert arrays[group].dtype == np.uint16
        assert arrays[group].shape == (len(bands), *window.shape(RESOLUTION_M[group]))
        for band, pixels in zip(bands, arrays[group], strict=True):
            dn = rasterio_reads(item.assets[band], window).astype(int)
            assert (pixels == np.maximum(dn - offset, 1)).all(), band


@pytest.mark.parametrize("place", [NORTH, SOUTH], ids=["north", "south"])
def test_radar_on_a_grid_whole_pixels_off_is_copied_in_centi_decibel(
    reader: Reader, place: dict[str, int], tmp_path: Path
) -> None:
    shifted = {**place, "left": place["left"] - 70, "top": place["top"] + 30}
    item = radar_item(tmp_path, **shifted, side_px=SIDE_PX + 12)
    window = inner(place)
    pixels = radar(reader, window, item)
    for band, read in zip(RADAR_BANDS, pixels, strict=True):
        gamma0 = rasterio_reads(item.assets[band], window).astype(np.float64)
        assert (read == np.maximum(np.round(1000 * np.log10(gamma0)), -5000)).all(), band


def test_two_tiles_are_one_picture(reader: Reader, tmp_path: Path) -> None:
    west = optical_item(tmp_path, **NORTH, side_px=SIDE_PX, name="west")
    east_place = {**NORTH, "left": NORTH["left"] + 600}
    east = optical_item(tmp_path, **east_place, side_px=SIDE_PX, offset_dn=1000, name="east")
    left, top = NORTH["left"] + 480, NORTH["top"] - 120
    window = Window(epsg=32633, bounds=(left, top - 240, left + 960, top))
    picture = optical(reader, window, west, east)["b10"][0]
    from_west = rasterio_reads(west.assets["B02"], Window(epsg=32633, bounds=(left, top - 240, left + 480, top)))
    assert (picture[:, :48] == from_west).all()
    # Beyond the western tile come the pixels of the eastern one, without its offset.
    rest = rasterio_reads(east.assets["B02"], Window(epsg=32633, bounds=(left + 480, top - 240, left + 960, top)))
    assert (picture[:, 48:] == np.maximum(rest.astype(int) - 1000, 1)).all()


def test_outside_the_swath_there_is_no_data(reader: Reader, tmp_path: Path) -> None:
    item = optical_item(tmp_path, **NORTH, side_px=SIDE_PX)
    values = distinct(SIDE_PX, SIDE_PX, start=0)
    values[:, :40] = 0
    write_tif(Path(item.assets["B02"]), values, epsg=32633, left=NORTH["left"], top=NORTH["top"], pixel_m=10, nodata=0)
    pixels = optical(reader, inner(NORTH), item)["b10"][0]
    assert (pixels[:, :28] == 0).all()
    assert (pixels[:, 28:] > 0).all()


def test_a_scene_of_the_neighbouring_zone_is_within_a_pixel(reader: Reader, tmp_path: Path) -> None:
    from pyproj import Transformer

    # Radar values that encode the column: read in the neighbouring zone, each pixel must come from where it lies.
    item = radar_item(tmp_path, epsg=32633, left=280_000, top=5_400_000, side_px=240)
    ramp = np.broadcast_to(np.arange(240, dtype=np.float32) / 100 + 0.5, (240, 240)).copy()
    for band in RADAR_BANDS:
        write_tif(Path(item.assets[band]), ramp, epsg=32633, left=280_000, top=5_400_000, pixel_m=10, nodata=-32768)
    centre = Transformer.from_crs(32633, 32632, always_xy=True).transform(281_200, 5_398_800)
    left, top = round(centre[0] / 60) * 60 - 240, round(centre[1] / 60) * 60 + 240
    window = Window(epsg=32632, bounds=(left, top - 480, left + 480, top))
    centi_db = radar(reader, window, item)[0]
    xs, ys = np.meshgrid(left + 5 + 10 * np.arange(48), top - 5 - 10 * np.arange(48))
    x, _ = Transformer.from_crs(32632, 32633, always_xy=True).transform(xs, ys)
    expected = ((x - 280_000) / 10 - 0.5) / 100 + 0.5
    assert np.abs(10 ** (centi_db / 1000) - expected).max() < 0.01  # a tenth of a pixel would be 0.001


def test_labels_come_by_nearest_neighbour_with_holes_marked(reader: Reader, tmp_path: Path) -> None:
    classes = np.where(
        distinct(SIDE_PX, SIDE_PX, start=0) % 7 == 0, 0, 10 * (1 + distinct(SIDE_PX, SIDE_PX, start=0) % 5)
    ).astype(np.uint8)
    path = tmp_path / "map.tif"
    write_tif(path, classes, epsg=32633, left=NORTH["left"], top=NORTH["top"], pixel_m=10, nodata=0)
    read = reader.labels([str(path)], inner(NORTH), missing=255)
    assert (read == np.where(classes == 0, 255, classes)[12:60, 12:60]).all()


def test_a_missing_asset_is_an_error(reader: Reader, tmp_path: Path) -> None:
    item = optical_item(tmp_path, **NORTH, side_px=SIDE_PX)
    Path(item.assets["B05"]).unlink()
    with pytest.raises(ReadError, match="item S2, band B05") as failed:
        optical(reader, inner(NORTH), item)
    assert not failed.value.transient


def test_a_corrupt_asset_is_an_error(reader: Reader, tmp_path: Path) -> None:
    item = radar_item(tmp_path, **NORTH, side_px=SIDE_PX)
    path = Path(item.assets["VH"])
    content = bytearray(path.read_bytes())
    content[len(content) // 4 :] = b"\xa5" * (len(content) - len(content) // 4)
    path.write_bytes(content)
    with pytest.raises(ReadError, match="item S1, band"):
        radar(reader, inner(NORTH), item)


def test_an_asset_without_a_value_inside_its_footprint_is_a_failed_read(reader: Reader, tmp_path: Path) -> None:
    item = optical_item(tmp_path, **NORTH, side_px=SIDE_PX)
    empty = np.zeros((SIDE_PX, SIDE_PX), np.uint16)
    write_tif(Path(item.assets["B08"]), empty, epsg=32633, left=NORTH["left"], top=NORTH["top"], pixel_m=10, nodata=0)
    with pytest.raises(ReadError, match="item S2, band B08: no data at all"):
        optical(reader, inner(NORTH), item)


def test_radar_in_decibel_is_refused(reader: Reader, tmp_path: Path) -> None:
    item = radar_item(tmp_path, **NORTH, side_px=SIDE_PX)
    for band in RADAR_BANDS:
        decibel = np.full((SIDE_PX, SIDE_PX), -12.5, np.float32)
        write_tif(
            Path(item.assets[band]),
            decibel,
            epsg=32633,
            left=NORTH["left"],
            top=NORTH["top"],
            pixel_m=10,
            nodata=-32768,
        )
    with pytest.raises(ReadError, match="in decibel"):
        radar(reader, inner(NORTH), item)


def test_errors_hold_no_signature(reader: Reader, tmp_path: Path) -> None:
    item = optical_item(tmp_path, **NORTH, side_px=SIDE_PX)
    signed = replace(item, assets={**item.assets, "SCL": "http://127.0.0.1:9/scl.tif?sv=2024&sig=SECRET%3D"})
    with pytest.raises(ReadError) as failed:
        reader.classes([view(inner(NORTH), look("optical", signed))])
    assert "SECRET" not in str(failed.value)
    assert failed.value.__cause__ is None


def both(sensor: Sensor, item: Item, window: Window) -> tuple[ChipArrays, ChipArrays]:
    """What the two readers make of an item over a window."""
    names: tuple[ReaderName, ReaderName] = ("window", "stackstac")
    first, second = (reader_named(name, DirectAccess()).pixels([view(window, look(sensor, item))]) for name in names)
    assert first.flags == second.flags
    return first.arrays[0], second.arrays[0]


def in_the_next_zone(item: Item, side_m: int = 480) -> Window:
    """A window of zone 32 in the middle of an item of zone 33."""
    from pyproj import Transformer

    with rasterio.open(next(iter(item.assets.values()))) as file:
        left, bottom, right, top = file.bounds
    x, y = Transformer.from_crs(32633, 32632, always_xy=True).transform((left + right) / 2, (bottom + top) / 2)
    west, north = round(x / 60) * 60 - side_m // 2, round(y / 60) * 60 + side_m // 2
    return Window(epsg=32632, bounds=(west, north - side_m, west + side_m, north))


@pytest.mark.parametrize("nodata", [0, None], ids=["tagged", "untagged"])
def test_readers_agree_in_another_zone_and_mix_nothing_with_no_data(nodata: int | None, tmp_path: Path) -> None:
    item = optical_item(tmp_path, epsg=32633, left=280_020, top=5_400_000, side_px=SIDE_PX)
    for band, href in item.assets.items():
        pixel_m = RESOLUTION_M["scl" if band == "SCL" else next(g for g, b in NATIVE_GROUPS.items() if band in b)]
        values = np.full((SIDE_PX * 10 // pixel_m,) * 2, 2000 if band != "SCL" else 4)
        values[:, : values.shape[1] // 2] = 0
        place = {"epsg": 32633, "left": 280_020, "top": 5_400_000, "pixel_m": pixel_m}
        write_tif(Path(href), values.astype(np.uint8 if band == "SCL" else np.uint16), **place, nodata=nodata)
    window, stack = both("optical", item, in_the_next_zone(item))
    for group in NATIVE_GROUPS:
        assert (window[group] == stack[group]).all(), group
        assert set(np.unique(window[group])) == {0, 2000}, group


@pytest.mark.parametrize("shift_m", [0, 2, 5, 8])
@pytest.mark.parametrize("nodata", [-32768, float("nan"), None], ids=["tagged", "NaN", "untagged"])
def test_readers_agree_on_radar_on_any_grid(shift_m: int, nodata: float | None, tmp_path: Path) -> None:
    place = {"epsg": 32633, "left": NORTH["left"] + shift_m, "top": NORTH["top"] - shift_m}
    item = radar_item(tmp_path, **place, side_px=SIDE_PX)
    for band in RADAR_BANDS:
        with rasterio.open(item.assets[band]) as file:
            gamma0 = file.read(1)
        gamma0[40:50, :30] = np.nan if nodata is None or nodata != nodata else nodata
        if nodata is None:
            gamma0[60:65, :30] = -32768
        write_tif(Path(item.assets[band]), gamma0, **place, pixel_m=10, nodata=nodata)
    window, stack = both("radar", item, inner(NORTH))
    assert (window["radar"] == stack["radar"]).all()
    valid = window["radar"] != -32768
    assert not valid.all()
    assert valid.mean() > 0.8
    assert window["radar"][valid].min() > -4500  # nothing of -32768 in any mean


def test_a_grid_half_a_pixel_off_is_read_without_a_shift(tmp_path: Path, reader: Reader) -> None:
    place = {"epsg": 32633, "left": NORTH["left"] + 5, "top": NORTH["top"] - 5}
    item = radar_item(tmp_path, **place, side_px=SIDE_PX)
    ramp = np.broadcast_to(np.arange(SIDE_PX, dtype=np.float32) / 100 + 0.5, (SIDE_PX, SIDE_PX)).copy()
    for band in RADAR_BANDS:
        write_tif(Path(item.assets[band]), ramp, **place, pixel_m=10, nodata=-32768)
    window = inner(NORTH)
    gamma0 = 10 ** (radar(reader, window, item)[0] / 1000)
    centres = window.bounds[0] + 5 + 10 * np.arange(gamma0.shape[1])
    assert np.abs(gamma0 - (((centres - place["left"]) / 10 - 0.5) / 100 + 0.5)).max() < 0.002


def test_several_windows_are_read_as_one_by_one(tmp_path: Path, reader: Reader) -> None:
    item = optical_item(tmp_path, **NORTH, side_px=SIDE_PX)
    windows = [inner(NORTH, edge_m=edge, side_m=240) for edge in (60, 360)]
    together = reader.pixels([view(window, look("optical", item)) for window in windows]).arrays
    for window, arrays in zip(windows, together, strict=True):
        alone = optical(reader, window, item)
        assert all((alone[group] == arrays[group]).all() for group in NATIVE_GROUPS)


def test_settings_hold_in_every_thread_that_reads(tmp_path: Path, reader: Reader) -> None:
    from concurrent.futures import ThreadPoolExecutor

    # A sidecar that GDAL would take the wrong georeference from, were it to look around.
    item = optical_item(tmp_path, **NORTH, side_px=SIDE_PX)
    path = Path(item.assets["B02"])
    path.with_suffix(".tif.aux.xml").write_text("<PAMDataset><GeoTransform>1,10,0,2,0,-10</GeoTransform></PAMDataset>")
    with ThreadPoolExecutor(1) as other:
        pixels = other.submit(optical, reader, inner(NORTH), item).result()["b10"][0]
    assert (pixels == rasterio_reads(item.assets["B03"], inner(NORTH)) - 1000).all()


def test_the_block_cache_is_as_large_as_it_is_meant_to_be() -> None:
    # A number of megabytes would be taken for bytes: GDAL then flushes every block at once, and what this process
    # writes block by block loses its "no data".
    with rasterio.Env(**gdal_options(Patience())):
        assert get_gdal_config("GDAL_CACHEMAX") == 256 * 2**20
