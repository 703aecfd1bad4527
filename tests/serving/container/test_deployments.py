"""Kubernetes and KServe files: they are valid, and every command, path, port, label and metric in them exists.

The structure is checked against Kubernetes' own schemas, as the package kubernetes-validate has them, where it is
installed. Of an InferenceService, that part is checked which is a pod's.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from fp8pipe.cli import main
from fp8pipe.core.config import build_config
from serving.config import LanguageConfig, VisionConfig
from serving.http.admission import OPEN_PATHS
from serving.vision.batcher import VisionMetrics
from serving.vision.ray_serve import RayServeConfig

DEPLOY = Path(__file__).resolve().parents[3] / "deploy"
DOCKERFILE = (DEPLOY.parent / "Dockerfile").read_text(encoding="utf-8")
VISION = ("kubernetes-vision.yaml", "kserve.yaml")
MANIFESTS = ("kubernetes.yaml", *VISION)
# Fields of a predictor that are KServe's and not a pod's.
_KSERVE = {"minReplicas", "maxReplicas", "autoScaling", "deploymentStrategy", "annotations"}


def documents(name: str) -> dict[str, Any]:
    """The documents of a file by their kind."""
    return {found["kind"]: found for found in yaml.safe_load_all((DEPLOY / name).read_text(encoding="utf-8"))}


def pod_of(name: str) -> dict[str, Any]:
    found = documents(name)
    if "Deployment" in found:
        return found["Deployment"]["spec"]["template"]["spec"]
    return {key: value for key, value in found["InferenceService"]["spec"]["predictor"].items() if key not in _KSERVE}


def command_of(container: dict[str, Any]) -> list[str]:
    """What a container runs, from the image's entry point if it names no command."""
    target = container["image"].removeprefix("fp8pipe:")
    assert re.search(rf"^FROM .* AS {target}$", DOCKERFILE, re.M), target
    entry = json.loads(re.findall(r"^ENTRYPOINT (.*)$", DOCKERFILE, re.M)[-1])
    return [*container.get("command", entry), *container.get("args", ())]


def parsed(command: list[str]) -> dict[str, Any]:
    """The options of a command line of fp8pipe; fails if one does not exist."""
    program, name, *arguments = command
    assert program == "fp8pipe"
    with click.Context(main) as above:
        found = main.get_command(above, name)
        assert found is not None, name
        return found.make_context(name, arguments, parent=above).params


def metrics_in(text: str) -> set[str]:
    return set(re.findall(r"fp8pipe_\w+", text))


@pytest.mark.parametrize("name", MANIFESTS)
def test_commands_ports_and_mounts_exist(name: str) -> None:
    pod = pod_of(name)
    (verify,), (serve,) = pod["initContainers"], pod["containers"]
    checked, options = parsed(command_of(verify)), parsed(command_of(serve))
    (port,) = serve["ports"]
    assert port["containerPort"] == options["port"] == 8000
    assert options["host"] == "0.0.0.0"
    probes = [serve[kind]["httpGet"] for kind in ("startupProbe", "readinessProbe", "livenessProbe")]
    assert [probe["path"] for probe in probes] == ["/readyz", "/readyz", "/healthz"]
    assert {probe["path"] for probe in probes} <= OPEN_PATHS  # a probe has no key
    assert {probe["port"] for probe in probes} <= {port["name"], port["containerPort"]}
    mounts = {one["name"]: {mount["name"]: mount["mountPath"] for mount in one["volumeMounts"]}
              for one in (verify, serve)}  # fmt: skip
    assert mounts["verify"]["model"] == mounts[serve["name"]]["model"] == str(checked["directory"])
    assert options["export"] == checked["directory"]
    assert checked["quick"]  # the images have no torch
    assert Path(mounts[serve["name"]]["record"]) in options["record"].parents
    used = {volume for mounted in mounts.values() for volume in mounted}
    assert used == {volume["name"] for volume in pod["volumes"]}
    for container in (verify, serve):
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
        assert container["image"] == serve["image"]


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_pod_that_ends_has_time_for_its_requests(name: str) -> None:
    pod, kind = pod_of(name), VisionConfig if name in VISION else LanguageConfig
    options = parsed(command_of(pod["containers"][0]))
    linger_s = options["linger_s"] or 0
    assert linger_s >= 10  # until all nodes have taken the pod out of the service
    if kind is VisionConfig:
        longest_s = linger_s + VisionConfig().request_timeout_s + VisionConfig().body_timeout_s
    else:
        longest_s = max(linger_s, LanguageConfig().drain_seconds)
    assert pod["terminationGracePeriodSeconds"] >= longest_s + 10


