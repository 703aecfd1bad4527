"""Kubernetes Jobs: of the form that kubectl's own types have, and their commands, in order, are a run of the recipe."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import quick_run
import yaml
from click.testing import CliRunner
from workflow_runner import Runner

from fp8pipe.artifact.runs import read_run
from fp8pipe.cli import main
from fp8pipe.cli.kubernetes_jobs import _ORDER, _word
from fp8pipe.core.errors import Fp8PipeError, InterruptedRunError
from pipeline.workflow.kubernetes import job_manifest, recipe_manifest
from pipeline.workflow.recipe import recipe_of

STAGES = {
    "base": {"command": "work", "value": 1, "steps": 2, "resources": {"gpus": 2, "cpus": 4, "memory": "16GiB"}},
    "left": {"command": "work", "value": 2, "reads": "stage:base", "resources": {"gpus": 0}},
    "proof": {"command": "record", "reads": "stage:left", "device": "cuda"},
}
WHERE = {"image": "fp8pipe:tune", "claim": "models", "run": "runs/x"}
REAL = """
stages:
  model: {command: quantize-vit, model: "sample:vit-digits", bits: w8a8, resources: {gpus: 1}}
  onnx: {command: export, artifact: "stage:model", target: onnx}
"""


def jobs(stages=STAGES, name="x"):
    recipe = recipe_of({"name": name, "stages": stages}, "here")
    return recipe, {spec.name: job_manifest(recipe, spec, **WHERE) for spec in recipe.stages}


def of_kubectl(manifest, folder: Path):
    """The manifest as kubectl holds it: decoded into the types of the API, without the fields that those lack."""
    file = folder / "manifest.yaml"
    file.write_text(yaml.safe_dump(manifest))
    change = ["kubectl", "set", "image", "--local", "-o", "json", "-f", str(file), "stage=changed:1"]
    done = subprocess.run(change, capture_output=True, text=True, env={**os.environ, "KUBECONFIG": "/dev/null"})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def without_additions(found, asked):
    """What `asked` names of `found`: objects of the API have more fields, such as `status`, and no empty strings."""
    if isinstance(asked, dict):
        return {
            key: without_additions(found.get(key, ""), asked[key]) for key in asked if key in found or not asked[key]
        }
    if isinstance(asked, list):
        return [without_additions(one, other) for one, other in zip(found, asked, strict=True)]
    return found


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
def test_kubectl_knows_every_field(tmp_path):
    for manifest in jobs()[1].values():
        changed = of_kubectl(manifest, tmp_path)
        container = changed["spec"]["template"]["spec"]["containers"][0]
        assert container["image"] == "changed:1"
        container["image"] = WHERE["image"]
        assert without_additions(changed, manifest) == manifest
    misspelt = manifest | {"spec": manifest["spec"] | {"backoffLimt": 3}}
    assert without_additions(of_kubectl(misspelt, tmp_path), misspelt) != misspelt
    recipe = recipe_manifest(jobs()[0], WHERE["run"])
    (tmp_path / "recipe.yaml").write_text(recipe["data"]["recipe.yaml"])
    create = ["kubectl", "create", "configmap", recipe["metadata"]["name"], f"--from-file={tmp_path / 'recipe.yaml'}"]
    made = json.loads(subprocess.run([*create, "--dry-run=client", "-o", "json"], capture_output=True).stdout)
    unlabelled = recipe | {"metadata": {"name": recipe["metadata"]["name"]}}
    assert without_additions(made, unlabelled) == unlabelled


def test_each_job_asks_for_what_its_stage_needs():
    containers = {name: job["spec"]["template"]["spec"]["containers"][0] for name, job in jobs()[1].items()}
    memory = str(16 * 2**30)
    assert containers["base"]["resources"] == {
        "requests": {"cpu": "4", "memory": memory}, "limits": {"nvidia.com/gpu": "2", "memory": memory}
    }  # fmt: skip
    assert "resources" not in containers["left"]
    assert containers["proof"]["resources"] == {"limits": {"nvidia.com/gpu": "1"}}
    hidden = {"name": "CUDA_VISIBLE_DEVICES", "value": ""}
    assert [hidden in container["env"] for container in containers.values()] == [False, True, False]


def test_a_job_fails_at_once_with_every_code_but_that_of_an_interruption_or_a_signal():
    """Of the rules the first that fits counts, and a pod without one is started again."""
    for job in jobs()[1].values():
        evicted, final = job["spec"]["podFailurePolicy"]["rules"]
        assert evicted["action"] == "Ignore"
        assert (final["action"], final["onExitCodes"]["operator"]) == ("FailJob", "In")
        errors = {error.exit_code for error in Fp8PipeError.__subclasses__()} - {InterruptedRunError.exit_code}
        assert set(final["onExitCodes"]["values"]) == errors | {1, 2}  # 2: of options that click refuses


@pytest.mark.parametrize("name", ["x", "My run!", "größe_2", "a" * 63, "---"])
def test_names_are_those_that_kubernetes_accepts_and_differ(name):
    stages = {stage: {"command": "work"} for stage in ("a", "a-", "b" * 63, "b" * 62 + "c")}
    recipe, made = jobs(stages, name)
    names = [job["metadata"]["name"] for job in made.values()]
    names.append(recipe_manifest(recipe, WHERE["run"])["metadata"]["name"])
    labels = [value for job in made.values() for value in job["metadata"]["labels"].values()]
    assert all(re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", text) for text in [*names, *labels])
    assert len(set(names)) == 5
    mounted = {job["spec"]["template"]["spec"]["volumes"][1]["configMap"]["name"] for job in made.values()}
    assert mounted == {names[-1]}


def test_other_recipes_and_other_runs_have_other_jobs():
    """As `kubectl` would replace the Job of one by that of the other."""

    def names(recipe: str, stage: str, run: str) -> set[str]:
        made = recipe_of({"name": recipe, "stages": {stage: {"command": "work"}}}, "here")
        job = job_manifest(made, made.stages[0], **WHERE | {"run": run})
        return {job["metadata"]["name"], recipe_manifest(made, run)["metadata"]["name"]}

    several = [names("a-b", "c", "runs/1"), names("a", "b-c", "runs/1"), names("a-b", "c", "runs/2")]
    assert len(set.union(*several)) == 6
    assert names("a-b", "c", "runs/1") == several[0]
    assert names("a", "a-a", "a-a").isdisjoint(names("a-a", "a", "a-a"))  # which joined by hyphens are all a-a-a-a-a


KUBECTL = """#!/bin/sh
echo "$@" >> calls
case "$*" in
  get*1-*) [ -e asked ] && echo SuccessCriteriaMet Complete || echo Suspended; touch asked ;;
  get*2-*) echo FailureTarget Failed ;;
  wait*2-*) exit 1 ;;
