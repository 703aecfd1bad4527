"""`fp8pipe serve`: an export becomes a service."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from fp8pipe.cli.common import Console, common_options, format_bytes, table
from fp8pipe.cli.serve_language import VISION_ONLY, language_options, split_language

_KINDS = ("onnx-export", "trt-export", "vllm-export")


@click.command("serve")
@click.argument("export", type=click.Path(path_type=Path))
@click.option("--host", help="Address to listen on; default 127.0.0.1, 0.0.0.0 for every interface.")
@click.option("--port", type=int, help="Port; default 8000, 0 for a free one.")
@click.option("--api-key-file", type=click.Path(path_type=Path), help="Hashed API keys (fp8pipe serve-key).")
@click.option("--max-batch", type=int, help="Vision: images at once; default: measured.")
@click.option("--threads", type=int, help="Vision: threads within an operator; default: measured.")
@click.option("--streams", type=int, help="Vision: batches run at once, on a CPU; default: measured.")
@click.option("--max-wait-ms", type=float, help="Vision: a batch waits this long for more images; default 2.")
@click.option("--queue", type=int, help="Vision: images that may wait; default 256.")
@click.option("--max-pixels", type=int, help="Vision: largest picture, width times height; default 50000000.")
@click.option("--provider", type=click.Choice(["auto", "cpu", "cuda", "tensorrt"]), help="Vision: where it computes.")
@click.option("--inexact-batches", is_flag=True, default=None, help="Vision: allow batches that change bits.")
@click.option("--max-body-mb", type=float, help="Largest request, megabytes; default 16.")
@click.option("--max-total-body-mb", type=float, help="Requests held at once, megabytes; default 512.")
@click.option("--max-connections", type=int, help="Open connections; default 1000.")
@click.option("--rate-limit", type=float, help="Requests a second of a key or address; default: no limit.")
@click.option("--request-timeout-s", type=float, help="Longest wait for the engine; default 30, language: none.")
@click.option("--linger-s", type=float, help="After SIGTERM, take requests for so long; default 2.")
@click.option("--cors-origin", "cors_origins", multiple=True, help="An origin whose pages may call; repeatable.")
@click.option("--no-access-log", "access_log", flag_value=False, default=None, help="No line a request.")
@click.option("--no-page", "page", flag_value=False, default=None, help="No web page at /.")
@language_options
@common_options(dry_run=True)
def command(export: Path, console: Console, dry_run: bool, **options: Any) -> None:
    """Serve EXPORT over HTTP until SIGTERM, after checking every file against its manifest.

    For a language export, options of vLLM's own server may follow after `--`.
    """
    from fp8pipe.artifact import open_artifact
    from fp8pipe.core.config import build_config
    from serving.http.config import ServeConfig

    given = {name: value for name, value in options.items() if value is not None and value != ()}
    artifact = open_artifact(export, kind=_KINDS, verify=False, caches="engines")
    language = artifact.kind == "vllm-export" or (artifact.kind == "trt-export" and "cache" in artifact.manifest.extra)
    _require_packages(language)
    given, of_vllm = split_language(given, language)
    config = build_config(ServeConfig, given)
    if language and artifact.kind == "trt-export":
        raise _not_served(export)
    if dry_run:
        _refuse_now(export, config)
        _show(console, artifact, config, of_vllm)
        return
    code = _serve(export, config, of_vllm)
    if code:
        raise click.exceptions.Exit(code)


def _serve(export: Path, config: Any, of_vllm: Any) -> int:
    if of_vllm is None:
        from serving.vision.server import serve_vision

        return serve_vision(export, config)
    from serving.language.server import serve_language

    return serve_language(export, config, of_vllm)


def _refuse_now(export: Path, config: Any) -> None:
    """What would be refused when it is served: changed files, a file of keys that cannot be read."""
    from fp8pipe.artifact import open_artifact
    from serving.http.auth import KeyFile

    open_artifact(export, kind=_KINDS, caches="engines")
    if config.api_key_file:
        KeyFile(config.api_key_file)


def _not_served(export: Path) -> Exception:
    from fp8pipe.core.errors import ConfigurationError

    return ConfigurationError(
        f"{export} cannot be served", why="engines of language models are not run here",
        fix="export with --target vllm, and serve that",
    )  # fmt: skip


def _require_packages(language: bool) -> None:
    from importlib.util import find_spec

    from fp8pipe.core.errors import MissingCapabilityError

    modules = {"fastapi": "fastapi", "uvicorn": "uvicorn", "prometheus_client": "prometheus-client"}
    if not language:
        modules |= {"python_multipart": "python-multipart", "PIL": "pillow", "numpy": "numpy"}
    missing = [package for module, package in modules.items() if find_spec(module) is None]
    if missing:
        raise MissingCapabilityError(
            f"serving needs {', '.join(missing)}", why="not installed", fix="pip install 'fp8pipe[serve]'"
        )


def _show(console: Console, artifact: Any, config: Any, of_vllm: Any) -> None:
    kind = "vision" if of_vllm is None else "language"
    settings = config.model_dump(mode="json", exclude=None if of_vllm is None else set(VISION_ONLY))
    document = {
        "export": str(artifact.root), "kind": artifact.kind, "server": kind, "digest": artifact.digest,
        "size_bytes": artifact.size_bytes, "config": settings,
    }  # fmt: skip
    rows = [(name, value) for name, value in settings.items()]
    if of_vllm is not None:
        document["vllm"] = of_vllm.model_dump(mode="json")
        rows += [(f"vllm: {name}", value) for name, value in document["vllm"].items()]
    text = (
        f"{artifact.root} ({artifact.kind}, {format_bytes(artifact.size_bytes)}) would be served by the {kind} server"
    )
    console.emit(document, f"{text}\n{table(rows)}")
