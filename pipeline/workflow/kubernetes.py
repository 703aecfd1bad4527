"""Kubernetes Jobs for the stages of a recipe: each runs `fp8pipe run --only STAGE` on a volume that all share.

Kubernetes starts Jobs in no order, so each has a file of its own, which is created when the one before is complete. The
recipe itself, with its overrides, is a ConfigMap. Manifests are plain data, so that no client library is needed.
"""

from __future__ import annotations

import hashlib
import re
from typing import Any, Final

import yaml

from pipeline.workflow.recipe import Recipe, StageSpec

__all__ = ["job_manifest", "recipe_manifest"]

_WORKSPACE: Final = "/workspace"
_RECIPE: Final = "/recipe"
_RECIPE_FILE: Final = "recipe.yaml"
_USER: Final = 10001  # that of the images and of deploy/kubernetes.yaml
_STOP_S: Final = 90  # `fp8pipe run` gives an interrupted stage 60 s
# Exit codes after which another try would end in the same way: all errors but a process that was killed. Several
# processes of which one was killed do not end with 1, as torchrun does, see `WorkflowRunner._finished`.
_FINAL_CODES: Final = (1, 2, 10, 11, 12, 13, 14, 15)


def recipe_manifest(recipe: Recipe, run: str) -> dict[str, Any]:
    """The ConfigMap with the recipe that the Jobs of a run use; `run` is the directory of the run on the volume."""
    text = yaml.safe_dump(recipe.plain(), sort_keys=False, allow_unicode=True)
    return {
        "apiVersion": "v1", "kind": "ConfigMap", "metadata": _metadata(recipe, run),
        "data": {_RECIPE_FILE: text},
    }  # fmt: skip


def job_manifest(recipe: Recipe, spec: StageSpec, *, image: str, claim: str, run: str) -> dict[str, Any]:
    """The Job of one stage.

    Args:
        recipe: the recipe, with its overrides.
        spec: the stage.
        image: an image with `fp8pipe` and what the stage's command needs.
        claim: the PersistentVolumeClaim of the volume that all stages share; the working directory is its root.
        run: directory of the run on that volume.
    """
    metadata = _metadata(recipe, run, spec)
    pod = {
        "restartPolicy": "Never", "automountServiceAccountToken": False, "terminationGracePeriodSeconds": _STOP_S,
        "securityContext": {
            "runAsNonRoot": True, "runAsUser": _USER, "runAsGroup": _USER, "fsGroup": _USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [_container(spec, image, run)],
        "volumes": [
            {"name": "workspace", "persistentVolumeClaim": {"claimName": claim}},
            {"name": "recipe", "configMap": {"name": _metadata(recipe, run)["name"]}},
            {"name": "tmp", "emptyDir": {}},
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "2Gi"}},
        ],
    }  # fmt: skip
    return {
        "apiVersion": "batch/v1", "kind": "Job", "metadata": metadata,
        "spec": {
            "backoffLimit": 3,  # a stage that was killed continues from its checkpoint; evictions are not counted
            "podFailurePolicy": {
                "rules": [
                    {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                    {"action": "FailJob", "onExitCodes": {"operator": "In", "values": list(_FINAL_CODES)}},
                ]
            },
            "template": {"metadata": {"labels": dict(metadata["labels"])}, "spec": pod},
        },
    }  # fmt: skip


def _container(spec: StageSpec, image: str, run: str) -> dict[str, Any]:
    gpus = gpus_of(spec)
    words = ["fp8pipe", "run", f"{_RECIPE}/{_RECIPE_FILE}", f"--output={run}", "--only", spec.name]
    # An image of CUDA may show all GPUs of a node to a container that has asked for none.
    hidden = [] if gpus else [{"name": "CUDA_VISIBLE_DEVICES", "value": ""}]
    found: dict[str, Any] = {
        "name": "stage", "image": image, "workingDir": _WORKSPACE,
        "command": [word.replace("$", "$$") for word in words],  # Kubernetes would put variables in place of $(NAME)
        "env": [{"name": "HOME", "value": "/tmp"}, *hidden],
        "securityContext": {
            "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [
            {"name": "workspace", "mountPath": _WORKSPACE},
            {"name": "recipe", "mountPath": _RECIPE, "readOnly": True},
            {"name": "tmp", "mountPath": "/tmp"},
            {"name": "shm", "mountPath": "/dev/shm"},
        ],
    }  # fmt: skip
    requests = {} if spec.resources.cpus is None else {"cpu": str(spec.resources.cpus)}
    limits = {"nvidia.com/gpu": str(gpus)} if gpus else {}
    if spec.resources.memory is not None:
        requests["memory"] = limits["memory"] = str(spec.resources.memory)
    resources = {name: values for name, values in (("requests", requests), ("limits", limits)) if values}
    return {**found, "resources": resources} if resources else found


def gpus_of(spec: StageSpec) -> int:
    """GPUs that the Job of a stage asks for: those that the recipe names, or one if its `device` is `cuda`."""
    if spec.resources.gpus is None:
        return int(spec.settings.get("device") == "cuda")
    return spec.resources.gpus


def _metadata(recipe: Recipe, run: str, spec: StageSpec | None = None) -> dict[str, Any]:
    """Name and labels of the Job of a stage, or of the ConfigMap."""
    stage = [] if spec is None else [spec.name]
    # Always with a digest: two runs of a recipe, or stage c of a-b and stage b-c of a, must not replace each other.
    name = _digested("-".join([recipe.name, *(stage or ["recipe"])]), "\0".join([recipe.name, run, *stage]))
    # Not `app: fp8pipe`, by which the service of deploy/kubernetes.yaml selects its pods.
    labels = {"fp8pipe/recipe": _label(recipe.name), "fp8pipe/run": _label(run)}
    return {"name": name, "labels": labels | ({} if spec is None else {"fp8pipe/stage": _label(spec.name)})}


def _label(text: str) -> str:
    """A value that Kubernetes accepts (RFC 1123, at most 63 characters): `text`, or its start and its digest."""
    return text if _plain(text) == text and len(text) <= 63 else _digested(text, text)


def _digested(text: str, whole: str) -> str:
    """A name that Kubernetes accepts: the start of `text`, and a digest of `whole`."""
    return f"{_plain(text)[:54].rstrip('-')}-{hashlib.sha256(whole.encode()).hexdigest()[:8]}".lstrip("-")


def _plain(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
