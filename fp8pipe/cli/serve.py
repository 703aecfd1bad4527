"""`fp8pipe serve`, `serve-repository` and `serve-key`: serve an export, on this machine or with a Triton server."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fp8pipe.cli.common import PATH, Console, common_options, format_bytes, table
from fp8pipe.cli.options import foreign, resolve, union_options
from fp8pipe.core.errors import ConfigurationError, MissingCapabilityError
from serving.config import LanguageConfig, ServeConfig, VisionConfig

if TYPE_CHECKING:
    from fp8pipe.artifact import Artifact
    from fp8pipe.core.plan import Plan


@click.command("serve")
@click.argument("export", type=PATH)
@union_options({"": ServeConfig, "vision": VisionConfig, "language": LanguageConfig})
@click.argument("extra", nargs=-1, type=click.UNPROCESSED, metavar="[-- VLLM_OPTIONS...]")
@common_options(dry_run=True)
def serve_command(export: Path, extra: tuple[str, ...], console: Console, dry_run: bool, **options: Any) -> None:
    """Serve EXPORT over HTTP until SIGTERM, after checking every file against its manifest.

    A validation must have accepted the export with the same versions and the same serving options. Its record is read
    next to EXPORT, or from --record. With --unvalidated no record is needed, and every response is marked accordingly.

    For a language export, options of vLLM's own server may follow after `--`.
    """
    from exporters.target import call, engine_device, open_export, open_served

    artifact, target = open_export(export, lambda known: known.service)
    service = target.service
    language = service.domain == "language"
    _require_packages(language)
    _refuse_foreign(options, extra, language)
    config = resolve(ServeConfig if language else VisionConfig, None, options)
    of_vllm = resolve(LanguageConfig, None, options, extra=extra) if language else None
    open_served(export)  # refuses artifacts that no server here can run
    asked = config.asked if isinstance(config, VisionConfig) else config.device
    device = engine_device(target, asked, "serve", vllm_python=None if of_vllm is None else of_vllm.vllm_python)
    if dry_run:
        _refuse_now(export, config, of_vllm, vllm_found=device is not None)
        given = {} if of_vllm is None else {
            "vllm_python": of_vllm.vllm_python, "form": of_vllm.form, "devices": of_vllm.devices_here,
        }  # fmt: skip
        _show(console, artifact, config, of_vllm, call(service.plan or "", artifact, "serve", None, **given))
        return
    code = call(service.serve or "", export, config, of_vllm)
    if code:
        raise click.exceptions.Exit(code)


def _refuse_foreign(options: dict[str, Any], extra: tuple[str, ...], language: bool) -> None:
    found = foreign(options, *((ServeConfig, LanguageConfig) if language else (VisionConfig,)))
    if not language and extra:
        found.append(" ".join(("--", *extra)))
    if found:
        mine, other = ("language", "vision") if language else ("vision", "language")
        raise ConfigurationError(
            f"{', '.join(found)} cannot be given here",
            why=f"this is a {mine} export, and these options are for {other} exports", fix="leave it out",
        )  # fmt: skip


def _refuse_now(export: Path, config: ServeConfig, of_vllm: LanguageConfig | None, *, vllm_found: bool) -> None:
    """Raise what the server would raise at startup: for missing files, a missing ACCEPT, an unreadable API key file, a
    model that cannot be divided as asked, or a vLLM without the plugin that its weights need.

    Files are not hashed, which would take as long as for the server itself.
    """
    from fp8pipe.artifact import open_artifact
    from fp8pipe.artifact.record import record_path
    from fp8pipe.artifact.verdict import require_accept
    from serving.http.admission import KeyFile

    artifact = open_artifact(export, verify=False, caches="engines")
    config.require(artifact.root, config.record or record_path(artifact.root))
    if not config.unvalidated:
        require_accept(artifact, config.record)
    if config.api_key_file:
        KeyFile(config.api_key_file)
    if of_vllm is not None:
        from exporters.vllm.environment import find_vllm_python, inspect_environment
        from exporters.vllm.spread import require_fit
        from serving.language.server import require_plugin

        require_fit(artifact.root, of_vllm)
        if vllm_found:  # a plan can be made where vLLM is not installed
            require_plugin(inspect_environment(find_vllm_python(of_vllm.vllm_python)), artifact)


def _require_packages(language: bool) -> None:
    modules = {"fastapi": "fastapi", "uvicorn": "uvicorn", "prometheus_client": "prometheus-client"}
    if not language:
        modules |= {"python_multipart": "python-multipart", "PIL": "pillow", "numpy": "numpy"}
    missing = [package for module, package in modules.items() if find_spec(module) is None]
    if missing:
        raise MissingCapabilityError(
            f"serving needs {', '.join(missing)}", why="not installed", fix="pip install 'fp8pipe[serve]'"
        )


def _show(
    console: Console, artifact: Artifact, config: ServeConfig, of_vllm: LanguageConfig | None, plan: Plan
) -> None:
    kind = "vision" if of_vllm is None else "language"
    settings = config.model_dump(mode="json")
    document: dict[str, Any] = {
        "export": str(artifact.root), "kind": artifact.kind, "server": kind, "digest": artifact.digest,
        "size_bytes": artifact.size_bytes, "config": settings, "plan": plan.document(),
    }  # fmt: skip
    rows = list(settings.items())
    if of_vllm is not None:
        document["vllm"] = of_vllm.model_dump(mode="json")
        rows += [(f"vllm: {name}", value) for name, value in document["vllm"].items()]
    size = format_bytes(artifact.size_bytes)
    text = (
        f"{artifact.root} ({artifact.kind}, {size}) would be served by the {kind} server\n{table(rows)}\n{plan.text()}"
    )
    console.emit(document, text)


@click.command("serve-repository")
@click.argument("export", type=PATH)
@click.option("--output", type=PATH, required=True, help="The repository; may hold other models.")
@click.option(
    "--layout", type=click.Choice(["triton"]), default="triton", show_default=True, help="Kind of repository."
)
@click.option(
    "--device",
    type=click.Choice(["cpu", "cpu-vnni", "gpu"]),
    help="Vision: where Triton computes; cpu (default) is exact on any CPU, cpu-vnni twice as fast but only with VNNI.",
)
@click.option("--max-model-len", type=click.IntRange(min=16), help="Language exports: context, tokens.")
@common_options(dry_run=True)
def serve_repository_command(
    export: Path, output: Path, layout: str, device: str | None, max_model_len: int | None, dry_run: bool,
    console: Console,
) -> None:  # fmt: skip
    """Write EXPORT, after checking every file, as a model of the Triton Inference Server."""
    from exporters.target import open_export
    from exporters.triton.repository import TritonDevice

    artifact, target = open_export(export, lambda known: known.service.repository)
    language = target.service.domain == "language"
    if (device if language else max_model_len) is not None:
        raise ConfigurationError(
            f"{'--device' if language else '--max-model-len'} cannot be given here",
            why=f"this is a {'language' if language else 'vision'} export", fix="leave it out",
        )  # fmt: skip
    from exporters.triton.repository import plan_repository, write_triton_repository

    chosen = TritonDevice(device or "cpu")
    if dry_run:
        plan = plan_repository(artifact, output, chosen)
        console.emit({"dry_run": True, "layout": layout, "plan": plan.document()}, plan.text())
        return
    root = write_triton_repository(export, output, device=chosen, max_model_len=max_model_len)
    text = f"{root}\n  next: cd {output.absolute()} && tritonserver --model-repository ."
    console.emit({"model": str(root), "layout": layout}, text, quiet_text=str(root))


@click.command("serve-key")
@click.argument("name", default="")
@common_options()
def serve_key_command(name: str, console: Console) -> None:
    """Make an API key for NAME. The key is shown only once; add the printed line to the file of --api-key-file."""
    from serving.http.admission import hash_key, is_name, new_key

    if name and not is_name(name):
        raise ConfigurationError(
            f"{name!r} cannot name a key", why="letters, digits and _.@- only", fix="choose another"
        )
    key = new_key()
    line = hash_key(key, name)
    console.emit({"key": key, "line": line}, f"key:  {key}\nline: {line}", quiet_text=key)
