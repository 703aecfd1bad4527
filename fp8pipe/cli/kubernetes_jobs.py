"""`fp8pipe kubernetes-jobs` writes the stages of a recipe as Kubernetes Jobs, to be created one after the other."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from fp8pipe.cli.common import PATH, Console, common_options

# In parentheses, as `exit` would end the user's shell. A Job of before is deleted together with its pod, which may take
# a while to end. A Job may have other conditions first, such as Suspended, where a queue admits it.
_ORDER = """(
kubectl apply -f {folder}/recipe.yaml || exit 1
for job in {folder}/[0-9]*.yaml; do
  kubectl delete --ignore-not-found --cascade=foreground --wait -f "$job" && kubectl create -f "$job" || exit 1
  until kubectl get -f "$job" -o jsonpath='{{.status.conditions[?(@.status=="True")].type}}' |
    grep -qwE 'Complete|Failed'; do sleep 10; done
  kubectl wait --for=condition=complete --timeout=0s -f "$job" || exit 1
done
)"""


def _word(folder: Path) -> str:
    """A folder as one word of a shell, and no option of kubectl."""
    return shlex.quote(str(folder) if not str(folder).startswith("-") else f"./{folder}")


@click.command("kubernetes-jobs")
@click.argument("recipe", type=click.Path(path_type=Path, dir_okay=False, readable=False))
@click.option("--output", required=True, type=PATH, help="New directory of the manifests.")
@click.option("--image", required=True, help="Image with fp8pipe and what its commands need.")
@click.option("--claim", required=True, help="PersistentVolumeClaim of the volume that all stages work in.")
@click.option("--run", help="Directory of the run on that volume.  [runs/NAME of the recipe]")
@click.option("--set", "overrides", multiple=True, metavar="STAGE.KEY=VALUE", help="Change a setting; repeatable.")
@common_options()
def kubernetes_jobs_command(
    recipe: Path, output: Path, image: str, claim: str, run: str | None, overrides: tuple[str, ...], console: Console
) -> None:
    """Write the stages of RECIPE as Kubernetes Jobs, and show how to create them in order.

    Nothing is sent to a cluster. The same Jobs created again continue the run.
    """
    import yaml

    from fp8pipe.cli.stages import stage_commands
    from fp8pipe.core.errors import ConfigurationError
    from pipeline.workflow import RunOptions, RunState, WorkflowRunner, load_recipe
    from pipeline.workflow.kubernetes import gpus_of, job_manifest, recipe_manifest

    read = load_recipe(recipe, overrides)
    WorkflowRunner(RunState(read, stage_commands(), output / "none", RunOptions()), print).check(read.stages)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigurationError(
            f"{output} is not empty", why="manifests of other stages there would be created, too",
            fix="name another directory with --output, or remove this one",
        )  # fmt: skip
    run = run or f"runs/{read.name}"
    files = {"recipe.yaml": recipe_manifest(read, run)}
    width = len(str(len(read.stages)))
    for number, spec in enumerate(read.stages, 1):
        files[f"{number:0{width}}-{spec.name}.yaml"] = job_manifest(read, spec, image=image, claim=claim, run=run)
    output.mkdir(parents=True, exist_ok=True)
    for name, manifest in files.items():
        (output / name).write_text(yaml.safe_dump(manifest, sort_keys=False, allow_unicode=True), encoding="utf-8")
    without = [spec.name for spec in read.stages if not gpus_of(spec) and spec.settings.get("device") != "cpu"]
    if without and not console.quiet:
        click.echo(f"no GPU for: {', '.join(without)} (resources: {{gpus: 1}} in the recipe asks for one)", err=True)
    console.emit(
        {"directory": str(output), "files": list(files), "without_gpu": without},
        "\n".join([*(str(output / name) for name in files), "in order:", _ORDER.format(folder=_word(output))]),
        quiet_text=str(output),
    )
