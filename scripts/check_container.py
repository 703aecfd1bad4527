"""Build an image of the Dockerfile, and serve an export from it as docs/container.md does.

    python scripts/check_container.py out/digits-onnx                       # vision-cpu, with docker
    python scripts/check_container.py out/chat-vllm --target llm-cpu --engine podman

EXPORT must have been validated with the versions that the image has, and its record must lie beside it. Checked are:
the user, a root file system that cannot be written to, an image without pip and compilers, `fp8pipe verify` in the
image, readiness, the health command, an answer (of a vision export: every class and probability as ONNX Runtime
computes them here), and an orderly end after SIGTERM. Each line of output is one check. Exit codes: 0 all held, 1 one
did not, 10 the export does not fit, 11 the image cannot be built or the engine is missing.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

from fp8pipe.artifact.record import checksum_path, record_path
from fp8pipe.core.errors import ConfigurationError, Fp8PipeError, MissingCapabilityError

__all__ = ["Container", "main"]

ROOT = Path(__file__).resolve().parents[1]
_TOOLS = ("pip", "pip3", "gcc", "cc", "make", "git", "curl")
_END_S = 60.0


@dataclass(frozen=True)
class Container:
    """How images are built and run.

    Attributes:
        engine: the command of the engine, with its global options.
        image: name of the image.
        build_options: further options of `build`.
        run_options: further options of `run`.
        port: the port on this machine.
    """

    engine: list[str]
    image: str
    build_options: list[str] = field(default_factory=list)
    run_options: list[str] = field(default_factory=list)
    port: int = 8000

    def call(
        self, *arguments: str, check: bool = True, timeout: float | None = 120
    ) -> subprocess.CompletedProcess[str]:
        """Run one command of the engine.

        Raises:
            MissingCapabilityError: it failed, and `check` is set.
        """
        done = subprocess.run(
            [*self.engine, *arguments], capture_output=True, text=True, timeout=timeout, check=False, cwd=ROOT
        )
        if check and done.returncode:
            raise MissingCapabilityError(
                f"{self.engine[0]} {arguments[0]} failed with exit code {done.returncode}",
                why=(done.stderr or done.stdout).strip()[-2000:],
                fix="run the command by hand: " + shlex.join([*self.engine, *arguments]),
            )
        return done

    def build(self, target: str) -> None:
        """Build the image from the Dockerfile's stage `target`."""
        self.call("build", *self.build_options, "--target", target, "-t", self.image, ".", timeout=None)

    def options(self, export: Path) -> list[str]:
        """Options of `run` that mount an export and its record, as docs/container.md gives them."""
        pairs = [
            (export, "/model"),
            (record_path(export), "/model.validation.json"),
            (checksum_path(record_path(export)), "/model.validation.sha256"),
        ]
        mounts = [item for source, target in pairs for item in ("-v", f"{source.absolute()}:{target}:ro")]
        return ["--read-only", "--tmpfs", "/tmp", *self.run_options, *mounts]

    def once(self, export: Path, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command in a container of its own instead of the service."""
        entry, *rest = command
        return self.call("run", "--rm", *self.options(export), "--entrypoint", entry, self.image, *rest, check=False)

    @contextmanager
    def serving(self, export: Path) -> Iterator[str]:
        """The service in a container; yields its id. The container is removed at the end."""
        publish = ["-p", f"127.0.0.1:{self.port}:8000"] if "host" not in self.run_options else []
        started = self.call("run", "-d", *self.options(export), *publish, self.image)
        name = started.stdout.split()[-1]
        try:
            yield name
        finally:
            self.call("rm", "-f", name, check=False)


def _get(url: str, body: bytes | None = None, kind: str = "application/json") -> tuple[int, bytes]:
    request = urllib.request.Request(url, data=body, headers={"Content-Type": kind})
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as answer:
            return int(answer.status), answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()
    except OSError:
        return 0, b""


def _await_ready(container: Container, name: str, url: str, limit_s: float) -> bool:
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        if _get(f"{url}/readyz")[0] == 200:
            return True
        state = container.call("inspect", "--format", "{{.State.Running}}", name, check=False)
        if state.stdout.strip() != "true":
            break
        time.sleep(0.5)
    logs = container.call("logs", name, check=False)
    print((logs.stdout + logs.stderr)[-3000:], file=sys.stderr)
    return False


def _same_classes(export: Path, url: str) -> bool:
    """Whether the service gives a random picture the classes and probabilities that ONNX Runtime computes here."""
    import numpy as np
    from PIL import Image

    from exporters.graph.runtime import open_session
    from fp8pipe.models.vision.answers import probabilities
    from fp8pipe.models.vision.preprocessing import Preprocessing, read_model_file

    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    png = BytesIO()
    picture.save(png, "png")
    status, body = _get(f"{url}/v1/classify?top_k=5", png.getvalue(), "image/png")
    if status != 200:
        return False
    recipe = read_model_file(Preprocessing, export / "preprocessing.json")
    pixels = recipe.normalize(recipe.pixels(picture)).numpy()
    logits = open_session(export / "model.onnx").run(None, {"pixels": pixels[None]})[0]
    wanted = dict(enumerate(probabilities(logits, "softmax")[0].astype(float)))
    answer = json.loads(body)["results"][0]["classes"]
    return bool(answer) and all(wanted[one["index"]] == one["probability"] for one in answer)


def _talks(url: str) -> bool:
    """Whether the service answers a chat request twice alike."""
    model = json.loads(_get(f"{url}/v1/models")[1])["data"][0]["id"]
    question: dict[str, Any] = {
        "model": model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8, "temperature": 0,
    }  # fmt: skip
    answers = [_get(f"{url}/v1/chat/completions", json.dumps(question).encode()) for _ in range(2)]
    texts = [json.loads(body)["choices"][0]["message"]["content"] for status, body in answers if status == 200]
    return len(texts) == 2 and texts[0] == texts[1]


def check(container: Container, export: Path, limit_s: float) -> bool:
    """Make every check of the image with an export; print one line each.

    Returns:
        True if all held.
    """
    held = True

    def line(what: str, good: bool) -> None:
        nonlocal held
        held = held and good
        print(f"{'pass' if good else 'FAIL'}  {what}", flush=True)

    user = container.call("image", "inspect", "--format", "{{.Config.User}}", container.image).stdout.strip()
    line("runs as user 10001", user == "10001:10001")
    tools = container.once(export, "python", "-c", f"import shutil, sys; sys.exit(any(map(shutil.which, {_TOOLS!r})))")
    line("holds no pip, compiler, git or curl", tools.returncode == 0)
    write = container.once(export, "python", "-c", "open('/opt/fp8pipe/x', 'w')")
    line("cannot write outside /tmp", write.returncode != 0 and "OSError" in write.stderr + write.stdout)
    line("fp8pipe verify --quick", container.once(export, "fp8pipe", "verify", "/model", "--quick").returncode == 0)
    url = f"http://127.0.0.1:{container.port}"
    with container.serving(export) as name:
        ready = _await_ready(container, name, url, limit_s)
        line("is ready", ready)
        if not ready:
            return False
        health = container.call("exec", name, "python", "-m", "serving.container.health", check=False)
        line("its health command", health.returncode == 0)
        vision = (export / "model.onnx").is_file()
        line("answers as ONNX Runtime does here" if vision else "answers twice alike",
             _same_classes(export, url) if vision else _talks(url))  # fmt: skip
        container.call("kill", "--signal", "TERM", name)
        end = container.call("wait", name, timeout=_END_S)
        line("ends with exit code 0 after SIGTERM", end.stdout.split()[-1:] == ["0"])
    return held


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("export", type=Path)
    parser.add_argument("--target", default="vision-cpu", help="stage of the Dockerfile; default: vision-cpu")
    parser.add_argument("--engine", default="docker", help="docker or podman, with global options")
    parser.add_argument("--build-options", default="", help="further options of build, as one string")
    parser.add_argument("--run-options", default="", help="further options of run, as one string")
    parser.add_argument("--port", type=int, default=8000, help="port on this machine")
    parser.add_argument("--ready-s", type=float, default=600, help="seconds until the service must be ready")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    options = _parse(arguments)
    try:
        if not record_path(options.export).is_file():
            raise ConfigurationError(
                f"{options.export} has no validation record",
                why=f"{record_path(options.export)} does not exist, and images serve only what was validated",
                fix=f"run fp8pipe validate {options.export}, with the versions of serving/container/requirements-*.txt",
            )
        engine = shlex.split(options.engine)
        if shutil.which(engine[0]) is None:
            raise MissingCapabilityError(
                f"{engine[0]} is not installed",
                why="an image is to be built",
                fix="install it, or name another with --engine",
            )
        memory = ["--shm-size", "2g"] if options.target.startswith("llm-") else []  # vLLM's processes share it
        container = Container(
            engine, f"fp8pipe:{options.target}", shlex.split(options.build_options),
            [*memory, *shlex.split(options.run_options)], options.port,
        )  # fmt: skip
        container.build(options.target)
        return 0 if check(container, options.export, options.ready_s) else 1
    except Fp8PipeError as error:
        print(error, file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
