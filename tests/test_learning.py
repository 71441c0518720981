"""A short pretraining is worth something: its embeddings beat an untrained network's and plain band statistics."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from jobs.build_dataset import BuildDataset, main
from jobs.support.settings import parse
from pipeline.simulation.archive import write_archive
from pipeline.simulation.profiles import PROFILES
from pipeline.simulation.scenes import LabelScene, Scene
from pipeline.simulation.server import StacServer
from tests.learning import accuracies

DEMO = PROFILES["demo"]
DATES = ("20220613", "20220612", "20220715")
"""Two of the demo's pairs, nearly free of clouds."""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("learning")
    profile = replace(DEMO, name="learning", scenes=tuple(scene for scene in DEMO.scenes if _is_wanted(scene)))
    write_archive(folder / "archive", profile, seed=0, processes=2)
    with StacServer(folder / "archive") as server:
        words = {
            "archive": server.url, "region": ",".join(map(str, DEMO.region)), "period": DEMO.period,
            "store": folder / "chips.zarr", "labels": "worldcover", "shard_chips": 64, "block_cells": 4,
            "splits.block_cells": 2, "splits.buffer_cells": 0, "splits.val_fraction": 0.1, "splits.test_fraction": 0.3,
        }  # fmt: skip
        main(parse(BuildDataset, [f"{key}={value}" for key, value in words.items()]))
    return str(folder / "chips.zarr")


@pytest.mark.slow
@pytest.mark.usefixtures("small_cluster")
@pytest.mark.filterwarnings("ignore:.* is deprecated:Warning:ray.data.context")
@pytest.mark.filterwarnings("ignore:.* is deprecated:Warning:ray.data._internal")
def test_training_beats_no_training_and_band_statistics_on_held_out_blocks(store: str) -> None:
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        runs = list(pool.map(accuracies, [store] * 3, range(3)))
    shown = "\n".join(
        f"{name}: {np.mean([run[name] for run in runs]):.3f} ± {np.std([run[name] for run in runs]):.3f}"
        for name in runs[0]
    )
    print(shown)  # noqa: T201  # what a person wants to see with -s
    for probe in ("linear", "knn"):
        best = {
            source: max(
                float(np.mean([run[name] for run in runs]))
                for name in runs[0]
                if name.startswith(source) and name.endswith(probe)
            )
            for source in ("trained", "untrained", "statistics")
        }
        # The same choice among the three embeddings for both networks.
        assert best["trained"] > best["untrained"], f"{probe}\n{shown}"
        assert best["trained"] > best["statistics"], f"{probe}\n{shown}"


def _is_wanted(scene: Scene) -> bool:
    return isinstance(scene, LabelScene) or (scene.frame.epsg == 32632 and f"{scene.sensed:%Y%m%d}" in DATES)


def test_the_scenes_for_learning_are_there() -> None:
    wanted = [scene for scene in DEMO.scenes if _is_wanted(scene) and not isinstance(scene, LabelScene)]
    assert len(wanted) == 4
