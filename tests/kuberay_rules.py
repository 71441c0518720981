"""Whether Kubernetes and KubeRay's operator would take a manifest, found out without either of them.

The schemas come from KubeRay's custom resource definitions, made strict: a field that they do not name is refused,
where Kubernetes would drop it without a word. The rules are those that the operator (1.7) applies in its own code.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator
from packaging.version import Version

Json = dict[str, Any]

_KEPT = ("type", "enum", "pattern", "required", "minimum", "maximum", "minLength", "maxLength", "minItems", "maxItems")
_GATED = ("networkPolicy", "tlsOptions", "historyServerOptions")
_V2_VARIABLE = "RAY_enable_autoscaler_v2"


def validators(crd_folder: Path) -> dict[str, Draft202012Validator]:
    """Kind -> strict validator of its `ray.io/v1`."""
    made = {}
    for path in sorted(crd_folder.glob("ray.io_*.yaml")):
        definition = yaml.load(path.read_text(), Loader=yaml.CSafeLoader)["spec"]
        (version,) = (v for v in definition["versions"] if v["name"] == "v1")
        schema = strict(version["schema"]["openAPIV3Schema"])
        # Of these the definitions say no more than that they are there.
        schema["properties"] |= {"metadata": {"type": "object"}, "apiVersion": {"const": "ray.io/v1"}}
        schema["required"] = ["apiVersion", "kind", "metadata", "spec"]
        made[definition["names"]["kind"]] = Draft202012Validator(schema)
    return made


def strict(schema: Json) -> Json:
    """A structural OpenAPI schema as a JSON Schema that refuses fields which it does not name."""
    made = {key: schema[key] for key in _KEPT if key in schema}
    if schema.get("x-kubernetes-int-or-string"):
        made["type"] = ["integer", "string"]
    elif schema.get("nullable"):
        made["type"] = [schema["type"], "null"]
    if "items" in schema:
        made["items"] = strict(schema["items"])
    if "properties" in schema:
        made["properties"] = {name: strict(field) for name, field in schema["properties"].items()}
    others = schema.get("additionalProperties")
    if isinstance(others, dict):
        made["additionalProperties"] = strict(others)
    elif schema.get("type") == "object" and not schema.get("x-kubernetes-preserve-unknown-fields"):
        made["additionalProperties"] = bool(others) or "properties" not in schema
    return made


def operator_errors(document: Json) -> list[str]:
    """What the operator would say no to although the schema allows it."""
    spec = document["spec"]
    if document["kind"] == "RayCluster":
        return [*_name_errors(document["metadata"], 53), *_cluster_errors(spec)]
    assert document["kind"] == "RayJob", document["kind"]
    errors = [*_name_errors(document["metadata"], 47), *_job_errors(spec)]
    if "rayClusterSpec" in spec:
        errors += _cluster_errors(spec["rayClusterSpec"])
        if "upgradeStrategy" in spec["rayClusterSpec"]:
            errors.append("upgradeStrategy belongs to a RayCluster that a person made")
    return errors


def groups(cluster: Json) -> Iterator[tuple[str, Json]]:
    """Name and specification of the head and of every group of workers."""
    yield "head", cluster["headGroupSpec"]
    for group in cluster.get("workerGroupSpecs", []):
        yield group["groupName"], group


def with_value(manifest: Json, path: str, value: Any) -> Json:
    """A copy with another value at a place such as `spec/containers/0/image`."""
    changed = copy.deepcopy(manifest)
    place: Any = changed
    *parents, last = (int(step) if step.isdigit() else step for step in path.split("/"))
    for step in parents:
        place = place[step]
    place[last] = value
    return changed


def _name_errors(metadata: Json, longest: int) -> Iterator[str]:
    # Kubernetes appends five characters to generateName.
    name = metadata.get("name") or f"{metadata.get('generateName', '')}abcde"
    if len(name) > longest:
        yield f"the name has {len(name)} characters, {longest} is the most"
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        yield f"{name!r} is no DNS label"


def _job_errors(job: Json) -> Iterator[str]:
    shared = "clusterSelector" in job
    mode = job.get("submissionMode", "K8sJobMode")
    if shared == ("rayClusterSpec" in job):
        yield "one of rayClusterSpec and clusterSelector"
    if shared and not job["clusterSelector"].get("ray.io/cluster"):
        yield "clusterSelector names no ray.io/cluster"
    if shared and (job.get("backoffLimit") or job.get("suspend") or mode == "SidecarMode"):
        yield "backoffLimit, suspend and SidecarMode need a cluster of the job's own"
    if job.get("ttlSecondsAfterFinished") and not job.get("shutdownAfterJobFinishes"):
        yield "ttlSecondsAfterFinished needs shutdownAfterJobFinishes"
    if job.get("suspend") and not job.get("shutdownAfterJobFinishes"):
        yield "suspend needs shutdownAfterJobFinishes"
    if "deletionRules" in job.get("deletionStrategy", {}) and job.get("shutdownAfterJobFinishes"):
        yield "either deletionRules or shutdownAfterJobFinishes"
    if mode == "InteractiveMode" and job.get("backoffLimit"):
        yield "backoffLimit is not for InteractiveMode"
    if mode == "SidecarMode" and ("submitterPodTemplate" in job or "submitterConfig" in job):
        yield "SidecarMode has no submitter to configure"
    for deadline in ("activeDeadlineSeconds", "preRunningDeadlineSeconds"):
        if job.get(deadline, 1) <= 0:
            yield f"{deadline} must be positive"
    if job.get("backoffLimit", 0) < 0 or job.get("ttlSecondsAfterFinished", 0) < 0:
        yield "backoffLimit and ttlSecondsAfterFinished must not be negative"
    if not isinstance(yaml.safe_load(job.get("runtimeEnvYAML", "{}")), dict):
        yield "runtimeEnvYAML holds no mapping"


def _cluster_errors(cluster: Json) -> Iterator[str]:
    version = Version(str(cluster.get("rayVersion", "0")))
    scaling = bool(cluster.get("enableInTreeAutoscaling"))
    second = scaling and cluster.get("autoscalerOptions", {}).get("version", "v2") == "v2"
    if cluster.get("authOptions", {}).get("mode") == "token" and version < Version("2.52"):
        yield "a token needs rayVersion 2.52 or later"
    for field in _GATED:
        if field in cluster:
            yield f"{field} is behind a feature gate that is off by default"
    for name, group in groups(cluster):
        yield from (f"{name}: {error}" for error in _group_errors(group, second))
        if name == "head":
            continue
        fewest, most = group.get("minReplicas"), group.get("maxReplicas")
        if not scaling and (fewest is None or most is None):
            yield f"{name}: minReplicas and maxReplicas are needed without autoscaling"
        if fewest is not None and most is not None and not 0 <= fewest <= most:
            yield f"{name}: minReplicas {fewest} and maxReplicas {most}"
        if scaling and group.get("suspend"):
            yield f"{name}: suspend is not for autoscaling"
        if not second and ("idleTimeoutSeconds" in group or group.get("priority")):
            yield f"{name}: idleTimeoutSeconds and priority need autoscaler v2"
        if group.get("priority") and version < Version("2.56"):
            yield f"{name}: priority needs rayVersion 2.56 or later"


def _group_errors(group: Json, second_autoscaler: bool) -> Iterator[str]:
    start, pod = group.get("rayStartParams", {}), group["template"]["spec"]
    if not pod.get("containers"):
        yield "no container"
        return
    if group.get("resources") and start.keys() & {"num-cpus", "num-gpus", "memory", "resources"}:
        yield "resources are given twice, in rayStartParams and beside it"
    if "labels" in start:
        yield "labels belong beside rayStartParams"
    if second_autoscaler and pod.get("restartPolicy", "Never") != "Never":
        yield "autoscaler v2 needs restartPolicy Never"
    variables = {variable["name"] for variable in pod["containers"][0].get("env", [])}
    if _V2_VARIABLE in variables:
        yield f"{_V2_VARIABLE} is set by autoscalerOptions.version"
    if variables & {"RAY_REDIS_ADDRESS", "REDIS_PASSWORD", "REDIS_USERNAME"}:
        yield "Redis is set by gcsFaultToleranceOptions"
