"""pretrain on two stores by weight, on some of their chips, with a cache: real Ray Train with two workers."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from jobs.pretrain import Pretrain, main
from jobs.support.job import JobError
from jobs.support.pretraining import read_losses
from jobs.support.settings import parse
from model.pretrained import load, restore
from pipeline.chip_filter import ChipFilter
from pipeline.epochs import SampleOrder
from pipeline.grid import Cell
from pipeline.mixture import parts_by_weight
from pipeline.objects import Objects
from pipeline.positions import plan_spans
from pipeline.shard_cache import ShardCache
from pipeline.sources import Source, Sources, choose_all
from pipeline.store import StoreError
from pipeline.versions import Version
from tests.sample_chips import LAYOUT, make_chip
from tests.small_stores import Candidate, write_store

pytestmark = [
    # Ray's own settings object warns about its own fields when it is copied.
    pytest.mark.filterwarnings("ignore:.* is deprecated:Warning:ray.data.context"),
    pytest.mark.filterwarnings("ignore:.* is deprecated:Warning:ray.data._internal"),
]


def write(url: Path, num_chips: int, shard_chips: int, codec: str) -> Source:
    layout = replace(LAYOUT, shard_chips=shard_chips, codec=codec)
    candidates = [
        Candidate(
            cell=Cell(epsg=32633, column=100 + n, row=2000, side_m=240),
            orbit_state="ascending" if n % 3 else "descending",
        )
        for n in range(num_chips)
    ]
    write_store(str(url), layout, candidates, make_chip, request={}, statistics=True)
    return Source(url=str(url), version=1)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Source, Source]:
    folder = tmp_path_factory.mktemp("stores")
    return write(folder / "a.zarr", 18, 4, "lz4"), write(folder / "b.zarr", 9, 6, "none")


def settings(two: tuple[Source, ...], out: Path, **more: object) -> Pretrain:
    stores = [{"store": each.url, "weight": weight} for each, weight in zip(two, (1, 3), strict=False)]
    values = {
        "stores": json.dumps(stores), "out": out, "size": "tiny", "epochs": 2, "crop_px": 24, "global_batch": 6,
        "filter.orbit": "ascending", "crops_per_chip": 1, **more,
    }  # fmt: skip
    return parse(Pretrain, [f"{key}={value}" for key, value in values.items() if value is not None])


@pytest.mark.slow
@pytest.mark.usefixtures("small_cluster")
def test_two_stores_by_weight_are_trained_on_through_a_cache(two: tuple[Source, Source], tmp_path: Path) -> None:
    out, cache = tmp_path / "run", tmp_path / "cache"
    how = {"num_workers": 2, "cpus_per_worker": 0.5, "cache_dir": cache}
    main(settings(two, out, **how))
    steps = read_losses(Objects.at(out))
    # 12 and 6 chips of the ascending orbit, 1 : 3 of 18 samples.
    parts = parts_by_weight([12, 6], [1, 3])
    assert [part.taken for part in parts] == [5, 13]
    assert [step["samples"] for step in steps] == [6, 12, 18, 24, 30, 36]

    # What each global batch has been made of, by the plan: the shards are counted over both workers.
    chosen, sources = choose_all(two, ChipFilter(orbit="ascending"), split="train"), Sources(two)
    rows = np.concatenate([sources.rows_of(number, each.rows) for number, each in enumerate(chosen)])
    order = SampleOrder(global_batch=6, lanes=2, parts=parts)
    shards, blocks = [], []
    block_of = {}
    for number, each in enumerate(two):
        manifest = Version(each.url, each.version).manifest(columns=["row", "block"])
        of_rows = zip(
            sources.rows_of(number, manifest["row"].to_numpy()).tolist(), manifest["block"].to_pylist(), strict=True
        )
        block_of |= {row: (number, block) for row, block in of_rows}
    for epoch in range(2):
        spans = plan_spans(rows, shard_chips=sources.layout.shard_chips, order=order, epoch=epoch)
        pieces = [piece for span in spans for piece in span.pieces]
        in_order = np.argsort(np.concatenate([piece.positions(order) for piece in pieces]))
        planned = np.concatenate([piece.samples(order) for piece in pieces])[in_order]
        of_store = Counter(sources.origin(row)[0] for row, _ in planned.tolist())
        assert [of_store[each] for each in two] == [part.taken for part in parts]
        shards += [len(set(planned[at : at + 6, 0] // sources.layout.shard_chips)) for at in range(0, 18, 6)]
        blocks += [len({block_of[row] for row in planned[at : at + 6, 0].tolist()}) for at in range(0, 18, 6)]
    assert [step["shards"] for step in steps] == shards
    assert [step["blocks"] for step in steps] == blocks
    assert max(blocks) > 3
    assert max(shards) > 2

    newest = Objects.at(out).get_json(max(Objects.at(out).list("losses")))
    assert len(newest["ranks"]) == 2
    assert all(each["bytes_per_s"] > 0 and each["cache_hits"] > 0 for each in newest["ranks"])
    assert "from its node's cache" in (out / "report.html").read_text()

    # What was fetched was fetched once, and read again from there.
    record = json.loads((tmp_path / "run.run" / "run.json").read_text())
    assert record["results"]["cache_hits"] > 0
    assert record["results"].keys() >= {"bytes_per_s", "waited_share", "waited_share_most"}
    assert record["inputs"]["stores"] == [{"url": each.url, "version": 1} for each in two]
    kept = [path for path in cache.iterdir() if path.name != "lock"]
    assert len({path.name.split("-")[0] for path in kept}) == 2
    given = ShardCache(directory=str(cache), max_bytes=1).shared_counts()
    assert (given["misses"], given.get("evicted", 0), given.get("damaged", 0)) == (len(kept), 0, 0)
    with (out / "model.safetensors").open("rb") as file:
        _, normalisation = restore(load(file))
    assert normalisation.source == f"training chips of {two[0].url} version 1 and {two[1].url} version 1"
    page = (out / "report.html").read_text()
    assert two[0].url in page
    assert two[1].url in page

    # The cache is no part of what the run is; weights and conditions are.
    main(settings(two, out))
    for changed, message in (
        ({"filter.orbit": "any"}, "filter.orbit: 'ascending' -> 'any'"),
        ({"stores": json.dumps([{"store": each.url, "weight": 1} for each in two])}, "stores"),
    ):
        with pytest.raises(JobError, match=f"holds another run: {message}"):
            main(settings(two, out, **changed))


def test_stores_in_a_file_are_those_on_the_command_line(two: tuple[Source, Source], tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    stores = [{"store": each.url, "weight": weight} for each, weight in zip(two, (1, 3), strict=True)]
    file.write_text(yaml.safe_dump({"stores": stores, "filter": {"orbit": "ascending"}, "out": "o"}))
    from_file = parse(Pretrain, [f"config={file}"])
    assert from_file.fed == settings(two, tmp_path).fed
    assert from_file.filter == settings(two, tmp_path).filter


def test_what_cannot_be_mixed_is_refused_before_anything_starts(
    two: tuple[Source, Source], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def stores(*given: dict[str, object]) -> dict[str, str]:
        return {"stores": json.dumps(given)}

    first, second = ({"store": each.url} for each in two)
    with pytest.raises(JobError, match="named twice"):
        main(settings(two, tmp_path / "run", **stores(first, first)))
    with pytest.raises(JobError, match=r"some have a weight, but not .*b\.zarr"):
        main(settings(two, tmp_path / "run", **stores({**first, "weight": 2}, second)))
    with pytest.raises(StoreError, match=r"left after each condition: .* max_dt_days=0.001: 0"):
        main(settings(two, tmp_path / "run", **{"filter.max_dt_days": 0.001}))
    for wrong, message in (
        ({"store": two[0].url}, "store is required, or stores; both were given"),
        ({"stores": None}, "store is required, or stores; neither was given"),
        ({"version": 1}, "version is of store"),
        (stores({**first, "weight": 0}), "Input should be greater than 0"),
    ):
        with pytest.raises(SystemExit):
            settings(two, tmp_path / "run", **wrong)
        assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_dry_run_says_what_is_taken_of_each_store(
    two: tuple[Source, Source], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    main(settings(two, tmp_path / "run", dry_run="true", **{"filter.max_cloud_fraction": 0.5}))
    assert "written: 18, split=train: 18, max_cloud_fraction=0.5: 18, orbit=ascending: 12" in caplog.text
    assert f"13 chips of {two[1].url} version 1, which has 6" in caplog.text
    assert not (tmp_path / "run").exists()
    shutil.rmtree(tmp_path)