esac
"""


def test_the_printed_loop_waits_for_the_end_of_a_job_and_ends_at_a_failed_one(tmp_path):
    """With a stand-in for kubectl, as there is no cluster here: the first Job is suspended once, the second fails."""
    for name, text in (("kubectl", KUBECTL), ("sleep", "#!/bin/sh\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    folder = tmp_path / "-two words; exit 0; $(exit)"
    folder.mkdir()
    for name in ("1-a", "2-b", "3-c"):
        (folder / f"{name}.yaml").touch()
    path = f"{tmp_path}:{os.environ['PATH']}"
    loop = _ORDER.format(folder=_word(Path(folder.name)))
    done = subprocess.run(["sh", "-c", loop], cwd=tmp_path, env={"PATH": path}, timeout=60)
    assert done.returncode == 1
    verbs = [
        (line.split()[0], line.split(f"./{folder.name}/")[1]) for line in (tmp_path / "calls").read_text().splitlines()
    ]
    assert [(verb, rest.split()[0]) for verb, rest in verbs] == [
        ("apply", "recipe.yaml"),
        *((verb, "1-a.yaml") for verb in ("delete", "create", "get", "get", "wait")),
        *((verb, "2-b.yaml") for verb in ("delete", "create", "get", "wait")),
    ]  # fmt: skip


def test_kubernetes_puts_nothing_in_place_of_a_variable_in_the_name_of_a_run():
    recipe = recipe_of({"name": "x", "stages": STAGES}, "here")
    job = job_manifest(recipe, recipe.stages[0], **WHERE | {"run": "-runs/$(HOME)"})
    command = job["spec"]["template"]["spec"]["containers"][0]["command"]
    assert command[3] == "--output=-runs/$$(HOME)"  # `$$` is a dollar sign that begins no variable


def test_the_commands_of_the_jobs_are_a_run_of_the_recipe(tmp_path):
    """With the recipe where its ConfigMap is mounted, and the root of the volume as the working directory."""
    stages = {
        name: {key: stage[key] for key in stage if key not in ("resources", "device")} for name, stage in STAGES.items()
    }
    recipe, made = jobs(stages)
    volume, mounted = tmp_path / "volume", tmp_path / "recipe.yaml"
    volume.mkdir()
    mounted.write_text(recipe_manifest(recipe, WHERE["run"])["data"]["recipe.yaml"])
    for name in (*made, "proof"):  # one of them twice
        program, *words = made[name]["spec"]["template"]["spec"]["containers"][0]["command"]
        words = [str(mounted) if word == "/recipe/recipe.yaml" else word for word in words]
        assert program == "fp8pipe"
        done = subprocess.run(
            [sys.executable, "-P", quick_run.__file__, *words], cwd=volume, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    assert "[proof] ACCEPT up to date" in done.stderr
    here = Runner(tmp_path / "here").run(stages)
    assert [(stage.key, stage.content) for stage in read_run(volume / "runs" / "x").stages] == [
        (stage.key, stage.content) for stage in here.stages
    ]


def test_the_command_writes_them_in_order_and_refuses_a_folder_in_use(tmp_path):
    (tmp_path / "mine.yaml").write_text(REAL)
    words = ["kubernetes-jobs", str(tmp_path / "mine.yaml"), "--image", "i", "--claim", "c", "--output"]
    done = CliRunner().invoke(main, [*words, str(tmp_path / "jobs"), "--set", "model.resources.cpus=3"])
    assert done.exit_code == 0, done.output
    assert sorted(path.name for path in (tmp_path / "jobs").iterdir()) == ["1-model.yaml", "2-onnx.yaml", "recipe.yaml"]
    assert "no GPU for: onnx" in done.stderr
    loop = done.stdout[done.stdout.index("(\nkubectl") :]
    assert subprocess.run(["sh", "-n", "-c", loop]).returncode == 0
    written = yaml.safe_load((tmp_path / "jobs" / "1-model.yaml").read_text())
    values = yaml.safe_load(REAL.replace("gpus: 1", "gpus: 1, cpus: 3"))
    recipe = recipe_of(values | {"name": "mine"}, "here")
    assert written == job_manifest(recipe, recipe.stages[0], image="i", claim="c", run="runs/mine")
    again = CliRunner().invoke(main, [*words, str(tmp_path / "jobs")])
    assert again.exit_code == 10
    assert "is not empty" in again.stderr
    wrong = CliRunner().invoke(main, [*words, str(tmp_path / "other"), "--set", "model.bits=w9a9"])
    assert wrong.exit_code == 10
    assert not (tmp_path / "other").exists()
