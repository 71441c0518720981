"""Real Sentinel pixels through the whole way: build, overfit, embed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import geopandas
import numpy as np
import pytest

from jobs import build_dataset, embed, pretrain
from jobs.support.pretraining import read_losses
from jobs.support.settings import parse
from pipeline.objects import Objects
from pipeline.simulation.server import StacServer
from pipeline.versions import latest_sealed
from tests.real_scenes import RealArchive, write_real_archive

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("small_cluster"),
    pytest.mark.filterwarnings("ignore:.* is deprecated:Warning:ray.data.context"),
    pytest.mark.filterwarnings("ignore:.* is deprecated:Warning:ray.data._internal"),
]


@pytest.fixture(scope="module")
def real(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> RealArchive:
    if not (shared_data / "terramind-examples").is_dir() or not (shared_data / "ssl4eo-s12").is_dir():
        pytest.skip("the real samples terramind-examples and ssl4eo-s12 are not there")
    return write_real_archive(shared_data, tmp_path_factory.mktemp("real") / "archive")


@pytest.fixture(scope="module")
def stac(real: RealArchive) -> Iterator[str]:
    with StacServer(real.directory) as server:
        yield server.url


def words(stac: str, real: RealArchive, place: str, **more: object) -> list[str]:
    values = {
        "archive": stac, "region": ",".join(map(str, real.regions[place])), "period": real.periods[place],
        "side_px": 120, "block_cells": 2, "shard_chips": 16, "pairing.min_overlap": 0.99,
        "screening.min_valid_fraction": 0.95, **more,
    }  # fmt: skip
    return [f"{key}={value}" for key, value in values.items()]


def test_real_chips_are_built_overfitted_and_embedded(stac: str, real: RealArchive, tmp_path: Path) -> None:
    stores = {}
    for place in real.regions:
        store = tmp_path / f"{place}.zarr"
        splits = {"splits.val_fraction": 0, "splits.test_fraction": 0}
        build_dataset.main(parse(build_dataset.BuildDataset, words(stac, real, place, store=store, **splits)))
        counts = latest_sealed(str(store)).sealed
        assert counts is not None
        assert counts["written"] == counts["requested"] >= len(real.cells[place])
        stores[place] = (counts["written"], store)

    place = max(stores, key=lambda name: stores[name][0])
    chips, store = stores[place]
    run = tmp_path / "run"
    values = {
        "store": store, "out": run, "size": "tiny", "crop_px": 72, "crops_per_chip": 16, "epochs": 6,
        "global_batch": min(16, 16 * chips), "learning_rate": 1e-3, "report_every_epochs": 6, "cpus_per_worker": 0.5,
    }  # fmt: skip
    pretrain.main(parse(pretrain.Pretrain, [f"{key}={value}" for key, value in values.items()]))
    losses = [step["loss"] for step in read_losses(Objects.at(run))]
    third = len(losses) // 3
    assert np.mean(losses[-third:]) < 0.9 * np.mean(losses[:third])

    out = tmp_path / "embedded"
    embed.main(parse(embed.Embed, words(stac, real, place, model=run / "model.safetensors", out=out)))
    table = geopandas.read_parquet(out / "embeddings.parquet")
    assert len(table) >= 1
    vectors = np.stack(table["joint_embedding"].to_numpy()).astype(np.float32)
    assert vectors.shape[1] == 192
    assert np.isfinite(vectors).all()
