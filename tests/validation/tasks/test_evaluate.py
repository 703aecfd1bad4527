"""Scores of an export on a local task: both engines agree question by question, and a gate fails a damaged model."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from artifact_tree import rehash
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from tuning_config import config as tuning

from exporters.vllm.environment import find_vllm_python, inspect_environment
from exporters.vllm.export import export_vllm
from exporters.vllm.form import ServingForm
from exporters.vllm.options import VllmExportOptions
from exporters.vllm.reopen import load_torch_model
from fp8pipe.artifact import open_artifact
from fp8pipe.artifact.verdict import read_verdict
from fp8pipe.cli import main
from fp8pipe.cli.stages import stage_commands
from fp8pipe.core.config import build_config
from fp8pipe.core.errors import MissingCapabilityError
from fp8pipe.models.compat import import_transformers
from pipeline.finetune.stage import finetune
from pipeline.workflow.gates import judge
from pipeline.workflow.recipe import recipe_of
from validation.tasks.in_torch import TorchScorer
from validation.tasks.in_vllm import VllmScorer
from validation.tasks.record import FALQON_PAPER, EvaluateConfig

pytest.importorskip("lm_eval")

TASK = """
task: doubles
dataset_path: json
dataset_kwargs: {data_files: {test: doubles.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "<|user|>double {{number}}<|end|><|assistant|>"
target_delimiter: ""
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
metadata: {version: 1.0}
"""
SPOKEN = TASK.replace("task: doubles", "task: spoken").replace("multiple_choice", "generate_until").replace(
    "doc_to_choice: choices\n", ""
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("evaluate")


@pytest.fixture(scope="module")
def questions(folder) -> list[dict]:
    """Twenty questions with four choices, of which one is right, in places that vary."""
    found = []
    for number in range(20):
        choices = [str(2 * number + shift) for shift in (0, 1, 3, 7)]
        turn = number % 4
        found.append({"number": number, "choices": choices[turn:] + choices[:turn], "answer": (4 - turn) % 4})
    (folder / "tasks").mkdir()
    (folder / "tasks" / "doubles.yaml").write_text(TASK)
    (folder / "tasks" / "spoken.yaml").write_text(SPOKEN)
    lines = "".join(json.dumps(question) + "\n" for question in found)
    (folder / "tasks" / "doubles.jsonl").write_text(lines)
    return found


@pytest.fixture
def export(folder, questions, make_base) -> Path:
    """The export of a model that has learned the answers, made once; `base` is the untrained one beside it."""
    if not (folder / "export").exists():
        make_base(num_attention_heads=2, num_key_value_heads=1).rename(folder / "base")  # vLLM: heads of 32 or more
        rows = [{"prompt": f"double {n}", "completion": f"{2 * n}"} for n in range(20)]
        (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        changes = {"steps": 120, "batch_size": 4, "evaluate_every": 0, "save_every": 0, "rank": 32}
        finetune(tuning(folder / "base", folder / "pairs.jsonl", **changes), folder / "tuned")
        export_vllm(folder / "tuned", folder / "export", VllmExportOptions())
    return folder / "export"


def run(*arguments: object) -> tuple[int, dict]:
    ended = CliRunner().invoke(main, [str(a) for a in ("evaluate", *arguments, "--json")])
    return ended.exit_code, json.loads(ended.stdout)


def log_probabilities(model, questions: list[dict], tokenizer) -> np.ndarray:
    """`(questions, choices)`, nats, by transformers alone."""
    found = np.zeros((len(questions), 4))
    for row, question in enumerate(questions):
        prompt = tokenizer(f"<|user|>double {question['number']}<|end|><|assistant|>")["input_ids"]
        for column, choice in enumerate(question["choices"]):
            answer = tokenizer(choice)["input_ids"]
            with torch.inference_mode():
                table = model(torch.tensor([prompt + answer])).logits[0].double().log_softmax(-1)
            found[row, column] = sum(float(table[len(prompt) + i - 1, token]) for i, token in enumerate(answer))
    return found


def hits(model, questions: list[dict], folder: Path) -> np.ndarray:
    """1 for each question that is answered rightly."""
    tokenizer = import_transformers().AutoTokenizer.from_pretrained(folder / "base")
    right = np.array([question["answer"] for question in questions])
    return (log_probabilities(model, questions, tokenizer).argmax(1) == right).astype(float)


def test_scores_are_those_of_the_answers_and_changes_are_paired(export, folder, questions):
    code, document = run(
        export, "--tasks", "doubles", "--task-dir", folder / "tasks", "--engine", "transformers",
        "--against", folder / "base",
    )  # fmt: skip
    assert code == 0
    base = import_transformers().AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    ours, theirs = hits(load_torch_model(export, torch.float32), questions, folder), hits(base, questions, folder)
    score = document["scores"]["doubles"]["acc"]
    assert score["value"] == ours.mean()
    assert ours.mean() > 0.6  # of four choices
    assert score["stderr"] == pytest.approx(ours.std(ddof=1) / math.sqrt(20))
    assert score["examples"] == 20
    change = document["against"][0]["scores"]["doubles"]["acc"]
    assert change["change"] == pytest.approx(ours.mean() - theirs.mean())
    assert change["stderr"] == pytest.approx((ours - theirs).std(ddof=1) / math.sqrt(20))
    assert (change["better"], change["worse"]) == ((ours > theirs).sum(), (ours < theirs).sum())
    assert document["tasks"] == {"doubles": "version 1.0, 0-shot"}
    assert document["truncated"] == 0
    assert read_verdict(folder / "export.evaluate.json").measures == "evaluate"


class Kept:
    """A scorer that keeps what it found."""

    def __init__(self, scorer):
        self.scorer, self.versions, self.scores = scorer, {}, []

    def score(self, texts):
        self.scores = self.scorer.score(texts)
        return self.scores


@pytest.mark.vllm
def test_both_engines_answer_every_question_alike_in_fp32(export, folder):
    try:
        environment = inspect_environment(find_vllm_python())
    except MissingCapabilityError as error:
        pytest.skip(str(error))
    from validation.tasks.harness import EngineLM, Tasks

    tasks = Tasks(build_config(EvaluateConfig, {"tasks": ["doubles"], "task_dir": str(folder / "tasks")}))
    artifact, tokenizer = open_artifact(export), import_transformers().AutoTokenizer.from_pretrained(export)
    in_fp32 = build_config(ServingForm, {"dtype": "float32"})
    scorers = [
        Kept(TorchScorer(export, artifact)), Kept(VllmScorer(export, artifact, in_fp32, environment, timeout_s=300))
    ]  # fmt: skip
    torchs, vllms = (tasks.run(EngineLM(tokenizer, scorer, 512)) for scorer in scorers)
    assert len(torchs.examples["doubles", "acc"]) == 20
    assert torchs.examples == vllms.examples
    ours, theirs = (np.array([score.logprob for score in scorer.scores]) for scorer in scorers)
    assert len(ours) == 80
    assert np.abs(ours - theirs).max() < 1e-3  # the threshold of a validation; another order of fp32 sums
    assert [score.greedy for score in scorers[0].scores] == [score.greedy for score in scorers[1].scores]


def damaged(export: Path, target: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    """A copy, sound by its checksums, whose scales are wrong."""
    shutil.copytree(export, target)
    (file,) = target.glob("*.safetensors")
    state = {name: change(t) if name.endswith("_scale") else t for name, t in load_file(file).items()}
    save_file(state, file, metadata={"format": "pt"})
    return rehash(target)


GATES = [
    {"name": "still right", "figure": "scores.doubles.acc.value", "at_least": 0.6, "reason": "chance is 0.25"},
    {"name": "as before", "figure": "against.0.scores.doubles.acc.change", "at_least": -0.1, "reason": "two questions"},
]


def test_gates_of_a_recipe_fail_a_damaged_model(export, folder, tmp_path):
    bad = damaged(export, tmp_path / "bad", torch.reciprocal)  # as if codes were to be divided by them
    command = stage_commands()["evaluate"]
    for subject, passed in ((export, True), (bad, False)):
        stage = {
            "command": "evaluate", "export": str(subject), "tasks": "doubles", "task_dir": str(folder / "tasks"),
            "against": [str(export)], "engine": "transformers", "gates": GATES,
        }  # fmt: skip
        (spec,) = recipe_of({"stages": {"tasks": stage}}, "here").stages
        command.check(spec.settings, spec.reads)
        filed = {name: value for name, value in spec.settings.items() if name not in command.inline}
        (tmp_path / "settings.yaml").write_text(json.dumps(filed))
        output = command.output(spec.settings, tmp_path, "tasks")
        ended = CliRunner().invoke(main, command.arguments(spec.settings, output, tmp_path / "settings.yaml"))
        assert ended.exit_code == 0, ended.output
        gates = {gate.name: gate.passed for gate in judge(spec, tmp_path, {"tasks": output})}
        assert gates["still right"] is passed
        assert gates["as before"] is passed


def test_a_model_that_gives_no_numbers_is_not_scored(export, folder, tmp_path):
    bad = damaged(export, tmp_path / "bad", lambda scale: scale * math.nan)
    code, document = run(bad, "--tasks", "doubles", "--task-dir", folder / "tasks", "--engine", "transformers")
    assert code == 12
    assert "not finite" in document["error"]["what"]


def test_tasks_that_cannot_be_scored_are_refused_by_name(export, folder):
    code, document = run(export, "--tasks", "doubles,spoken", "--task-dir", folder / "tasks")
    assert code == 10
    assert document["error"]["what"] == "tasks that cannot be scored: spoken (generate_until)"


def test_without_the_harness_the_command_says_what_to_install(export, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # as if it was not installed
    code, document = run(export, "--tasks", "doubles")
    assert code == 11
    assert "pip install 'fp8pipe[evaluate]'" in document["error"]["fix"]


def test_a_context_that_is_too_long_loses_its_beginning_and_is_counted(export, folder):
    few = ("--task-dir", folder / "tasks", "--engine", "transformers", "--max-model-len", 16, "--limit", 3)
    code, document = run(export, "--tasks", "doubles", *few)
    assert code == 0
    assert document["truncated"] == 0  # three special tokens, eight bytes of the question and one of the answer
    code, document = run(export, "--tasks", "doubles", *few, "--fewshot", 1)
    assert code == 0
    assert document["truncated"] == 12  # four choices of three questions, each after a solved example
    assert document["tasks"] == {"doubles": "version 1.0, 1-shot"}
    assert document["scores"]["doubles"]["acc"]["examples"] == 3


def test_a_preset_stands_for_its_tasks():
    config = build_config(EvaluateConfig, {"tasks": ["falqon-paper,mine", "mine"]})
    assert config.tasks == (*FALQON_PAPER, "mine")
