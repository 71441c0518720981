"""The KubeRay manifests: accepted by those who read them, safe to run, and their commands are the jobs' own."""

from __future__ import annotations

import importlib
import inspect
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from jsonschema import Draft202012Validator

from jobs.pretrain import Pretrain
from jobs.support.settings import JobSettings, parse
from tests.kuberay_rules import Json, groups, operator_errors, validators, with_value

ROOT = Path(__file__).resolve().parents[1]
KUBERAY = ROOT / "infra" / "kuberay"
CLUSTERS = ("raycluster.yaml", "rayjob-pretrain.yaml", "rayjob-pretrain-64-gpus.yaml")
RAYJOBS = sorted(path.name for path in KUBERAY.glob("rayjob-*.yaml"))
SECRET_NAME = re.compile(r"key|secret|token|password", re.IGNORECASE)


@pytest.fixture(scope="module")
def kinds() -> dict[str, Draft202012Validator]:
    folder = ROOT.parent / "shared" / "kuberay-crds"
    if not folder.is_dir():
        pytest.skip(f"no custom resource definitions at {folder}: KubeRay's schemas are not in the repository")
    return validators(folder)


def documents(name: str) -> list[Json]:
    return list(yaml.safe_load_all((KUBERAY / name).read_text()))


def document(name: str) -> Json:
    (only,) = documents(name)
    return only


def cluster_of(manifest: Json) -> Json:
    spec: Json = manifest["spec"]
    return spec.get("rayClusterSpec", spec)


def pods() -> Iterator[tuple[str, Json]]:
    for name in CLUSTERS:
        for group, spec in groups(cluster_of(document(name))):
            yield f"{name} {group}", spec["template"]


@pytest.mark.parametrize("name", ["raycluster.yaml", *RAYJOBS])
def test_kuberay_takes_every_manifest(name: str, kinds: dict[str, Draft202012Validator]) -> None:
    manifest = document(name)
    errors = [f"{error.json_path}: {error.message}" for error in kinds[manifest["kind"]].iter_errors(manifest)]
    assert errors == []
    assert operator_errors(manifest) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("spec/enableInTreeAutoScaling", True),
        ("spec/workerGroupSpecs/0/template/spec/securityContext/runAsNonroot", True),
        ("spec/workerGroupSpecs/0/template/spec/containers/0/resources/limits/memory", "32 GB"),
        ("spec/authOptions/mode", "tokens"),
        ("spec/workerGroupSpecs/0/maxReplicas", "16"),
        ("apiVersion", "ray.io/v1alpha1"),
    ],
)
def test_a_misspelt_field_or_a_wrong_value_is_refused(
    path: str, value: Any, kinds: dict[str, Draft202012Validator]
) -> None:
    manifest = with_value(document("raycluster.yaml"), path, value)
    assert not kinds["RayCluster"].is_valid(manifest)


