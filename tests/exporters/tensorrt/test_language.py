"""Language models for TensorRT: the written graph against the artifact's own files, ONNX Runtime and a real builder."""

from __future__ import annotations

import json
import shutil

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from click.testing import CliRunner
from onnx import numpy_helper
from safetensors.torch import load_file
from small_artifacts import details_of, write
from static_inputs import static_inputs

from exporters.graph.layers import read_layers
from exporters.tensorrt.language.calibrate import dynamic_inputs, score_torch
from exporters.tensorrt.language.export import export_language
from exporters.tensorrt.language.graph import decoder_graph
from exporters.tensorrt.language.predict import (
    CACHE_LIMIT,
    DecoderSession,
    cache_gates,
    perplexity_gate,
    unrounded_session,
)
from exporters.tensorrt.language.reopen import layer_gates, number_gates
from exporters.tensorrt.language.source import open_language
from exporters.tensorrt.language.target import InputScale, LanguageExportOptions
from exporters.tensorrt.target import Base
from exporters.text import read_text
from fp8pipe.cli import main
from fp8pipe.core.config import build_config
from fp8pipe.core.errors import BadArtifactError, ConfigurationError, LintRefusedError
from fp8pipe.models.language.text import Encoded

SCALES = 2.0**-4


def options(text, **changes: object) -> LanguageExportOptions:
    base = {"compute_capabilities": ["8.9"], "sequence": [1, 8, 32], "calibration_data": str(text)}
    return build_config(LanguageExportOptions, base | changes)


@pytest.fixture(scope="module")
def llama(language_artifact):
    """Trained by another rule than the default one, which exports must not take for granted."""
    return language_artifact("llama", rule="released")


@pytest.fixture(scope="module")
def export(llama, language_text, tmp_path_factory):
    """The whole export, cache and FP16, with an engine."""
    pytest.importorskip("tensorrt_rtx")
    return export_language(llama, tmp_path_factory.mktemp("export") / "out", options(language_text))


def saved(graph, path):
    ir.save(graph.model, path)
    return path


@pytest.fixture(scope="module")
def graphs(llama, tmp_path_factory):
    """The same model in float32 with a cache and without, one scale everywhere; sessions on both."""
    place = tmp_path_factory.mktemp("graphs")
    model = open_language(llama)
    scales = dict.fromkeys(model.weights, SCALES)
    with_cache = decoder_graph(model, scales, Base.FP32, cache=True)
    without = decoder_graph(model, scales, Base.FP32, cache=False)
    sessions = [
        DecoderSession(saved(graph, place / name), graph.cache, Base.FP32)
        for name, graph in (("cache.onnx", with_cache), ("plain.onnx", without))
    ]
    return model, place / "cache.onnx", *sessions


def test_every_linear_is_fp8_in_the_engine_and_attention_is_fused(export):
    assert all(gate.passed for gate in export.manifest.gates)
    entry = export.manifest.details.engines["8.9"]
    assert entry.precisions == {"fp8": 14}
    assert entry.fused_attentions == 2
    assert (export.root / entry.engine).stat().st_size == entry.engine_bytes
    written = {entry.path for entry in export.manifest.files}
    assert {"model.onnx", "activation_scales.json", "config.json", "tokenizer.json", "layers.json"} <= written


def test_the_file_holds_the_artifacts_codes_and_no_float_copy(export, llama):
    """Read with onnx and safetensors alone."""
    stored = load_file(llama / "model.safetensors")
    graph = onnx.load(export.root / "model.onnx").graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    codes = [name for name, tensor in stored.items() if tensor.dtype == torch.float8_e4m3fn]
    assert len(codes) == 14
    for name in codes:
        assert tensors[name].data_type == onnx.TensorProto.FLOAT8E4M3FN
        array = numpy_helper.to_array(tensors[name]).view(np.uint8)
        assert np.array_equal(array, stored[name].view(torch.uint8).numpy().T)
        assert numpy_helper.to_array(tensors[f"{name}_scale"]).astype(np.float32) == stored[f"{name}_scale"].numpy()
    halves = [t for t in tensors.values() if t.data_type == onnx.TensorProto.FLOAT16 and len(t.dims) > 1]
    assert sorted(tuple(t.dims) for t in halves) == [(64, 96), (96, 64)]  # head and embedding


