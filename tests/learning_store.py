"""The small dataset that short trainings are judged on: a few nearly cloudless looks of the simulated archive."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from jobs.build_dataset import BuildDataset, main
from jobs.support.settings import parse
from pipeline.simulation.archive import write_archive
from pipeline.simulation.profiles import PROFILES
from pipeline.simulation.scenes import LabelScene, Scene
from pipeline.simulation.server import StacServer

DEMO = PROFILES["demo"]
DATES = ("20220613", "20220612", "20220715")
"""Two of the demo's pairs, nearly free of clouds."""


def scenes_to_learn_from() -> tuple[Scene, ...]:
    """The demo's scenes of those days in its main zone, and its land cover."""
    return tuple(scene for scene in DEMO.scenes if _is_wanted(scene))


def write_learning_store(folder: Path) -> str:
    """Simulate the archive and build a store with land cover from it, on a running Ray; returns the store's URL."""
    profile = replace(DEMO, name="learning", scenes=scenes_to_learn_from())
    write_archive(folder / "archive", profile, seed=0, processes=2)
    with StacServer(folder / "archive") as server:
        words = {
            "archive": server.url, "region": ",".join(map(str, DEMO.region)), "period": DEMO.period,
            "store": folder / "chips.zarr", "labels": "worldcover", "shard_chips": 64, "block_cells": 4,
            "splits.block_cells": 2, "splits.buffer_cells": 0, "splits.val_fraction": 0.1, "splits.test_fraction": 0.3,
        }  # fmt: skip
        main(parse(BuildDataset, [f"{key}={value}" for key, value in words.items()]))
    return str(folder / "chips.zarr")


def _is_wanted(scene: Scene) -> bool:
    return isinstance(scene, LabelScene) or (scene.frame.epsg == 32632 and f"{scene.sensed:%Y%m%d}" in DATES)
