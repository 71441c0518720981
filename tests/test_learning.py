"""A short pretraining is worth something: its embeddings beat an untrained network's and plain band statistics."""

from __future__ import annotations

import pytest

from pipeline.simulation.scenes import LabelScene
from tests.learning import accuracies
from tests.learning_store import scenes_to_learn_from, write_learning_store


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_learning_store(tmp_path_factory.mktemp("learning"))


@pytest.mark.slow
@pytest.mark.usefixtures("small_cluster")
@pytest.mark.filterwarnings("ignore:.* is deprecated:Warning:ray.data.context")
@pytest.mark.filterwarnings("ignore:.* is deprecated:Warning:ray.data._internal")
def test_training_beats_no_training_and_band_statistics_on_held_out_blocks(store: str) -> None:
    # One seed; `tests.ablation` has several, with their spread.
    found = accuracies(store, seed=1)
    shown = "\n".join(f"{name}: {value:.3f}" for name, value in found.items())
    print(shown)  # noqa: T201  # what a person wants to see with -s
    for probe in ("linear", "knn"):
        best = {
            source: max(value for name, value in found.items() if name.startswith(source) and name.endswith(probe))
            for source in ("trained", "untrained", "statistics")
        }
        # The same choice among the three embeddings for both networks.
        assert best["trained"] > best["untrained"], f"{probe}\n{shown}"
        assert best["trained"] > best["statistics"], f"{probe}\n{shown}"


def test_the_scenes_for_learning_are_there() -> None:
    assert len([scene for scene in scenes_to_learn_from() if not isinstance(scene, LabelScene)]) == 4