def test_the_export_says_how_its_own_rule_quantized_activations(export):
    """One power of two a token stood there for every rule; the published one has a scale a tensor."""
    trained = export.manifest.details.trained_activations
    assert (trained.granularity, trained.scale_rule) == ("per-tensor", "amax")


def test_queries_keys_and_values_share_a_quantizer_and_so_do_gate_and_up(export):
    graph = onnx.load(export.root / "model.onnx").graph
    pairs = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    assert len(pairs) == 2 * 4
    recorded = json.loads((export.root / "activation_scales.json").read_text())
    assert len(recorded) == 14
    shared = {f"model.layers.0.self_attn.{x}_proj": recorded[f"model.layers.0.self_attn.{x}_proj"] for x in "qkv"}
    assert len({json.dumps(scale) for scale in shared.values()}) == 1


def test_ports_have_the_names_that_runtimes_look_for(export):
    graph = onnx.load(export.root / "model.onnx").graph
    cache = [f"{i}.{what}" for i in range(2) for what in ("key", "value")]
    inputs = ["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{c}" for c in cache)]
    assert [value.name for value in graph.input] == inputs
    assert [value.name for value in graph.output] == ["logits", *(f"present.{c}" for c in cache)]
    sides = [d.dim_param or d.dim_value for d in graph.input[3].type.tensor_type.shape.dim]
    assert sides == ["batch", 2, "past", 16]


def test_cache_or_none_and_torch_give_one_function(graphs):
    """A code between two may fall to either side where sums are made in another order, hence the limit."""
    model, _, cached, plain = graphs
    ids = torch.randint(0, 96, (2, 11), generator=torch.Generator().manual_seed(1))
    whole = plain.logits(ids)
    reference = model.torch_model(torch.float32)
    with static_inputs(reference, dict.fromkeys(model.weights, SCALES)), torch.no_grad():
        expected = reference(input_ids=ids).logits.numpy()
    for found in (whole, cached.logits(ids), cached.decode(ids, 3), cached.decode(ids, 1)):
        assert np.abs(found - expected).max() <= CACHE_LIMIT * np.abs(expected).max()
    with torch.no_grad():  # what is compared is more than the limit away from a model without the scales
        other = reference(input_ids=ids).logits.numpy()
    assert np.abs(whole - other).max() > np.abs(whole - expected).max()


def test_padding_on_the_left_changes_nothing(graphs):
    _, _, _, plain = graphs
    ids = torch.randint(0, 96, (1, 6), generator=torch.Generator().manual_seed(2))
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.int64), ids], 1)
    inputs = {
        "input_ids": padded.numpy(),
        "attention_mask": np.array([[0, 0, 0, 1, 1, 1, 1, 1, 1]]),
        "position_ids": np.array([[0, 0, 0, 0, 1, 2, 3, 4, 5]]),
    }
    (logits,) = plain.session.run(["logits"], inputs)
    assert np.isfinite(logits).all()
    expected = plain.logits(ids)
    assert np.abs(logits[:, 3:] - expected).max() <= CACHE_LIMIT * np.abs(expected).max()


def test_a_cache_in_the_wrong_place_fails_its_gate(graphs):
    _, path, quantized, _ = graphs
    cached = unrounded_session(path, quantized.cache, Base.FP32)
    ids = torch.randint(0, 96, (12,), generator=torch.Generator().manual_seed(3)).tolist()
    text = [Encoded(ids, ids)]
    (gate,) = cache_gates(cached, text)
    assert gate.value < 1e-5  # nothing but sums of float32 in another order

    class Shifted(DecoderSession):
        def __init__(self) -> None:
            self.session, self.cache, self.dtype = cached.session, cached.cache, cached.dtype

        def _run(self, ids, past, start):
            swapped = {name: past[other] for name, other in zip(past, reversed(past), strict=True)}
            return super()._run(ids, swapped, start)

    (gate,) = cache_gates(Shifted(), text)
    assert not gate.passed


