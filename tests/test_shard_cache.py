"""The cache of shards, by real processes on a real disk: right pixels, fetched once, whatever is killed or damaged."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from pipeline.cache_counts import counts
from pipeline.grid import Cell
from pipeline.shard_cache import CachedShard, ShardCache
from pipeline.shard_reader import ShardReader
from pipeline.sources import Source, Sources
from tests.cache_processes import (
    ARRAYS,
    HOLE,
    NUM_CHIPS,
    ROOMY,
    assert_right,
    chunk_of,
    chunks_of,
    open_made,
    read_all,
)
from tests.conftest import ROOT
from tests.sample_chips import LAYOUT, make_chip
from tests.small_stores import Candidate, write_store

NUM_FILES = 3 * len(ARRAYS)


def write(url: str, first: int = 0) -> Source:
    cells = [Cell(epsg=32633, column=100 + n, row=2000, side_m=240) for n in range(NUM_CHIPS)]
    status = ["rejected" if n == HOLE else "written" for n in range(NUM_CHIPS)]
    candidates = [Candidate(cell=cell, status=each) for cell, each in zip(cells, status, strict=True)]
    write_store(url, LAYOUT, candidates, lambda row: make_chip(first + row), request={})
    return Source(url=url, version=1)


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return write(str(tmp_path / "chips.zarr"))


def counted(do: Callable[[], object]) -> dict[str, int]:
    before = counts()
    do()
    return {name: number - before.get(name, 0) for name, number in counts().items() if number != before.get(name, 0)}


def files(directory: Path) -> list[Path]:
    """Of shards, finished or not."""
    return sorted(path for path in directory.iterdir() if path.name != "lock") if directory.exists() else []


def without_objects(source: Source) -> None:
    for name in ARRAYS:
        shutil.rmtree(Path(source.url) / name / "c")


def test_shards_are_fetched_once_and_read_without_the_store_from_then_on(source: Source, tmp_path: Path) -> None:
    cache = ShardCache(directory=str(tmp_path / "cache"), max_bytes=ROOMY)
    first = counted(lambda: assert_right(read_all(source, cache)))
    assert (first["misses"], first.get("hits", 0)) == (NUM_FILES, 0)
    assert first["written_bytes"] == sum(path.stat().st_size for path in files(tmp_path / "cache"))
    without_objects(source)
    again = counted(lambda: assert_right(read_all(source, cache)))
    assert (again["hits"], again.get("misses", 0)) == (NUM_FILES, 0)


def test_a_file_is_a_plain_zarr_shard(source: Source, tmp_path: Path) -> None:
    read_all(source, ShardCache(directory=str(tmp_path / "cache"), max_bytes=ROOMY))
    spec = LAYOUT.arrays()["b10"]
    array = zarr.create_array(
        tmp_path / "plain.zarr",
        shape=(4, *spec.shape),
        dtype=spec.dtype,
        chunks=(1, *spec.shape),
        shards=(4, *spec.shape),
        compressors=(zarr.codecs.Crc32cCodec(),),
        fill_value=0,
    )
    (path,) = (tmp_path / "cache").glob("*-b10-000000")
    target = tmp_path / "plain.zarr" / "c" / "0" / "0" / "0" / "0"
    target.parent.mkdir(parents=True)
    shutil.copy(path, target)
    for row in (0, 1, 3):
        assert_array_equal(np.asarray(array[row]), make_chip(row)["b10"])
    assert not np.asarray(array[HOLE]).any()


def test_a_store_built_anew_is_not_taken_for_the_old_one(source: Source, tmp_path: Path) -> None:
    cache = ShardCache(directory=str(tmp_path / "cache"), max_bytes=ROOMY)
    assert_right(read_all(source, cache))
    shutil.rmtree(source.url)
    write(source.url, first=500)
    assert_right(read_all(source, cache), first=500)


@pytest.mark.parametrize("how", ["chunk", "index", "short", "empty"])
def test_a_damaged_file_is_noticed_and_fetched_again(
    source: Source, tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    cache = ShardCache(directory=str(tmp_path / "cache"), max_bytes=ROOMY)
    read_all(source, cache)
    (path,) = (tmp_path / "cache").glob("*-radar-000001")
    good = path.read_bytes()
    spoilt = bytearray(good)
    spoilt[{"chunk": 1000, "index": -20}.get(how, 0)] ^= 1
    path.write_bytes({"short": good[:700], "empty": b""}.get(how, bytes(spoilt)))
    seen = counted(lambda: assert_right(read_all(source, cache)))
    assert seen["damaged"] == 1
    assert "is damaged: it will be fetched again" in caplog.text
    assert_right(read_all(source, cache))
    assert path.read_bytes() == good


FILE_BYTES = 3 * 104 + 4 * 16 + 4


@given(
    names=st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 6)), max_size=30),
    room=st.integers(1, 5),
    own=st.sampled_from([(), ("a",), ("a", "b")]),
)
@settings(max_examples=60)
def test_the_cache_never_outgrows_its_bound_and_keeps_its_own(
    tmp_path_factory: pytest.TempPathFactory, names: list[tuple[str, int]], room: int, own: tuple[str, ...]
) -> None:
    folder = tmp_path_factory.mktemp("cache")
    cache = ShardCache(directory=str(folder), max_bytes=room * FILE_BYTES, contents=own)
    there: list[str] = []
    held = []
    for content, number in names:
        name = f"{content}-{number}"
        shard = open_made(cache, name)
        held.append((name, shard))
        # A model of it: least recently used first, those of other contents going when there is no room.
        if name in there:
            assert isinstance(shard, CachedShard)
            there.remove(name)
        elif len(there) == room:
            if (going := next((each for each in there if not each.startswith(own or ("-",))), None)) is None:
                assert not isinstance(shard, CachedShard)
                continue
            there.remove(going)
        there.append(name)
        assert {path.name for path in files(folder)} == set(there)
        assert sum(path.stat().st_size for path in files(folder)) <= cache.max_bytes
        os.utime(folder / name, (time.time() - 1000 + len(held),) * 2)
    # Whoever has a file open reads it all the same, evicted or not.
    for name, shard in held:
        assert all(chunk_of(shard, place) == chunk for place, chunk in chunks_of(name).items())


def test_own_files_go_when_nobody_used_them_for_a_day(tmp_path: Path) -> None:
    cache = ShardCache(directory=str(tmp_path), max_bytes=FILE_BYTES, contents=("a",))
    open_made(cache, "a-1")
    assert not isinstance(open_made(cache, "a-2"), CachedShard)
    os.utime(tmp_path / "a-1", (time.time() - 90_000,) * 2)
    assert isinstance(open_made(cache, "a-2"), CachedShard)
    assert [path.name for path in files(tmp_path)] == ["a-2"]


def test_a_bound_below_one_shard_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = ShardCache(directory=str(tmp_path), max_bytes=FILE_BYTES - 1)
    for number in (1, 2):
        assert chunk_of(open_made(cache, f"a-{number}"), 0) == chunks_of(f"a-{number}")[0]
    assert caplog.text.count("cache_bytes=379 are fewer than the 380 of a shard") == 1
    assert files(tmp_path) == []


def start(*words: str, **how: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.cache_processes", *words]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, **how)  # type: ignore[call-overload]


def test_processes_that_start_together_fetch_every_shard_once(source: Source, tmp_path: Path) -> None:
    directory = tmp_path / "cache"
    others = [start("read", source.url, str(directory), str(ROOMY)) for _ in range(2)]
    found = [json.loads(each.communicate(timeout=120)[0]) for each in others]
    assert [each.returncode for each in others] == [0, 0]
    assert sum(each.get("misses", 0) for each in found) == NUM_FILES
    assert sum(each.get("hits", 0) for each in found) == 2 * 5 * NUM_FILES - NUM_FILES
    assert len(files(directory)) == NUM_FILES


def test_processes_that_push_out_each_others_shards_read_right_pixels(source: Source, tmp_path: Path) -> None:
    other = write(str(tmp_path / "other.zarr"))
    shutil.rmtree(other.url)
    write(other.url, first=300)
    # Room for about half of the shards of one store.
    read_all(source, ShardCache(directory=str(tmp_path / "whole"), max_bytes=ROOMY))
    room = sum(path.stat().st_size for path in files(tmp_path / "whole")) // 2
    directory = tmp_path / "cache"
    children = [
        start("read", each.url, str(directory), str(room), str(first)) for each, first in ((source, 0), (other, 300))
    ]
    found = [json.loads(each.communicate(timeout=120)[0]) for each in children]
    assert [each.returncode for each in children] == [0, 0]
    assert sum(each.get("evicted", 0) for each in found) > 0
    assert sum(path.stat().st_size for path in files(directory)) <= room
    assert not list(directory.glob("*.unfinished"))


@pytest.mark.parametrize("when", ["fetching", "writing"])
def test_a_killed_writer_leaves_nothing_to_be_seen_and_nobody_waiting(tmp_path: Path, when: str) -> None:
    directory = tmp_path / "cache"
    writer = start(when, str(directory))
    assert writer.stdout is not None
    assert writer.stdout.readline() == "at it\n"
    assert [path.suffix for path in files(directory)] == [".unfinished"]
    # Somebody who waits for it.
    waiting = start("wait", str(directory))
    assert waiting.stdout is not None
    assert waiting.stdout.readline() == "waiting\n"
    os.kill(writer.pid, signal.SIGKILL)
    writer.communicate(timeout=60)
    assert waiting.communicate(timeout=60)[0] == "right\n"
    assert [path.name for path in files(directory)] == ["a-1"]


def test_what_a_killed_writer_has_left_is_cleared_away_for_others(tmp_path: Path) -> None:
    writer = start("writing", str(tmp_path))
    assert writer.stdout is not None
    writer.stdout.readline()
    cache = ShardCache(directory=str(tmp_path), max_bytes=FILE_BYTES)
    assert not isinstance(open_made(cache, "b-2"), CachedShard), "it took the place of a file that is being written"
    os.kill(writer.pid, signal.SIGKILL)
    writer.communicate(timeout=60)
    assert isinstance(open_made(cache, "b-2"), CachedShard)
    assert [path.name for path in files(tmp_path)] == ["b-2"]


def has_namespaces() -> bool:
    return (
        shutil.which("unshare") is not None and not subprocess.run(["unshare", "-rm", "true"], check=False).returncode
    )


@pytest.mark.parametrize("how", ["limit", "small disk"])
def test_a_full_disk_turns_the_cache_off_with_one_warning(source: Source, tmp_path: Path, how: str) -> None:
    """A limit on the size of files, which any system has; and a real disk of few bytes, where one may be mounted."""
    directory = tmp_path / "cache"
    directory.mkdir()
    words = ["read", source.url, str(directory), str(ROOMY)]
    command = [sys.executable, "-m", "tests.cache_processes", *words]
    if how == "limit":
        # Small ones are there before; of those that are fetched at once, the first may be one that is too large.
        sources = Sources([source], cache=ShardCache(directory=str(directory), max_bytes=ROOMY))
        for shard in range(3):
            ShardReader(sources, shard, ["b60"], [4 * shard])
        command = ["prlimit", "--fsize=6000", *command]
    elif not has_namespaces():
        pytest.skip("no disk can be mounted here: needs unshare and user namespaces")
    else:
        script = f"mount -t tmpfs -o size=40k tmpfs {directory} && exec {' '.join(command)}"
        command = ["unshare", "-rm", "sh", "-c", script]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("keeps nothing more there") == 1
    reason = {"limit": "File too large", "small disk": "the disk is full"}[how]
    assert f"cache_dir={directory}: {reason}; this process" in done.stderr
    # What was there before goes on being read.
    found = json.loads(done.stdout)
    assert found["hits"] > 0
    assert found["misses"] > NUM_FILES
    assert not list(directory.glob("*.unfinished"))


def test_a_directory_that_cannot_be_written_turns_the_cache_off(
    source: Source, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    cache = ShardCache(directory=str(tmp_path / "file" / "cache"), max_bytes=ROOMY)
    assert_right(read_all(source, cache))
    assert caplog.text.count("keeps nothing more there") == 1
