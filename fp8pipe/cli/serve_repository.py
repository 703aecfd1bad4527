"""`fp8pipe serve-repository`: an export as a model repository for a server that is already there."""

from __future__ import annotations

from pathlib import Path

import click

from fp8pipe.cli.common import Console, common_options


@click.command("serve-repository")
@click.argument("export", type=click.Path(path_type=Path))
@click.option("--output", type=click.Path(path_type=Path), required=True, help="The repository; may hold other models.")
@click.option("--layout", type=click.Choice(["triton"]), default="triton", show_default=True, help="Whose repository.")
@click.option(
    "--device",
    type=click.Choice(["cpu", "cpu-vnni", "gpu"]),
    help="Vision: where Triton computes; cpu (default) is right on any, cpu-vnni twice as fast where there is VNNI.",
)
@click.option("--max-model-len", type=click.IntRange(min=16), help="Language exports: context, tokens.")
@common_options(dry_run=True)
def command(
    export: Path, output: Path, layout: str, device: str | None, max_model_len: int | None, dry_run: bool,
    console: Console,
) -> None:  # fmt: skip
    """Write EXPORT, after checking every file, as a model of the Triton Inference Server."""
    from exporters.target import open_export
    from exporters.triton.repository import TritonDevice
    from fp8pipe.core.errors import ConfigurationError

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