def test_one_other_code_scale_or_float_is_found(graphs):
    model, path, _, _ = graphs
    scales = {name: InputScale(scale=SCALES, amax=1, clipped=0, values=1) for name in model.weights}

    def found(**changes: object) -> dict[str, float]:
        graph = ir.load(path)
        for name, change in changes.items():
            value = graph.graph.initializers[name]
            array = np.array(value.const_value.numpy())
            change(array)
            value.const_value = ir.tensor(array, name=name)
        gates = number_gates(graph, model, scales)
        return {gate.name: gate.value for gate in gates if not gate.passed}

    def code(array):
        array.reshape(-1).view(np.uint8)[5] ^= 1

    def double(array):
        array *= 2

    layer = "model.layers.1.mlp.up_proj"
    assert found() == {}
    assert found(**{f"{layer}.weight": code}) == {"weight codes differing": 1}
    assert found(**{f"{layer}.weight_scale": double}) == {"weight scales differing": 1}
    assert found(**{"model.layers.0.mlp.gate_proj.input/scale": double}) == {"activation scales differing": 2}
    assert "float tensors differing" in found(**{"model.embed_tokens.weight": double})


@pytest.mark.parametrize("granularity", ["per-tensor", "per-channel"])
def test_layers_with_a_bias_are_exact_and_a_wrong_one_is_not(language_artifact, granularity):
    """Qwen2 has biases on queries, keys and values, and a head that is tied to the embedding."""
    model = open_language(language_artifact("qwen2", granularity=granularity))
    built = decoder_graph(model, dict.fromkeys(model.weights, SCALES), Base.FP16, cache=False)
    graph = ir.from_proto(ir.to_proto(built.model))
    ids = list(range(9))
    reference = model.torch_model(torch.float32)
    scales = {name: InputScale(scale=SCALES, amax=1, clipped=0, values=1) for name in model.weights}
    gates = number_gates(graph, model, scales)
    proved, report = layer_gates(read_layers(graph), graph, reference, Encoded(ids, ids))
    assert all(gate.passed for gate in gates + proved), gates
    assert len(report) == 14
    tables = [v for v in graph.graph.initializers.values() if v.dtype == ir.DataType.FLOAT16 and len(v.shape) > 1]
    assert [tuple(v.shape) for v in tables] == [(96, 64)]
    bias = next(v for n, v in graph.graph.initializers.items() if n.endswith("layers.0.self_attn.q_proj.bias"))
    layers = read_layers(graph)
    bias.const_value = ir.tensor(bias.const_value.numpy() + np.float32(0.01), name=bias.name)
    proved, _ = layer_gates(layers, graph, reference, Encoded(ids, ids))
    assert not all(gate.passed for gate in proved)


def test_types_are_consistent_by_onnx_own_checker(export):
    onnx.checker.check_model(str(export.root / "model.onnx"), full_check=True)
    graph = onnx.load(export.root / "model.onnx").graph
    codes = next(t for t in graph.initializer if t.data_type == onnx.TensorProto.FLOAT8E4M3FN and len(t.dims) > 1)
    assert numpy_helper.to_array(codes).dtype == ml_dtypes.float8_e4m3fn


def test_what_cannot_be_exported_is_refused_and_nothing_is_written(language_artifact, language_text, tmp_path, llama):
    cases = [
        (language_artifact("llama", edit=None), {}, LintRefusedError, "not-half"),  # 448 / amax is no FP16 number
        (language_artifact("gpt2"), {}, LintRefusedError, "transposed-weight"),
        (llama, {"calibration_data": None}, ConfigurationError, "calibration-data"),
    ]
    for source, changes, error, message in cases:
        with pytest.raises(error, match=message):
            export_language(source, tmp_path / "out", options(language_text, **changes))
        assert not (tmp_path / "out").exists()


def test_a_worse_perplexity_fails(graphs, language_text, tmp_path):
    """Activation scales that are far too large round nearly everything to zero."""
    model, path, cached, _ = graphs
    heldout = list(read_text(model.root, model.artifact, str(language_text), 8).heldout)
    reference = model.torch_model(torch.float32)
    # Random weights know nothing; the tokens of which they are surest are what they can lose.
    best = [cached.logits(torch.tensor([x.input_ids]))[0].argmax(-1)[:-1].tolist() for x in heldout]
    sure = [Encoded(x.input_ids, [-100, *tokens]) for x, tokens in zip(heldout, best, strict=True)]
    with dynamic_inputs(reference, list(model.weights)):
        own = score_torch(reference, sure)
    gate, _ = perplexity_gate(cached, sure, own, required=True)
    assert gate.passed
    graph = ir.load(path)
    for name, value in graph.graph.initializers.items():
        if name.endswith("input/scale"):
            value.const_value = ir.tensor(value.const_value.numpy() * np.float32(2**12), name=name)
    ir.save(graph, tmp_path / "coarse.onnx")
    coarse = DecoderSession(tmp_path / "coarse.onnx", cached.cache, Base.FP32)
    gate, found = perplexity_gate(coarse, sure, own, required=True)
    assert not gate.passed
    difference = (found.losses - own.losses).double().numpy()
    error = difference.std(ddof=1) / len(difference) ** 0.5
    assert gate.value == pytest.approx(np.exp(difference.mean() - 2 * error) - 1)
    gate, _ = perplexity_gate(coarse, sure, own, required=False)
    assert gate.passed