@pytest.mark.parametrize(
    ("name", "path", "value", "error"),
    [
        ("raycluster.yaml", "metadata/name", "Twinlook", "DNS label"),
        ("raycluster.yaml", "metadata/name", "t" * 54, "characters"),
        ("raycluster.yaml", "spec/rayVersion", "2.51.0", "2.52"),
        ("raycluster.yaml", "spec/tlsOptions", {}, "feature gate"),
        ("raycluster.yaml", "spec/workerGroupSpecs/0/minReplicas", 17, "maxReplicas 16"),
        ("raycluster.yaml", "spec/enableInTreeAutoscaling", False, "autoscaler v2"),
        ("raycluster.yaml", "spec/autoscalerOptions/version", "v1", "autoscaler v2"),
        ("raycluster.yaml", "spec/headGroupSpec/template/spec/restartPolicy", "Always", "restartPolicy"),
        ("raycluster.yaml", "spec/headGroupSpec/resources", {"CPU": "1"}, "given twice"),
        ("raycluster.yaml", "spec/headGroupSpec/rayStartParams/labels", "a=b", "beside rayStartParams"),
        ("raycluster.yaml", "spec/headGroupSpec/template/spec/containers", [], "no container"),
        ("rayjob-embed.yaml", "spec/backoffLimit", 2, "of the job's own"),
        ("rayjob-embed.yaml", "spec/rayClusterSpec", {"headGroupSpec": {"template": {"spec": {}}}}, "one of"),
        ("rayjob-embed.yaml", "spec/clusterSelector", {}, "ray.io/cluster"),
        ("rayjob-embed.yaml", "spec/ttlSecondsAfterFinished", 60, "shutdownAfterJobFinishes"),
        ("rayjob-pretrain.yaml", "metadata/generateName", "t" * 43, "characters"),
        ("rayjob-pretrain.yaml", "spec/activeDeadlineSeconds", 0, "positive"),
        ("rayjob-pretrain.yaml", "spec/deletionStrategy", {"deletionRules": []}, "deletionRules"),
        ("rayjob-pretrain.yaml", "spec/submissionMode", "InteractiveMode", "InteractiveMode"),
        ("rayjob-pretrain.yaml", "spec/runtimeEnvYAML", "just words", "no mapping"),
        ("rayjob-pretrain.yaml", "spec/rayClusterSpec/upgradeStrategy", {"type": "None"}, "upgradeStrategy"),
        ("rayjob-pretrain.yaml", "spec/rayClusterSpec/workerGroupSpecs/0/minReplicas", None, "are needed"),
    ],
)
def test_what_only_the_operator_knows_is_checked(name: str, path: str, value: Any, error: str) -> None:
    manifest = document(name)
    assert any(error in found for found in operator_errors(with_value(manifest, path, value)))


@pytest.mark.parametrize("name", CLUSTERS)
def test_every_cluster_asks_for_a_token_and_stays_inside(name: str) -> None:
    cluster = cluster_of(document(name))
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["rayVersion"] == ray.__version__
    head = cluster["headGroupSpec"]
    assert head["serviceType"] == "ClusterIP"
    assert not head.get("enableIngress")
    assert head["rayStartParams"]["num-cpus"] == "0"


def test_no_pod_is_root_or_may_become_it() -> None:
    for name, pod in pods():
        spec = pod["spec"]
        assert spec["securityContext"]["runAsNonRoot"], name
        assert spec["securityContext"]["runAsUser"] == 1000, name
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert not spec.keys() & {"hostNetwork", "hostPID", "hostIPC"}, name
        for container in spec["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }, name
            assert not any("hostPort" in port for port in container.get("ports", [])), name
        assert not any("hostPath" in volume for volume in spec["volumes"]), name


def test_every_pod_has_room_that_is_reserved_and_a_store_in_memory() -> None:
    for name, pod in pods():
        (container,) = pod["spec"]["containers"]
        resources = container["resources"]
        assert resources["requests"] == resources["limits"], name
        volumes = {volume["name"]: volume["emptyDir"] for volume in pod["spec"]["volumes"]}
        assert {"name": "shm", "mountPath": "/dev/shm"} in container["volumeMounts"], name
        assert volumes["shm"]["medium"] == "Memory", name
        # Ray takes 30 % of the memory for its store; what is in /dev/shm counts as the container's.
        share = gibibytes(volumes["shm"]["sizeLimit"]) / gibibytes(resources["limits"]["memory"])
        assert 0.3 <= share <= 0.35, name


def gibibytes(quantity: str) -> int:
    return int(quantity.removesuffix("Gi"))


def test_only_who_asks_kubernetes_for_pods_holds_a_token_for_it() -> None:
    for name, pod in pods():
        asks = name == "raycluster.yaml head"
        assert pod["spec"].get("automountServiceAccountToken", True) == asks, name


def test_the_network_policy_covers_every_pod_and_opens_one_port_to_the_operator() -> None:
    account, policy = documents("access.yaml")
    chosen = policy["spec"]["podSelector"]["matchLabels"].items()
    for name, pod in pods():
        assert chosen <= pod["metadata"]["labels"].items(), name
        assert pod["spec"]["serviceAccountName"] == account["metadata"]["name"], name
    among, operator = policy["spec"]["ingress"]
    assert among["from"] == [{"podSelector": {"matchLabels": dict(chosen)}}]
    assert operator["ports"] == [{"protocol": "TCP", "port": 8265}]
    assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]


