"""The command line: a group that imports a command only when it is used, and maps every failure to an exit code.

`fp8pipe --help` must respond immediately, so the short help texts are in a table here, and no module of this package
imports anything heavy at the top. The function of the command NAME is `NAME_command`; `_MODULES` names its module if
that has a different name.
"""

from __future__ import annotations

import importlib
from typing import Any

import click

from fp8pipe.cli.common import Console, failure_of
from fp8pipe.core.version import build_facts

__all__ = ["COMMANDS", "main"]

COMMANDS = {
    "run": "Run a recipe: a model from base to a served, proven export.",
    "finetune": "Fine-tune a language model in FP8, or with LoRA or QLoRA.",
    "quantize-vit": "Quantize a vision transformer, by default without any data.",
    "export": "Write an artifact as a checkpoint that an engine serves.",
    "lint": "Report what TensorRT would refuse or build slowly in an ONNX graph.",
    "validate": "Run an export in its engine and prove that it serves what was made.",
    "bench": "Measure speed and size of an export against full precision.",
    "evaluate": "Score a language export on tasks, beside other models.",
    "serve": "Serve an export over HTTP.",
    "serve-check": "Start the service of an export, query it, and stop it.",
    "serve-repository": "Write an export as a model repository for Triton.",
    "serve-key": "Make an API key for a service.",
    "inspect": "Show what an artifact is, and where it came from.",
    "verify": "Hash everything in a directory again, and repeat the cheap gates.",
    "sign": "Sign a directory with a key of your own.",
    "report": "Write a report on a run or an artifact as one HTML page.",
    "push": "Upload an artifact to a repository of the Hugging Face hub.",
    "kubernetes-jobs": "Write the stages of a recipe as Kubernetes Jobs.",
    "schema": "Print the JSON schema of recipes, for editors.",
    "doctor": "Show what this machine can run, and how to get what is missing.",
}
# Commands defined in a module with a different name.
_MODULES = {
    "finetune": "tune", "quantize-vit": "tune", "lint": "export", "validate": "measure",
    "bench": "measure", "serve-check": "measure", "serve-repository": "serve", "serve-key": "serve",
    "report": "inspect", "sign": "verify", "push": "verify",
}  # fmt: skip


class LazyGroup(click.Group):
    """A lazy click group over `COMMANDS`; turns exceptions into messages, JSON documents and exit codes."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Command names in the order of the table, which is the order of a typical workflow."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the module that holds the command, and return it."""
        if cmd_name not in COMMANDS:
            return None
        name = cmd_name.replace("-", "_")
        module = importlib.import_module(f"fp8pipe.cli.{_MODULES.get(cmd_name, name)}")
        command: click.Command = getattr(module, f"{name}_command")
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Resolve as click does, but suggest a name for a misspelt command."""
        name = args[0]
        if name not in COMMANDS and not name.startswith("-"):
            import difflib

            close = difflib.get_close_matches(name, COMMANDS, n=1)
            hint = f"Did you mean {close[0]!r}?" if close else f"Commands: {', '.join(COMMANDS)}."
            raise click.UsageError(f"No such command {name!r}. {hint}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands from the table, without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Detect `--json` before parsing, so that usage errors are reported as JSON, too."""
        options = args[: args.index("--")] if "--" in args else args
        ctx.obj = Console(json="--json" in options)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command, print its document or its failure, and exit with the right code."""
        console: Console = ctx.obj
        try:
            with console.capture_stdout():
                result = super().invoke(ctx)
        except (click.exceptions.Exit, click.Abort):
            raise
        except click.ClickException as error:
            if not console.json:
                raise
            error.show()
            console.finish(failure_of(error))
            ctx.exit(error.exit_code)
        except BaseException as error:  # KeyboardInterrupt and MemoryError have their own exit codes
            failure = failure_of(error)
            click.echo(failure.text, err=True)
            console.finish(failure)
            ctx.exit(failure.exit_code)
        console.finish()
        return result


_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


def _show_version(context: click.Context, _option: click.Parameter, wanted: bool) -> None:
    if wanted and not context.resilient_parsing:
        click.echo(build_facts())
        context.exit()


@click.group(cls=LazyGroup, context_settings=_SETTINGS)
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_show_version,
    help="Show the version, its commit, Python and libraries, and exit.",
)  # fmt: skip
def main() -> None:
    """Tune a model in FP8, export it to an inference engine, and prove that the engine serves exactly that model.

    Every command takes --json: one JSON document on stdout, everything else on stderr. Exit codes: 0 done,
    2 usage, 10 configuration, 11 missing package or device, 12 bad artifact, 13 export refused, 14 a gate
    failed, 15 out of memory or disk, 130 interrupted.
    """
