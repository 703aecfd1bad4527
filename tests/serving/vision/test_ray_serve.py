"""Two replicas in a real Ray Serve: their answers, and an update to another artifact under load without a lost request.

That test needs Ray Serve's own requirements (the extra ray-serve), and is skipped without them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from quantized_families import quantized_family, write_vit_artifact
from test_replicas import clients, free_ports

from exporters.onnx.export import export_onnx
from exporters.onnx.target import OnnxExportOptions
from fp8pipe.artifact import open_artifact
from fp8pipe.artifact.record import DIGEST_HEADER, VERDICT_HEADER
from fp8pipe.core.errors import ConfigurationError
from serving.vision.ray_serve import RayServeConfig, app


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """Where a Ray Serve on this machine listens."""
    pytest.importorskip("grpc", reason="Ray Serve is not installed: pip install 'fp8pipe[ray-serve]'")
    import ray
    from ray import serve

    (port,) = free_ports(1)
    ray.init(num_cpus=4, include_dashboard=False, logging_level="ERROR")
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()
    ray.shutdown()


def deploy(export: Path) -> str:
    """Deploy two replicas of an export, as `serve deploy` does, and wait for both; returns the digest."""
    from ray import serve

    settings = {"export": str(export), "unvalidated": True, "threads": 1, "max_batch": 4}
    application = app(settings)
    serve.run(application, name="vision", route_prefix="/")
    return f"sha256:{open_artifact(export).digest}"


def test_an_update_under_load_loses_no_request(url: str, export: Path, png: bytes, tmp_path: Path) -> None:
    artifact = write_vit_artifact(tmp_path / "vit", quantized_family("timm-vit", bits=4), images=4)
    newer = export_onnx(artifact.root, tmp_path / "newer", OnnxExportOptions()).root
    old = deploy(export)
    with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
        assert client.get("/readyz").status_code == 200
        about = client.get("/v1/artifact")
        assert f"sha256:{about.json()['digest']}" == about.headers[DIGEST_HEADER] == old
        assert about.headers[VERDICT_HEADER] == "unvalidated"
        assert client.post("/v1/classify", content=b"no image").status_code == 415
    with clients(f"{url}/v1/classify", png) as load:
        assert {digest for _, digest in load.wait(200)} == {old}
        new = deploy(newer)
        load.wait(50)  # those that the old replicas still had
        assert {digest for _, digest in load.wait(200)} == {new}
    assert Counter(answer for answer in load.answers if answer[0] != 200) == Counter()


def test_settings_that_are_rays_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="invalid value") as refused:
        app({"export": "model", "port": 8000, "linger_s": 2})
    assert "port, linger_s cannot be given" in refused.value.why
    assert {"port", "linger_s"} < set(RayServeConfig.model_fields)