def test_the_network_policys_rules_are_spelt_as_kubernetes_spells_them(
    kinds: dict[str, Draft202012Validator],
) -> None:
    """KubeRay's definitions hold Kubernetes' own schema of such rules, for clusters that bring their policy along."""
    cluster = kinds["RayCluster"].schema["properties"]["spec"]["properties"]
    rules = cluster["networkPolicy"]["properties"]["workerGroups"]["items"]["properties"]
    fields = {
        "podSelector": rules["ingressRules"]["items"]["properties"]["from"]["items"]["properties"]["podSelector"],
        "policyTypes": {"items": {"enum": ["Ingress", "Egress"]}},
        "ingress": rules["ingressRules"],
        "egress": rules["egressRules"],
    }
    validator = Draft202012Validator({"type": "object", "properties": fields, "additionalProperties": False})
    _, policy = documents("access.yaml")
    assert [f"{error.json_path}: {error.message}" for error in validator.iter_errors(policy["spec"])] == []
    assert not validator.is_valid(with_value(policy["spec"], "ingress/0/from/0/podSelectors", {}))


def test_secrets_come_by_reference_only() -> None:
    for name, pod in pods():
        for variable in pod["spec"]["containers"][0].get("env", []):
            assert not (SECRET_NAME.search(variable["name"]) and "value" in variable), name
    for path in KUBERAY.glob("*.yaml"):
        for manifest in documents(path.name):
            assert manifest["kind"] != "Secret", path.name
            # A runtime_env is shown on the dashboard and in logs.
            assert "runtimeEnvYAML" not in manifest.get("spec", {}), path.name


def test_images_are_those_of_this_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    for name, pod in pods():
        (container,) = pod["spec"]["containers"]
        device = "gpu" if "nvidia.com/gpu" in container["resources"]["limits"] else "cpu"
        assert container["image"].endswith(f"/twinlook:{version}-{device}"), name


def test_there_is_a_manifest_for_each_job_that_is_worth_one() -> None:
    jobs = ("build-dataset", "pretrain", "pretrain-64-gpus", "evaluate", "embed")
    assert set(RAYJOBS) == {f"rayjob-{job}.yaml" for job in jobs}


@pytest.mark.parametrize("name", RAYJOBS)
def test_an_entrypoint_is_a_command_that_the_job_takes(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    python, switch, module, *words = shlex.split(document(name)["spec"]["entrypoint"])
    assert (python, switch) == ("python", "-m")
    assert name.startswith("rayjob-" + module.removeprefix("jobs.").replace("_", "-"))
    try:
        parse(settings_of(module), words)
    except SystemExit:
        pytest.fail(capsys.readouterr().err)


def test_a_job_on_the_cluster_that_shrinks_to_nothing_says_what_machines_it_wants() -> None:
    """Left to itself it would look at the cluster when it starts, and find neither GPUs nor CPUs."""
    selected = [name for name in RAYJOBS if "clusterSelector" in document(name)["spec"]]
    assert selected == ["rayjob-build-dataset.yaml", "rayjob-embed.yaml", "rayjob-evaluate.yaml"]
    for name in selected[1:]:
        words = document(name)["spec"]["entrypoint"].split()
        assert "inference.use_gpu=true" in words, name
        assert any(word.startswith("inference.num_actors=") for word in words), name


@pytest.mark.parametrize("name", [name for name in CLUSTERS if "pretrain" in name])
def test_a_training_has_a_worker_for_every_gpu_and_its_part_of_every_batch(name: str) -> None:
    manifest = document(name)
    (group,) = cluster_of(manifest)["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    gpus = group["replicas"] * int(container["resources"]["limits"]["nvidia.com/gpu"])
    assert group["minReplicas"] == group["maxReplicas"] == group["replicas"]
    settings = parse(settings_of("jobs.pretrain"), shlex.split(manifest["spec"]["entrypoint"])[3:])
    assert isinstance(settings, Pretrain)
    assert settings.num_workers == gpus
    assert settings.global_batch % gpus == 0


def settings_of(module: str) -> type[JobSettings]:
    members = inspect.getmembers(importlib.import_module(module), inspect.isclass)
    (settings,) = (kind for _, kind in members if issubclass(kind, JobSettings) and kind.__module__ == module)
    return settings
