"""What makes a node: the launcher's file, the image, the pinned versions, and the check that every change passes."""

from __future__ import annotations

import importlib
import json
import os
import re
import tomllib
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path

import pytest
import ray
import yaml
from jsonschema import Draft7Validator
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.kuberay_rules import Json, with_value

ROOT = Path(__file__).resolve().parents[1]
DOCKERFILE = ROOT / "infra" / "Dockerfile"
PROJECT: Json = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def launcher() -> Json:
    loaded: Json = yaml.safe_load((ROOT / "infra" / "cluster.yaml").read_text())
    return loaded


def launcher_schema() -> Draft7Validator:
    schema = Path(ray.__file__).parent / "autoscaler" / "ray-schema.json"
    return Draft7Validator(json.loads(schema.read_text()))


def prepared_launcher() -> Json:
    """The file as the launcher sees it, with what it fills in."""
    prepare: Callable[[Json], Json] = importlib.import_module("ray.autoscaler._private.util").prepare_config
    return prepare(launcher())


def test_rays_launcher_takes_the_cluster_file() -> None:
    for config in (launcher(), prepared_launcher()):
        assert [f"{error.json_path}: {error.message}" for error in launcher_schema().iter_errors(config)] == []


@pytest.mark.parametrize("path", ["docker/images", "available_node_types/gpu/max_worker", "idle_timeout"])
def test_a_misspelt_field_of_the_cluster_file_is_refused(path: str) -> None:
    assert not launcher_schema().is_valid(with_value(launcher(), path, 1))


def test_the_launcher_adds_nothing_of_its_own_to_a_node() -> None:
    prepared = prepared_launcher()
    for commands in ("setup_commands", "head_setup_commands", "worker_setup_commands", "initialization_commands"):
        assert prepared[commands] == [], commands


