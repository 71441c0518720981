"""The chip store: whole shards, holes that cost nothing, readable by any Zarr reader."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from numcodecs import blosc
from numpy.testing import assert_array_equal

from pipeline.layout import Layout
from pipeline.objects import Objects
from pipeline.shard_reader import ShardReader
from pipeline.shards import ABSENT, decode_chunk, encode_chunk, join_chunks, read_index
from pipeline.store import Store, StoreError, chip_hash
from pipeline.types import ChipArrays
from tests.sample_chips import LAYOUT, make_chip


def assert_same_chip(got: ChipArrays, expected: ChipArrays) -> None:
    assert got.keys() == expected.keys()
    for name, pixels in expected.items():
        assert got[name].dtype == pixels.dtype
        assert_array_equal(got[name], pixels)


def shard_objects(store: Store) -> dict[str, bytes]:
    return {path: store.objects.get(path) for path in store.objects.list() if "/c/" in path}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store.create(str(tmp_path / "store"), LAYOUT)
    store.resize(10)
    return store


def test_a_full_size_chip_has_the_arrays_of_the_design() -> None:
    arrays = Layout(labels={"map": {1: "one"}}).arrays()
    assert {name: (spec.shape, spec.dtype.name, spec.nodata) for name, spec in arrays.items()} == {
        "b10": ((4, 264, 264), "uint16", 0),
        "b20": ((6, 132, 132), "uint16", 0),
        "b60": ((2, 44, 44), "uint16", 0),
        "scl": ((132, 132), "uint8", 0),
        "radar": ((2, 264, 264), "int16", -32768),
        "label_map": ((264, 264), "uint8", 255),
    }


@pytest.mark.parametrize(
    ("layout", "names"),
    [
        (Layout(has_radar=False), ["b10", "b20", "b60", "scl"]),
        (Layout(has_optical=False), ["radar"]),
        (Layout(optical_level="l1c"), ["b10", "b20", "b60", "radar"]),
    ],
)
def test_what_a_source_lacks_has_no_array(layout: Layout, names: list[str]) -> None:
    assert list(layout.arrays()) == names
    assert Layout.from_attributes(layout.attributes()) == layout


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"side_px": 100}, "side_px must be a positive multiple of 6, got 100"),
        ({"shard_chips": 0}, "shard_chips must be positive, got 0"),
        ({"codec": "gzip"}, "codec must be one of lz4, zstd, none, got 'gzip'"),
        ({"has_optical": False, "has_radar": False}, "needs optical or radar"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Layout(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("codec", ["lz4", "zstd", "none"])
def test_every_reader_finds_what_was_written(tmp_path: Path, codec: str) -> None:
    layout = replace(LAYOUT, codec=codec)
    store = Store.create(str(tmp_path / "store"), layout)
    store.resize(10)
    chips = {row: make_chip(row) for row in (0, 3, 4, 5, 8, 9)}
    for shard in range(3):
        rows = store.rows_of(shard)
        store.write_shard(shard, [(row, chips[row]) for row in chips if row in rows])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        group = zarr.open_group(store.url, mode="r")
        assert set(group) == {*layout.arrays(), "versions"}
        dataset = xr.open_zarr(store.url, consolidated=False)
    for row, chip in chips.items():
        assert_same_chip(store.read_chip(row), chip)
        assert_same_chip({name: np.asarray(group[name][row]) for name in chip}, chip)
        assert_same_chip({name: dataset[name][row].to_numpy() for name in chip}, chip)
        reader = ShardReader(store, row // 4, layout.arrays(), [row])
        scratch = reader.scratch()
        reader.read(row, scratch)
        assert_same_chip(scratch, chip)
    for spec in layout.arrays().values():
        assert np.all(store.read_chip(1)[spec.name] == spec.nodata)


def test_shard_objects_are_those_zarr_would_write(store: Store, tmp_path: Path) -> None:
    chips = {row: make_chip(row) for row in (4, 5, 7)}
    store.write_shard(1, chips.items())
    other = zarr.open_group(tmp_path / "other", mode="w")
    for name, spec in LAYOUT.arrays().items():
        source = store.group[name]
        array = other.create_array(
            name,
            shape=source.shape,
            dtype=source.dtype,
            chunks=source.chunks,
            shards=source.shards,
            compressors=source.compressors,
            fill_value=spec.nodata,
        )
        whole = np.full((4, *spec.shape), spec.nodata, spec.dtype)
        for row, chip in chips.items():
            whole[row - 4] = chip[name]
        array[4:8] = whole
    written = {path: data for path, data in shard_objects(store).items() if "/c/1/" in path}
    assert len(written) == len(LAYOUT.arrays())
    for path, data in written.items():
        assert Objects.at(tmp_path / "other").get(path) == data


def test_rows_that_were_not_given_take_no_space(store: Store) -> None:
    chips = {row: make_chip(row) for row in (0, 2)}
    store.write_shard(0, chips.items())
    for name in LAYOUT.arrays():
        data = store.objects.get(store.shard_key(name, 0))
        index = read_index(data, 4)
        assert [bool(offset != ABSENT) for offset, _ in index] == [True, False, True, False]
        encoded = sum(len(encode_chunk(chip[name], codec="lz4")) for chip in chips.values())
        assert len(data) == encoded + 4 * 16 + 4
    with pytest.raises(StoreError, match=r"b10/c/0/0/0/0 has no chip at places \[1\]"):
        ShardReader(store, 0, ["b10"], [0, 1])
    with pytest.raises(StoreError, match="b10/c/1/0/0/0 is missing, but the chip table has chips in it"):
        ShardReader(store, 1, ["b10"], [4])


def test_a_chip_without_any_data_is_a_chip_and_no_hole(store: Store) -> None:
    dark = {name: np.full(spec.shape, spec.nodata, spec.dtype) for name, spec in LAYOUT.arrays().items()}
    store.write_shard(0, [(1, dark)])
    assert read_index(store.objects.get(store.shard_key("b60", 0)), 4)[1, 0] == 0


@pytest.mark.parametrize("fetched", [False, True])
@pytest.mark.parametrize("rows", [[16], [17, 21], list(range(16, 32))])
def test_few_chips_of_a_shard_are_read_as_well_as_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: list[int], fetched: bool
) -> None:
    if fetched:
        # As of an object store, where nothing is a file.
        monkeypatch.setattr(Objects, "file", lambda objects, path: None)
    layout = replace(LAYOUT, shard_chips=16)
    store = Store.create(str(tmp_path / "store"), layout)
    store.resize(32)
    store.write_shard(1, [(row, make_chip(row, layout)) for row in range(16, 32)])
    reader = ShardReader(store, 1, layout.arrays(), rows)
    scratch = reader.scratch()
    for row in reversed(rows):
        reader.read(row, scratch)
        assert_same_chip(scratch, make_chip(row, layout))


@pytest.mark.parametrize("codec", ["lz4", "none"])
@pytest.mark.parametrize("size_px", [6, 120, 180, 264])
def test_crops_are_the_windows_that_zarr_reads_whatever_part_of_a_chip_is_read(
    tmp_path: Path, codec: str, size_px: int
) -> None:
    layout = Layout(shard_chips=4, codec=codec, labels={"worldcover": {10: "trees"}})
    store = Store.create(str(tmp_path / "store"), layout)
    store.resize(3)
    store.write_shard(0, [(row, make_chip(row, layout)) for row in (0, 2)])
    reader = ShardReader(store, 0, layout.arrays(), [0, 2])
    sides = {name: size_px // spec.step_px for name, spec in layout.arrays().items()}
    into = {
        name: np.zeros((4, *spec.shape[:-2], sides[name], sides[name]), spec.dtype)
        for name, spec in layout.arrays().items()
    }
    last = layout.side_px - size_px
    places = {0: [(0, 0, 0), (3, 0, last)], 2: [(1, last, last), (2, last, 0)]}
    for row, cuts in places.items():
        # The arrays hold the last chip's pixels, as they are used again.
        scratch = {name: np.full(spec.shape, 99, spec.dtype) for name, spec in layout.arrays().items()}
        reader.cut(row, [(into, *cut) for cut in cuts], size_px, scratch)
    for row, cuts in places.items():
        for place, y_px, x_px in cuts:
            window = store.read_window(row, y_px, x_px, size_px)
            assert_same_chip({name: array[place] for name, array in into.items()}, window)


def test_a_file_that_is_cut_short_is_an_error(store: Store) -> None:
    store.write_shard(0, [(row, make_chip(row)) for row in range(4)])
    path = store.objects.file(store.shard_key("b10", 0))
    assert path is not None
    reader = ShardReader(store, 0, ["b10"], [3])
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="ends before a chunk at byte"):
        reader.read(3, reader.scratch())
    with pytest.raises(ValueError, match="its index is damaged"):
        ShardReader(store, 0, ["b10"], [3])


def test_a_shard_without_chips_is_no_object(store: Store) -> None:
    store.write_shard(0, [(0, make_chip(0))])
    store.write_shard(0, [])
    assert shard_objects(store) == {}


def test_what_a_killed_task_left_is_replaced_whole(store: Store, tmp_path: Path) -> None:
    store.write_shard(1, [(row, make_chip(row + 100)) for row in (4, 5, 6)])
    store.objects.put(store.shard_key("b20", 1), b"torn")
    store.write_shard(1, [(row, make_chip(row)) for row in (5, 7)])
    undisturbed = Store.create(str(tmp_path / "undisturbed"), LAYOUT)
    undisturbed.resize(10)
    # Other order, other process history: the same bytes.
    undisturbed.write_shard(1, [(row, make_chip(row)) for row in (7, 5)])
    assert shard_objects(store) == shard_objects(undisturbed)


def test_a_killed_task_leaves_no_object_it_did_not_finish(store: Store) -> None:
    def die_at_the_second_chip() -> Iterator[tuple[int, ChipArrays]]:
        yield 0, make_chip(0)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.write_shard(0, die_at_the_second_chip())
    assert shard_objects(store) == {}


def test_hashes_are_those_of_the_pixels_read_back(store: Store) -> None:
    hashes = store.write_shard(2, [(row, make_chip(row)) for row in (9, 8)])
    assert list(hashes) == [8, 9]
    assert hashes == {row: chip_hash(store.read_chip(row)) for row in (8, 9)}


def test_a_hash_tells_names_shapes_types_and_pixels_apart() -> None:
    pixels = np.arange(12, dtype=np.uint16)
    chips: list[ChipArrays] = [
        {"a": pixels},
        {"b": pixels},
        {"a": pixels.reshape(3, 4)},
        {"a": pixels.astype(np.int16)},
        {"a": pixels[::-1]},
        {"a": pixels, "b": pixels},
    ]
    assert len({chip_hash(chip) for chip in chips}) == len(chips)
    assert chip_hash({"a": pixels, "b": pixels}) == chip_hash({"b": pixels.copy(), "a": pixels.astype(">u2")})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"b10": np.zeros((4, 24, 24), np.int16)}, "row 1: b10 must be uint16, got int16"),
        ({"b20": np.zeros((6, 24, 24), np.uint16)}, r"row 1: b20 must have shape \(6, 12, 12\), got \(6, 24, 24\)"),
        ({"b30": np.zeros(1)}, r"row 1: missing arrays \[\], unknown arrays \['b30'\]"),
    ],
)
def test_a_chip_that_does_not_fit_is_refused_with_its_row(store: Store, change: ChipArrays, message: str) -> None:
    with pytest.raises(StoreError, match=message):
        store.write_shard(0, [(0, make_chip(0)), (1, {**make_chip(1), **change})])
    with pytest.raises(StoreError, match=r"row 1: missing arrays \['radar'\]"):
        store.write_shard(0, [(1, {name: pixels for name, pixels in make_chip(1).items() if name != "radar"})])
    assert shard_objects(store) == {}


def test_a_row_belongs_to_one_shard_and_inside_the_array(store: Store) -> None:
    with pytest.raises(StoreError, match="row 4 is not in shard 0, which holds rows 0 to 3"):
        store.write_shard(0, [(4, make_chip(4))])
    with pytest.raises(StoreError, match="row 10 is not in shard 2, which holds rows 8 to 9"):
        store.write_shard(2, [(10, make_chip(10))])
    with pytest.raises(StoreError, match="row 8 was given twice"):
        store.write_shard(2, [(8, make_chip(8)), (8, make_chip(8))])


def test_growing_keeps_what_is_there_and_nothing_shrinks(store: Store) -> None:
    chip = make_chip(9)
    store.write_shard(2, [(9, chip)])
    store.resize(14)
    store.resize(3)
    assert store.num_rows == 14
    store.write_shard(3, [(13, make_chip(13))])
    assert_same_chip(store.read_chip(9), chip)
    assert_same_chip(store.read_chip(13), make_chip(13))


def test_creating_a_store_again_opens_it_or_names_what_differs(store: Store) -> None:
    store.write_shard(0, [(0, make_chip(0))])
    again = Store.create(store.url, LAYOUT)
    assert again.num_rows == 10
    with pytest.raises(StoreError, match="has another layout: codec: 'lz4' -> 'none'; side_px: 24 -> 30"):
        Store.create(store.url, replace(LAYOUT, codec="none", side_px=30))
    assert_same_chip(again.read_chip(0), make_chip(0))


def test_a_store_whose_creation_was_killed_is_no_store_and_is_created_by_a_rerun(store: Store) -> None:
    store.objects.delete("zarr.json")
    with pytest.raises(StoreError, match="no store at"):
        Store.open(store.url)
    assert Store.create(store.url, LAYOUT).layout == LAYOUT


def test_what_is_no_store_of_ours_is_refused(store: Store, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"no store at .*/nowhere"):
        Store.open(str(tmp_path / "nowhere"))
    zarr.open_group(tmp_path / "foreign", mode="w")
    with pytest.raises(StoreError, match="is a Zarr hierarchy, but not a chip store"):
        Store.open(str(tmp_path / "foreign"))
    metadata = store.objects.get_json("zarr.json")
    metadata["attributes"]["twinlook"]["layout_version"] = 99
    store.objects.put_json("zarr.json", metadata)
    with pytest.raises(StoreError, match="has layout version 99; this twinlook reads 1"):
        Store.open(store.url)


def test_a_window_is_that_part_of_the_chip(store: Store) -> None:
    chip = make_chip(0)
    store.write_shard(0, [(0, chip)])
    window = store.read_window(0, 6, 12, 12)
    assert_array_equal(window["b10"], chip["b10"][:, 6:18, 12:24])
    assert_array_equal(window["b20"], chip["b20"][:, 3:9, 6:12])
    assert_array_equal(window["b60"], chip["b60"][:, 1:3, 2:4])
    assert_array_equal(window["scl"], chip["scl"][3:9, 6:12])
    for wrong in ((3, 0, 12), (0, 0, 30), (18, 0, 12), (-6, 0, 12), (0, 0, 0)):
        with pytest.raises(ValueError, match="window"):
            store.read_window(0, *wrong)


def test_a_store_travels_to_other_processes_by_its_url(store: Store) -> None:
    store.write_shard(0, [(0, make_chip(0))])
    assert_same_chip(pickle.loads(pickle.dumps(store)).read_chip(0), make_chip(0))


@given(places=st.sets(st.integers(0, 7)), codec=st.sampled_from(["lz4", "zstd", "none"]), seed=st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_chunks_come_out_of_a_shard_as_they_went_in(places: set[int], codec: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    chunks = {place: rng.integers(-100, 100, (2, 6, 6)).astype(np.int16) for place in places}
    shard = join_chunks({place: encode_chunk(chunks[place], codec=codec) for place in places}, 8)
    index = read_index(shard, 8)
    assert {place for place in range(8) if index[place, 0] != ABSENT} == places
    for place, pixels in chunks.items():
        offset, length = (int(number) for number in index[place])
        out = np.empty_like(pixels)
        decode_chunk(shard[offset : offset + length], codec=codec, dtype=out.dtype, out=out)
        assert_array_equal(out, pixels)


def test_a_chunk_has_the_same_bytes_in_every_thread() -> None:
    # Large enough for blosc to share the work between threads, were it allowed to.
    chip = make_chip(0, Layout())["b10"]
    with ThreadPoolExecutor(1) as pool:
        elsewhere = pool.submit(encode_chunk, chip, codec="lz4").result()
    assert encode_chunk(chip, codec="lz4") == elsewhere
    assert blosc.use_threads is False


def test_a_damaged_index_is_noticed() -> None:
    shard = bytearray(join_chunks({0: b"abc"}, 2))
    for damaged in (bytes(shard[:-1]), b"", bytes(shard[:3]) + b"\x01" + bytes(shard[4:])):
        with pytest.raises(ValueError, match="its index is damaged"):
            read_index(damaged, 2)
