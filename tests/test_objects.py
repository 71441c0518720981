"""Files at a URL: whole writes, one winner among several, plain errors."""

from __future__ import annotations

import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.objects import Objects, concurrently, redact


@pytest.fixture
def objects(tmp_path: Path) -> Objects:
    return Objects.at(tmp_path / "some where" / "store#1")


def test_what_is_put_is_got(objects: Objects) -> None:
    objects.put("a/b/c.bin", b"one")
    objects.put("a/b/c.bin", b"two")
    assert objects.get("a/b/c.bin") == b"two"
    assert objects.child("a").get("b/c.bin") == b"two"
    assert objects.exists("a/b/c.bin")
    assert not objects.exists("a/b")


def test_looking_at_a_place_does_not_create_it(objects: Objects) -> None:
    assert objects.list() == []
    assert objects.folders() == []
    assert not objects.exists("x")
    with pytest.raises(FileNotFoundError, match=r"store#1/x: not found"):
        objects.get("x")
    objects.delete("x")
    assert not Path(objects.url).exists()


def test_of_several_creators_exactly_one_wins(objects: Objects) -> None:
    def create(number: int) -> int | None:
        try:
            objects.put("claim", str(number).encode(), create=True)
        except FileExistsError:
            return None
        return number

    with ThreadPoolExecutor(8) as pool:
        winners = [number for number in pool.map(create, range(32)) if number is not None]
    assert len(winners) == 1
    assert objects.get("claim") == str(winners[0]).encode()


def test_a_list_holds_all_below_a_folder_in_order_and_no_unfinished_write(objects: Objects) -> None:
    for path in ("b/2", "b/10", "bc/1", "a", "b/c/1"):
        objects.put(path, b"")
    # What the library's atomic write leaves behind when it is killed before the rename.
    Path(objects.url, "b/3#1").write_bytes(b"half")
    assert objects.list("b") == ["b/10", "b/2", "b/c/1"]
    assert objects.list() == ["a", "b/10", "b/2", "b/c/1", "bc/1"]
    assert objects.list("nothing") == []
    assert objects.folders() == ["b", "bc"]
    assert objects.folders("b") == ["c"]
    assert objects.folders("nothing") == []
    objects.delete("b/2")
    assert objects.list("b") == ["b/10", "b/c/1"]


def test_equal_json_and_equal_tables_have_equal_bytes(objects: Objects) -> None:
    objects.put_json("1.json", {"b": 1, "a": {"y": None, "x": "é"}})
    objects.put_json("2.json", {"a": {"x": "é", "y": None}, "b": 1})
    assert objects.get("1.json") == objects.get("2.json")
    assert objects.get_json("1.json") == {"a": {"x": "é", "y": None}, "b": 1}
    whole = pa.table({"row": list(range(1000)), "name": [f"n{i % 7}" for i in range(1000)]})
    in_pieces = pa.concat_tables([whole.slice(0, 13), whole.slice(13)])
    written = objects.put_table("whole.parquet", whole)
    objects.put_table("pieces.parquet", in_pieces)
    assert written == objects.get("whole.parquet") == objects.get("pieces.parquet")
    assert objects.get_table("pieces.parquet").equals(whole)
    assert objects.get_table("pieces.parquet", columns=["row"]).column_names == ["row"]


def test_json_that_is_not_an_object_is_refused(objects: Objects) -> None:
    objects.put("list.json", b"[1]")
    with pytest.raises(ValueError, match=r"list\.json: expected a JSON object, got a list"):
        objects.get_json("list.json")


def test_a_relative_path_and_its_pickle_mean_the_same_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    objects = Objects.at("here")
    objects.put("x", b"1")
    monkeypatch.chdir("/")
    assert pickle.loads(pickle.dumps(objects)).get("x") == b"1"
    assert Objects.at(tmp_path / "here").get("x") == b"1"


@pytest.mark.parametrize("url", ["s3://bucket/chips", "gs://bucket/chips", "az://container/chips"])
def test_object_stores_are_reached_by_their_scheme_and_their_pickles_hold_no_secret(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "me")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush-hush")
    objects = Objects.at(url + "/")
    assert objects.url == url
    assert b"hush-hush" not in pickle.dumps(objects)
    assert "hush-hush" not in repr(objects)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("ftp://host/x", "expected a local path or a URL of s3, az, gs"),
        ("s3://key:secret@bucket/x", "credentials belong into the environment"),
        ("az://container/x?sig=secret", "credentials belong into the environment"),
    ],
)
def test_a_url_that_cannot_be_used_is_refused_without_repeating_its_secret(url: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        Objects.at(url)
    assert "secret" not in str(refusal.value)


def test_errors_hold_no_signature() -> None:
    text = 'HEAD "https://user:pw@host/c/x?sv=1&sig=abc" failed (https://host/y?sig=def)'
    assert redact(text) == 'HEAD "https://…@host/c/x?…" failed (https://host/y?…)'


def test_a_write_that_is_refused_by_the_disk_is_one_plain_line(objects: Objects) -> None:
    objects.put("folder/x", b"")
    with pytest.raises(OSError, match=r"could not write .*store#1/folder: [^\n]*$"):
        objects.put("folder", b"a folder is in the way")


def test_concurrent_calls_keep_the_order_of_their_arguments() -> None:
    assert concurrently(lambda x: x * x, list(range(100))) == [x * x for x in range(100)]
