"""Two replicas in a real Ray Serve: their answers, and an update to another artifact under load without a lost request.

That test needs Ray Serve's own requirements (the extra ray-serve), and is skipped without them.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml
from click.testing import CliRunner
from quantized_families import quantized_family, write_vit_artifact
from steady_clients import CLIENTS, clients, free_ports

from exporters.onnx.export import export_onnx
from exporters.onnx.target import OnnxExportOptions
from fp8pipe.artifact import open_artifact
from fp8pipe.artifact.record import DIGEST_HEADER, VERDICT_HEADER
from fp8pipe.core.errors import ConfigurationError
from serving.vision.ray_serve import RayServeConfig, app

CONFIGURATION = Path(__file__).resolve().parents[3] / "deploy" / "ray_serve.yaml"


@pytest.fixture(scope="module")
def places() -> Iterator[tuple[str, int]]:
    """The address of a Ray cluster on this machine, and the port on which its Serve is to listen."""
    pytest.importorskip("grpc_reflection", reason="Ray Serve is not installed: pip install 'fp8pipe[ray-serve]'")
    dashboard, port = free_ports(2)
    with pytest.MonkeyPatch.context() as patch:
        # By default Ray gives its processes a low priority, and ends a proxy that has not started within 5 s: on a busy
        # machine none would.
        patch.setenv("RAY_worker_niceness", "0")
        patch.setenv("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "120")
        patch.setenv("RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S", "120")
        import ray
        from ray import serve

        ray.init(num_cpus=2, include_dashboard=True, dashboard_port=dashboard, logging_level="ERROR")
        yield f"http://127.0.0.1:{dashboard}", port
        serve.shutdown()
        ray.shutdown()


def deploy(export: Path, api: str, port: int, folder: Path) -> str:
    """`serve deploy` deploy/ray_serve.yaml for this export; returns its digest."""
    from ray.serve.scripts import cli

    document = yaml.safe_load(CONFIGURATION.read_text(encoding="utf-8"))
    document["http_options"] = {"host": "127.0.0.1", "port": port}
    (application,) = document["applications"]
    application["args"] = {"export": str(export), "unvalidated": True, "threads": 1, "max_batch": 4}
    (deployment,) = application["deployments"]
    deployment["ray_actor_options"]["num_cpus"] = 0.5
    deployment["autoscaling_config"]["max_replicas"] = 2
    (folder / "ray_serve.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")
    found = CliRunner().invoke(cli, ["deploy", "--address", api, str(folder / "ray_serve.yaml")])
    assert found.exit_code == 0, (found.output, found.exception)
    return f"sha256:{open_artifact(export).digest}"


def wait_until_running(seconds: float = 240) -> None:
    """Wait until both replicas are those of the last deployment."""
    from ray import serve

    until = time.monotonic() + seconds
    while True:
        found = serve.status().applications.get("vision")
        states = None if found is None else [one.replica_states for one in found.deployments.values()]
        if found is not None and found.status == "RUNNING" and states == [{"RUNNING": 2}]:
            return
        assert time.monotonic() < until, found
        time.sleep(0.2)


def test_an_update_under_load_loses_no_request(
    places: tuple[str, int], export: Path, png: bytes, tmp_path: Path
) -> None:
    artifact = write_vit_artifact(tmp_path / "vit", quantized_family("timm-vit", bits=4), images=4)
    newer = export_onnx(artifact.root, tmp_path / "newer", OnnxExportOptions()).root
    old, url = deploy(export, *places, tmp_path), f"http://127.0.0.1:{places[1]}"
    wait_until_running()
    with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
        assert client.get("/readyz").status_code == 200
        about = client.get("/v1/artifact")
        assert f"sha256:{about.json()['digest']}" == about.headers[DIGEST_HEADER] == old
        assert about.headers[VERDICT_HEADER] == "unvalidated"
        assert client.post("/v1/classify", content=b"no image").status_code == 415
    with clients(f"{url}/v1/classify", png) as load:
        assert {digest for _, digest in load.wait(200)} == {old}
        new = deploy(newer, *places, tmp_path)
        wait_until_running()
        load.wait(CLIENTS)  # those that the old replicas still had
        assert {digest for _, digest in load.wait(200)} == {new}
    assert Counter(answer for answer in load.answers if answer[0] != 200) == Counter()
    assert {digest for _, digest in load.answers} == {old, new}


def test_settings_that_are_rays_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="invalid value") as refused:
        app({"export": "model", "port": 8000, "linger_s": 2})
    assert "port, linger_s cannot be given" in refused.value.why
    assert {"port", "linger_s"} < set(RayServeConfig.model_fields)