def test_the_command_line_knows_both_kinds_of_artifact(llama, language_text, tmp_path, language_artifact):
    base = ["export", str(llama), "--target", "trt", "--output", str(tmp_path / "out")]
    plan = CliRunner().invoke(main, [*base, "--dry-run", "--calibration-data", str(language_text)])
    assert plan.exit_code == 0, plan.output
    assert "14 in FP8" in plan.output
    refused = CliRunner().invoke(main, [*base, "--format", "modelopt-checkpoint", "--batch", "1", "2", "4"])
    assert refused.exit_code == 10
    assert "--batch cannot be given for --target trt (modelopt-checkpoint)" in refused.output
    foreign = CliRunner().invoke(main, [*base, "--format", "int8"])
    assert foreign.exit_code == 10
    packed = CliRunner().invoke(main, [*base, "--pack", "--workspace", "512", "--version-compatible"])
    assert packed.exit_code == 10
    assert "cannot be given for --target trt (language)" in packed.output
    assert all(flag in packed.output for flag in ("--pack", "--workspace", "--version-compatible"))
    enterprise = CliRunner().invoke(main, [*base, "--builder", "enterprise"])
    assert enterprise.exit_code == 10
    assert "trtexec command in the manifest" in enterprise.output
    vit = write(tmp_path / "vit", kind="vit", details=details_of("vit")).root
    elsewhere = ["export", str(vit), "--target", "trt", "--output", str(tmp_path / "out"), "--no-cache"]
    vision = CliRunner().invoke(main, elsewhere)
    assert vision.exit_code == 10
    assert "--no-cache cannot be given for --target trt\n  why: made for --target trt (language)" in vision.output


def test_validation_says_what_is_proved_and_what_is_not(export, tmp_path):
    place = shutil.copytree(export.root, tmp_path / "export")
    ended = CliRunner().invoke(main, ["validate", str(place)])
    assert ended.exit_code == 0, ended.output
    assert "PROVED-WITHOUT-RUNNING" in ended.output
    assert "not proved: execution" in ended.output
    record = json.loads((tmp_path / "export.validation.json").read_text())
    assert record["engines"][0]["precisions"] == {"fp8": 14}
    assert {gate["name"]: gate["passed"] for gate in record["gates"]} == {
        "outputs that are no numbers": True, "findings of the linter": True, "linear products not in fp8 for 8.9": True,
        "statements that do not hold": True,
    }  # fmt: skip
    engine = place / "engines" / "rtx-8.9.engine"
    engine.write_bytes(engine.read_bytes()[:-1] + b"x")
    damaged = CliRunner().invoke(main, ["validate", str(place)])
    assert damaged.exit_code == 12
    assert "rtx-8.9.engine" in damaged.output


def test_the_linter_is_asked_before_a_builder(llama, language_text, tmp_path):
    with pytest.raises(LintRefusedError, match=r"capability.*8\.0|8\.0"):
        export_language(llama, tmp_path / "out", options(language_text, compute_capabilities=["8.0"]))
    assert not (tmp_path / "out").exists()


def test_another_kind_of_artifact_is_named(tmp_path):
    from fp8pipe.artifact import ArtifactWriter

    with ArtifactWriter(tmp_path / "merged", kind="lora-merged", stage="finetune") as writer:
        (writer.root / "config.json").write_text("{}")
        writer.commit(details=details_of("lora-merged"))
    with pytest.raises(BadArtifactError, match="falqon"):
        open_language(tmp_path / "merged")
