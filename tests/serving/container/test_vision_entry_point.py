"""The vision image's command, in an environment of its pinned requirements: from readiness to an orderly end."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import stat
import subprocess
import threading
from importlib.metadata import version
from pathlib import Path

import httpx
import numpy as np
import pytest
from bare_environment import bare_environment
from PIL import Image
from records import write_sound_record
from tiny_exports import write_export

from exporters.graph.runtime import open_session
from fp8pipe.models.vision.preprocessing import Preprocessing, read_model_file
from serving.vision.server import probabilities

_HEAVY = ["torch", "onnx", "onnx_ir", "transformers", "safetensors"]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """(process, URL, folder) of the running service; the export cannot be written to, and neither can the home."""
    folder = tmp_path_factory.mktemp("image")
    python = bare_environment(folder / "venv", "vision-cpu")
    export = write_export(folder, "timm-vit")
    write_sound_record(export, versions={"onnxruntime": version("onnxruntime")})
    for path in [*export.rglob("*"), export]:
        path.chmod(path.stat().st_mode & ~(stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH))
    for name in ("empty", "tmp"):
        (folder / name).mkdir()
    environment = {"PATH": f"{python.parent}:/usr/bin:/bin", "HOME": "/nonexistent", "PYTHONSAFEPATH": "1",
                   "PYTHONDONTWRITEBYTECODE": "1", "TMPDIR": str(folder / "tmp")}  # fmt: skip
    process = subprocess.Popen(
        [str(python.parent / "fp8pipe"), "serve", str(export), "--host", "0.0.0.0", "--port", "0", "--linger-s", "4"],
        cwd=folder / "empty", env=environment, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stderr is not None
        lines = []
        port = None
        for line in process.stderr:
            lines.append(line)
            if found := re.search(r"serving on http://0\.0\.0\.0:(\d+)", line):
                port = found[1]
                break
        assert port, "".join(lines)
        threading.Thread(target=process.stderr.read, daemon=True).start()
        yield process, f"http://127.0.0.1:{port}", folder
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def _health(url, folder):
    """The exit code of the image's HEALTHCHECK."""
    command = [str(folder / "venv" / "bin" / "python"), "-m", "serving.container.health"]
    environment = {"FP8PIPE_PORT": url.rpartition(":")[2], "PYTHONSAFEPATH": "1"}
    return subprocess.run(command, cwd=folder / "empty", env=environment, timeout=60, check=False).returncode


def _verify(folder, *options):
    """What `fp8pipe verify` of the export says in the image, and its exit code."""
    command = [str(folder / "venv" / "bin" / "fp8pipe"), "verify", str(folder / "tiny"), *options]
    environment = {"PYTHONSAFEPATH": "1", "TMPDIR": str(folder / "tmp"), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        command, cwd=folder / "empty", env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    return done.returncode, done.stdout + done.stderr


async def _worker(url, png, found):
    async with httpx.AsyncClient(timeout=60, trust_env=False) as client:
        while True:
            try:
                answer = await client.post(f"{url}/v1/classify", content=png, headers={"Content-Type": "image/png"})
            except httpx.ConnectError:  # not accepted any more; any other error is a dropped request
                return
            found.append(answer.status_code)


async def _end_under_load(process, url, png):
    found: list[int] = []
    workers = [asyncio.create_task(_worker(url, png, found)) for _ in range(4)]
    while len(found) < 20:
        await asyncio.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    await asyncio.sleep(0.2)
    async with httpx.AsyncClient(trust_env=False) as client:
        ready = (await client.get(f"{url}/readyz")).status_code
    await asyncio.gather(*workers)
    return set(found), ready


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_from_readiness_to_the_end(served, tmp_path):
    process, url, folder = served
    python = folder / "venv" / "bin" / "python"
    said = "import importlib.util, sys; sys.exit(any(importlib.util.find_spec(n) for n in sys.argv[1:]))"
    assert subprocess.run([str(python), "-P", "-c", said, *_HEAVY], check=False).returncode == 0
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    image.save(tmp_path / "picture.png")
    png = (tmp_path / "picture.png").read_bytes()
    with httpx.Client(base_url=url, trust_env=False, timeout=30) as client:
        assert client.get("/readyz").status_code == 200
        answer = client.post("/v1/classify", params={"top_k": 5}, files={"image": png})
    recipe = read_model_file(Preprocessing, folder / "tiny" / "preprocessing.json")
    pixels = recipe.normalize(recipe.pixels(image)).numpy()
    logits = open_session(folder / "tiny" / "model.onnx").run(None, {"pixels": pixels[None]})[0]
    shares = {one["index"]: one["probability"] for one in answer.json()["results"][0]["classes"]}
    assert shares == dict(enumerate(probabilities(logits, "softmax")[0].astype(float)))
    assert _health(url, folder) == 0
    code, said = _verify(folder, "--quick")  # as the init containers in deploy/ do
    assert (code, "all as written" in said) == (0, True), said
    code, said = _verify(folder)
    assert (code, "with --quick" in said) == (11, True), said

    assert asyncio.run(_end_under_load(process, url, png)) == ({200}, 503)
    assert process.wait(60) == 0
    assert _health(url, folder) == 1
    assert [list(Path(folder / name).iterdir()) for name in ("empty", "tmp")] == [[], []]
