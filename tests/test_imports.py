"""Who may import what: the layers, where each engine appears, and that importing a job does nothing."""

from __future__ import annotations

import ast
import fnmatch
import importlib.metadata
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(
    path.relative_to(ROOT).as_posix()
    for package in ("pipeline", "model", "jobs")
    for path in (ROOT / package).rglob("*.py")
)

STANDARD_LIBRARY = (*sys.stdlib_module_names,)

# What files of a layer may import at all; nothing said is everything.
ONLY = {
    "model/*": ("torch", "safetensors", "model", *STANDARD_LIBRARY),
}

# What files of a layer may not import. A star stands for folders too, as it does in all patterns here.
NEVER = {
    "pipeline/*": ("torch", "model", "jobs"),
    "model/*": ("pipeline", "jobs"),
}

# Where in `pipeline` and in the jobs themselves an engine appears; `jobs/support` is free to use them.
WHERE = {
    # Work that is spread over the cluster, and the actor that all of it asks; Ray Data's own noise.
    "ray": (
        *(
            f"pipeline/{name}*.py"
            for name in ("ingest", "feed", "whole_chips", "search", "matching", "label_fractions", "broker", "quiet")
        ),
        "jobs/*.py",
    ),
    # Pixels of archives are read in the reader only, those of other datasets where they are imported. The simulator
    # writes the archive that is read.
    "rasterio": ("pipeline/reader*.py", "pipeline/imports/rasters.py", "pipeline/simulation/*.py"),
    "stackstac": ("pipeline/reader*.py",),
    # The store, the shards that it is written as, the objects that both lie in; and the dataset that comes in Zarr.
    "zarr": ("pipeline/store*.py", "pipeline/shards*.py", "pipeline/objects*.py", "pipeline/imports/ssl4eo_v11.py"),
    "pystac_client": ("pipeline/catalog*.py",),
}