@pytest.mark.parametrize("name", MANIFESTS)
def test_an_update_takes_no_pod_before_another_is_ready(name: str) -> None:
    found = documents(name)
    if "Deployment" in found:
        spec = found["Deployment"]["spec"]
        strategy, labels = spec["strategy"], spec["template"]["metadata"]["labels"]
        assert spec["selector"]["matchLabels"] == labels == found["Service"]["spec"]["selector"]
        assert found["Service"]["spec"]["ports"][0]["targetPort"] == pod_of(name)["containers"][0]["ports"][0]["name"]
    else:
        service = found["InferenceService"]
        strategy = service["spec"]["predictor"]["deploymentStrategy"]
        labels = {"serving.kserve.io/inferenceservice": service["metadata"]["name"]}  # which KServe gives its pods
    assert strategy == {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}}
    budget = found["PodDisruptionBudget"]["spec"]
    assert budget == {"maxUnavailable": 1, "selector": {"matchLabels": labels}}


def test_pods_follow_a_metric_that_the_service_exports() -> None:
    exported = metrics_in(VisionMetrics().text().decode())
    found = documents("kubernetes-vision.yaml")
    autoscaler, deployment = found["HorizontalPodAutoscaler"]["spec"], found["Deployment"]
    assert autoscaler["scaleTargetRef"] == {
        "apiVersion": deployment["apiVersion"], "kind": "Deployment", "name": deployment["metadata"]["name"]
    }  # fmt: skip
    assert "replicas" not in deployment["spec"]
    (metric,) = autoscaler["metrics"]
    assert metric["pods"]["metric"]["name"] in exported
    service = documents("kserve.yaml")["InferenceService"]
    (metric,) = service["spec"]["predictor"]["autoScaling"]["metrics"]
    query = metric["external"]["metric"]["query"]
    assert metrics_in(query) <= exported
    assert f'pod=~"{service["metadata"]["name"]}-predictor-.*"' in query
    for one in (autoscaler, service["spec"]["predictor"]):
        assert 2 <= one["minReplicas"] < one["maxReplicas"]


@pytest.mark.parametrize("name", MANIFESTS)
def test_prometheus_scrapes_the_port(name: str) -> None:
    found = documents(name)
    above = found.get("Deployment", {}).get("spec", {}).get("template", {}).get("metadata")
    annotations = (above or found["InferenceService"]["spec"]["predictor"])["annotations"]
    port = str(pod_of(name)["containers"][0]["ports"][0]["containerPort"])
    assert annotations == {
        "prometheus.io/scrape": "true", "prometheus.io/port": port, "prometheus.io/path": "/metrics"
    }  # fmt: skip


@pytest.mark.parametrize("name", MANIFESTS)
def test_kubernetes_schemas_accept_every_document(name: str) -> None:
    schemas = pytest.importorskip("kubernetes_validate")
    for kind, document in documents(name).items():
        if kind == "InferenceService":
            document = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "predictor"}, "spec": pod_of(name)}
        schemas.validate(document, "1.31", strict=True)


def test_ray_gets_settings_that_exist() -> None:
    (document,) = yaml.safe_load_all((DEPLOY / "ray_serve.yaml").read_text(encoding="utf-8"))
    (application,) = document["applications"]
    config = build_config(RayServeConfig, application["args"])
    module, _, name = application["import_path"].partition(":")
    assert (module, name) == (RayServeConfig.__module__, "app")
    (deployment,) = application["deployments"]
    assert config.threads == deployment["ray_actor_options"]["num_cpus"]
    assert deployment["graceful_shutdown_timeout_s"] >= config.request_timeout_s
    schema = pytest.importorskip("ray.serve.schema")
    assert schema.ServeDeploySchema.model_validate(document).applications[0].name == "vision"


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_file_says_what_has_to_be_there_before(name: str) -> None:
    """A pod whose claim, ConfigMap or Secret is missing waits without end."""
    files = [name, "kubernetes-vision.yaml"] if name == "kserve.yaml" else [name]  # it refers to that one
    comments = "\n".join(re.findall("^# .*", "\n".join((DEPLOY / file).read_text() for file in files), re.M))
    assert "image of your registry" in comments
    made = [source for volume in pod_of(name)["volumes"] for source in volume.values() if isinstance(source, dict)]
    needed = {source[key] for source in made for key in ("claimName", "secretName", "name") if key in source}
    assert needed
    assert all(re.search(rf"(claim|configmap|secret generic) {one}\b", comments) for one in needed)