def test_a_launched_cluster_asks_for_a_token_and_shows_its_dashboard_to_itself_only() -> None:
    config = launcher()
    variables = dict(re.findall(r"--env (\w+)=(\S+)", " ".join(config["docker"]["run_options"])))
    # Nothing else: what a job needs to know in secret is in a file that is not here.
    (secrets,) = config["file_mounts"]
    assert variables == {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": f"{secrets}/auth_token"}
    (start,) = (line for line in config["head_start_ray_commands"] if "ray start" in line)
    assert "--dashboard-host=127.0.0.1" in start
    for line in (start, *config["worker_start_ray_commands"][1:]):
        assert line.startswith(f"set -a && . {secrets}/environment && set +a &&")


def test_a_launched_head_runs_no_tasks_and_no_node_hands_out_its_role() -> None:
    kinds = launcher()["available_node_types"]
    assert kinds["head"]["resources"] == {"CPU": 0}
    for name, kind in kinds.items():
        assert kind["node_config"]["MetadataOptions"] == {"HttpTokens": "required"}, name


def test_launched_nodes_run_the_images_of_this_version() -> None:
    config = launcher()
    images = [
        config["docker"]["head_image"],
        config["docker"]["worker_image"],
        config["available_node_types"]["gpu"]["docker"]["worker_image"],
    ]
    flavours = ("aws-head", "cpu", "gpu")
    assert [image.partition("/twinlook:")[2] for image in images] == [f"{PROJECT['version']}-{f}" for f in flavours]


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile as (INSTRUCTION, rest), comments left out and continued lines joined."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(word.upper(), rest) for word, _, rest in (line.partition(" ") for line in joined.splitlines())]


def stages() -> dict[str, list[tuple[str, str]]]:
    """Stage name -> its instructions after FROM; the last one has none and is called `final`."""
    found: dict[str, list[tuple[str, str]]] = {}
    for word, rest in instructions():
        if word == "FROM":
            name = rest.partition(" AS ")[2] or "final"
            found[name] = [(word, rest)]
        elif found:
            found[name].append((word, rest))
    return found


def test_the_image_has_only_instructions_that_docker_knows() -> None:
    known = {"ARG", "FROM", "ENV", "WORKDIR", "COPY", "RUN", "USER", "ENTRYPOINT", "CMD"}
    assert {word for word, _ in instructions()} <= known


def test_no_stage_that_is_run_ends_as_root_or_opens_a_port() -> None:
    made = stages()
    for name in ("node", "aws-head"):
        assert [rest for word, rest in made[name] if word == "USER"][-1] == "1000:1000", name
    assert made["final"] == [("FROM", "node")]
    assert not any(word == "EXPOSE" for word, _ in instructions())


def test_ray_in_the_image_asks_for_a_token_and_its_processes_are_reaped() -> None:
    node = stages()["node"]
    assert any(word == "ENV" and "RAY_AUTH_MODE=token" in rest.split() for word, rest in node)
    assert ("ENTRYPOINT", '["/usr/bin/tini", "--"]') in node


def test_the_venv_is_on_the_path_of_login_shells_too() -> None:
    runs = [rest for word, rest in stages()["node"] if word == "RUN"]
    assert any("PATH=/opt/venv/bin" in rest and "/etc/profile.d/" in rest for rest in runs)


def test_what_the_image_copies_exists_and_reaches_the_builder() -> None:
    ignore = (ROOT / "infra" / "Dockerfile.dockerignore").read_text().splitlines()
    allowed = {line.removeprefix("!") for line in ignore if line.startswith("!")}
    assert "*" in ignore
    copied = {
        source
        for word, rest in instructions()
        if word == "COPY" and not rest.startswith("--from")
        for source in rest.split()[:-1]
    }
    assert copied == allowed
    for source in copied:
        assert (ROOT / source).exists(), source


def test_everything_in_the_image_has_a_pinned_version() -> None:
    installs = [
        command
        for word, rest in instructions()
        if word == "RUN"
        for command in rest.split("&&")
        if re.search(r"\bpip (install|wheel)\b", command)
    ]
    assert len(installs) == 6
    for command in installs:
        by_constraints = "-c infra/constraints.txt" in command
        exact = all("==" in word for word in command.split() if re.match(r"^[a-z0-9-]+[=<>]", word))
        assert by_constraints or "--no-deps" in command or (exact and "==" in command), command


def constraints() -> dict[str, str]:
    lines = (ROOT / "infra" / "constraints.txt").read_text().splitlines()
    pins = [line.split("==") for line in lines if line and not line.startswith("#")]
    assert all(len(pin) == 2 for pin in pins), pins
    names = [canonicalize_name(name) for name, _ in pins]
    assert len(names) == len(set(names))
    return dict(zip(names, (version for _, version in pins), strict=True))


def needed(requirements: Iterable[str], extra: str = "", seen: set[str] | None = None) -> set[str]:
    """Names of what is installed because of these requirements, theirs included."""
    seen = set() if seen is None else seen
    for requirement in map(Requirement, requirements):
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        for wanted in ("", *sorted(requirement.extras)):
            key = f"{canonicalize_name(requirement.name)}[{wanted}]"
            if key not in seen:
                seen.add(key)
                needed(metadata.requires(requirement.name) or [], wanted, seen)
    return seen


def test_constraints_pin_everything_that_the_project_brings_to_what_is_installed_here() -> None:
    pins = constraints()
    extras = PROJECT["optional-dependencies"]
    asked = [*PROJECT["dependencies"], *(line for lines in extras.values() for line in lines)]
    asked = [line for line in asked if not line.startswith("twinlook[")]
    # torch's CUDA build brings NVIDIA's libraries, each pinned by torch.
    names = {key.partition("[")[0] for key in needed(asked)}
    names = {name for name in names if not name.startswith(("nvidia-", "cuda-", "triton"))}
    assert names <= pins.keys()
    assert {name: Version(metadata.version(name)).public for name in names} == {name: pins[name] for name in names}


def test_torch_is_the_same_version_wherever_it_is_installed() -> None:
    pinned = {constraints()["torch"]}
    for path in (DOCKERFILE, ROOT / "Makefile"):
        assert set(re.findall(r"torch==([\w.]+)", path.read_text())) == pinned, path.name


def test_ci_runs_the_tests_and_the_linters() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    text = script.read_text()
    assert text.startswith("#!/usr/bin/env bash\n")
    for line in ("set -euo pipefail", "make test || failed=1", "make lint || failed=1", 'exit "$failed"'):
        assert f"\n{line}\n" in text


def test_the_workflow_does_the_same_with_actions_that_cannot_change() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    assert workflow["permissions"] == {"contents": "read"}
    (job,) = workflow["jobs"].values()
    *actions, last = job["steps"]
    assert last == {"run": ".ci/run"}
    for action in actions:
        assert re.fullmatch(r"actions/[a-z-]+@[0-9a-f]{40}", action["uses"]), action