def imported(source: str) -> Iterator[str]:
    """Dotted names of all modules that a file imports, anywhere in it, also by `import_module("...")`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            # What is imported may be a module too: `from jobs import embed`.
            yield from (f"{node.module}.{name.name}" for name in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from (argument.value for argument in node.args[:1] if isinstance(argument, ast.Constant))


def broken_rules(path: str, source: str) -> list[str]:
    """What a file may not import but does.

    Args:
        path: From the top of the repository, such as `pipeline/feed.py`.
        source: Of the file.
    """
    modules = sorted(set(imported(source)))
    tops = {module.partition(".")[0] for module in modules}
    is_job = path.startswith("jobs/") and not path.startswith("jobs/support/")
    broken = []
    for pattern, allowed in ONLY.items():
        if fnmatch.fnmatch(path, pattern):
            only = "torch, safetensors, the standard library"
            broken += [f"{path} imports {top}: {pattern} has {only}" for top in tops - {*allowed}]
    for pattern, refused in NEVER.items():
        if fnmatch.fnmatch(path, pattern):
            broken += [f"{path} imports {top}: never in {pattern}" for top in tops & {*refused}]
    for top, places in WHERE.items():
        if (
            top in tops
            and (is_job or path.startswith("pipeline/"))
            and not any(fnmatch.fnmatch(path, p) for p in places)
        ):
            broken.append(f"{path} imports {top}: it belongs into {' '.join(places)}")
    if {"ray", "torch"} <= tops and not path.startswith("jobs/support/"):
        broken.append(f"{path} imports Ray and torch: both together are for jobs/support")
    broken += [f"{path} imports the job {module}" for module in modules if is_a_job(module)]
    return broken


def is_a_job(module: str) -> bool:
    package, _, rest = module.partition(".")
    return package == "jobs" and rest.partition(".")[0] not in ("", "support")


def side_effects(source: str) -> list[str]:
    """Statements of a module that do something when it is imported, rather than define something."""
    found = []
    for node in ast.parse(source).body:
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        is_entry = isinstance(node, ast.If) and ast.unparse(node.test) in ("__name__ == '__main__'", "TYPE_CHECKING")
        defines = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
        if not (is_docstring or is_entry or isinstance(node, defines)):
            found.append(f"line {node.lineno}: {ast.unparse(node)}")
    return found


@pytest.mark.parametrize("path", FILES)
def test_a_file_imports_what_its_place_allows(path: str) -> None:
    assert broken_rules(path, (ROOT / path).read_text()) == []


@pytest.mark.parametrize(
    ("path", "source", "rule"),
    [
        ("pipeline/feed.py", "import torch", "never in pipeline"),
        ("pipeline/feed.py", "from torch.utils import data", "never in pipeline"),
        ("pipeline/feed.py", "from model.croma import Croma", "never in pipeline"),
        ("pipeline/simulation/scenes.py", "def f():\n    import torch", "never in pipeline"),
        ("pipeline/grid.py", "import importlib\nimportlib.import_module('torch')", "never in pipeline"),
        ("pipeline/grid.py", "from jobs.support.job import connect", "never in pipeline"),
        ("pipeline/grid.py", "import ray.data", "belongs into pipeline/ingest"),
        ("pipeline/screening.py", "import rasterio", "belongs into pipeline/reader"),
        ("pipeline/simulation/cog.py", "import stackstac", "belongs into pipeline/reader"),
        ("pipeline/feed.py", "from zarr.storage import ObjectStore", "belongs into pipeline/store"),
        ("pipeline/reader.py", "import pystac_client", "belongs into pipeline/catalog"),
        ("model/croma.py", "import numpy as np", "torch, safetensors, the standard library"),
        ("model/croma.py", "from pipeline.bands import OPTICAL_BANDS", "never in model"),
        ("model/croma.py", "import ray", "torch, safetensors, the standard library"),
        ("jobs/pretrain.py", "import ray\nimport torch", "both together"),
        ("jobs/pretrain.py", "import zarr", "belongs into pipeline/store"),
        ("jobs/embed.py", "from jobs import build_dataset", "the job jobs.build_dataset"),
        ("jobs/support/job.py", "from jobs.pretrain import main", "the job jobs.pretrain"),
    ],
)
def test_a_forbidden_import_is_seen(path: str, source: str, rule: str) -> None:
    assert any(rule in broken for broken in broken_rules(path, source))


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("pipeline/ingest.py", "from ray.data import DataContext"),
        ("pipeline/reader.py", "import rasterio, stackstac, dask"),
        ("pipeline/simulation/cog.py", "from rasterio.crs import CRS"),
        ("model/croma.py", "import math\nfrom torch import nn\nfrom model.layers import Block"),
        ("jobs/support/training_loop.py", "import ray.train\nimport torch\nfrom model import croma"),
        ("jobs/pretrain.py", "from jobs.support.job import run_job\nfrom pipeline.feed import Feed"),
    ],
)
def test_an_allowed_import_is_let_through(path: str, source: str) -> None:
    assert broken_rules(path, source) == []


def test_no_job_has_the_name_of_a_module_that_it_would_hide() -> None:
    """With `python jobs/NAME.py` the folder comes first on the path, and hides what has the same name."""
    ours = {"pipeline", "model", "jobs"}
    others = {*STANDARD_LIBRARY, *importlib.metadata.packages_distributions()} - ours
    names = {path.stem for path in (ROOT / "jobs").iterdir()} - {"__init__", "__pycache__"}
    assert names & (others | ours) == set()


@pytest.mark.parametrize("path", [path for path in FILES if path.startswith("jobs/")])
def test_a_job_only_defines_things_when_it_is_imported(path: str) -> None:
    assert side_effects((ROOT / path).read_text()) == []


@pytest.mark.parametrize("source", ["print('hello')", "ray.init()", "for x in y: pass", "with open('a') as f: pass"])
def test_a_module_that_does_something_is_seen(source: str) -> None:
    assert side_effects(f'"""Docstring."""\nimport ray\nX = 1\n{source}') != []


def test_importing_all_jobs_prints_nothing_starts_nothing_and_leaves_nothing_behind(tmp_path: Path) -> None:
    modules = [path.removesuffix(".py").replace("/", ".") for path in FILES if path.startswith("jobs/")]
    program = "\n".join(
        [
            "import importlib, os, pathlib, threading",
            *(f"importlib.import_module({module.removesuffix('.__init__')!r})" for module in modules),
            "import ray",
            "assert not ray.is_initialized()",
            "assert threading.active_count() == 1, threading.enumerate()",
            "children = pathlib.Path(f'/proc/{os.getpid()}/task/{os.getpid()}/children')",
            "assert not children.exists() or not children.read_text()",
        ]
    )
    # matplotlib makes a cache in the home directory: that is not where the job runs.
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    environment = {"PATH": "", "PYTHONPATH": str(ROOT), "HOME": str(home), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=here, env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(here.iterdir()) == []
