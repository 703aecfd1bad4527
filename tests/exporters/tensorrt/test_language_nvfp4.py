"""Language models with weights in NVFP4 for TensorRT: the written graph against the artifact's own files, and builds.

The artifact's bytes are decoded here with ml_dtypes, whose tables of E2M1 and E4M3 are not this project's.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from click.testing import CliRunner
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator
from safetensors.torch import load_file
from tuning_config import config

from exporters.tensorrt.half import NotHalf
from exporters.tensorrt.language.export import export_language
from exporters.tensorrt.language.graph import decoder_graph
from exporters.tensorrt.language.passes import check_half_blocks
from exporters.tensorrt.language.predict import decoder_session
from exporters.tensorrt.language.reopen import number_gates
from exporters.tensorrt.language.source import open_language
from exporters.tensorrt.language.stitch import layered_graph
from exporters.tensorrt.language.target import LanguageExportOptions
from exporters.tensorrt.target import Base
from exporters.verify.contents import check_contents
from fp8pipe.artifact import open_artifact
from fp8pipe.artifact.finding import LintFindingsError
from fp8pipe.cli import main
from fp8pipe.core.config import build_config
from fp8pipe.core.errors import ConfigurationError
from fp8pipe.numerics.nvfp4 import BlockCodes, BlockScales
from pipeline.finetune.stage import finetune

LAYERS = 14  # of two decoder layers: q, k, v, o, gate, up, down


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "pairs.jsonl"
    rows = [{"prompt": f"double {n}", "completion": f"{2 * n}"} for n in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def tuned(make_model, texts, tmp_path_factory):
    """An artifact in NVFP4, trained for two steps."""
    from fp8pipe.models.compat import import_transformers

    base = make_model("llama")
    assert import_transformers().AutoConfig.from_pretrained(base).num_hidden_layers * 7 == LAYERS
    place = tmp_path_factory.mktemp("tuned") / "artifact"
    return finetune(config(base, texts, precision="nvfp4", steps=2, sequence_length=32), place).root


@pytest.fixture(scope="module")
def export(tuned, texts, tmp_path_factory):
    """The whole export, cache and FP16, with the default engine."""
    pytest.importorskip("tensorrt_rtx")
    return export_language(tuned, tmp_path_factory.mktemp("export") / "out", options(texts))


def options(texts, **changes: object) -> LanguageExportOptions:
    return build_config(LanguageExportOptions, {"sequence": [1, 8, 32], "calibration_data": str(texts)} | changes)


def decoded(stored, name):
    """A weight `(out, in)` of the artifact in float64, by ml_dtypes."""
    packed = stored[f"{name}_packed"].numpy()
    codes = np.stack([packed & 15, packed >> 4], -1).reshape(len(packed), -1)
    values = codes.astype(np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    blocks = stored[f"{name}_scale"].view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    return values * np.repeat(blocks, 16, 1) / stored[f"{name}_global_scale"].double().numpy()


def test_the_file_holds_the_artifacts_codes_and_no_float_copy(export, tuned):
    """Read with onnx, safetensors and ml_dtypes alone, and dequantized by ONNX's reference evaluator."""
    stored = load_file(tuned / "model.safetensors")
    names = [name.removesuffix("_packed") for name in stored if name.endswith("_packed")]
    assert len(names) == LAYERS
    model = onnx.load(export.root / "model.onnx")
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    makers = {output: node for node in model.graph.node for output in node.output}
    for name in names:
        assert tensors[name].data_type == onnx.TensorProto.FLOAT4E2M1
        outer = makers[f"{name}/dequantized"]
        inner = makers[outer.input[1]]
        parts = [tensors[name], *(tensors[value] for value in inner.input)]
        output = onnx.helper.make_tensor_value_info(outer.output[0], onnx.TensorProto.FLOAT16, None)
        piece = onnx.helper.make_graph([inner, outer], "weight", [], [output], parts)
        opsets = [onnx.helper.make_opsetid("", 23)]
        (found,) = ReferenceEvaluator(onnx.helper.make_model(piece, opset_imports=opsets, ir_version=11)).run(None, {})
        assert found.dtype == np.float16
        assert np.array_equal(found.astype(np.float64), decoded(stored, name).T)
    floats = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)
    matrices = [t for t in tensors.values() if t.data_type in floats and len(t.dims) > 1]
    rows = sum(np.prod(t.dims) for t in matrices)
    assert rows <= 2 * stored["model.embed_tokens.weight"].numel()  # embedding and head


def test_every_linear_reads_four_bit_weights_and_no_quantized_input(export):
    assert all(gate.passed for gate in export.manifest.gates)
    names = {gate.name for gate in export.manifest.gates}
    assert "activation codes differing" not in names  # there are none to compare
    details = export.manifest.details
    assert (details.format, details.activations, export.manifest.number_format.name) == (
        "nvfp4-weight-only", None, "nvfp4"
    )  # fmt: skip
    assert list(details.engines) == ["12.0"]
    assert details.engines["12.0"].precisions == {"fp16": LAYERS}
    graph = onnx.load(export.root / "model.onnx").graph
    assert not [node for node in graph.node if "Quantize" in node.op_type and node.op_type != "DequantizeLinear"]
    written = {entry.path for entry in export.manifest.files}
    assert "activation_scales.json" not in written
    assert {(str(layer.weight), layer.activation) for layer in export.manifest.layers if layer.converted} == {
        ("4-bit nvfp4, per-block, calibrated", None)
    }


def test_the_graph_computes_the_artifacts_model(export, tuned):
    """In float32 from decoded weights; half precision in the graph explains differences of a thousandth."""
    stored = load_file(tuned / "model.safetensors")
    model = open_language(tuned, packed=True).torch_model(torch.float32)
    for name in [name.removesuffix("_packed") for name in stored if name.endswith("_packed")]:
        model.get_parameter(name).data = torch.from_numpy(decoded(stored, name)).float()
    ids = torch.arange(12)[None] + 5
    with torch.no_grad():
        expected = model(input_ids=ids).logits.numpy()
    session = decoder_session(export.root / "model.onnx", export.manifest.details.cache, Base.FP16)
    for found in (session.logits(ids), session.decode(ids, 3)):
        assert np.abs(found - expected).max() < 5e-3 * np.abs(expected).max()


def test_an_export_is_verified_and_a_changed_code_is_found(export, tuned):
    assert check_contents(open_artifact(export.root), tuned) == ([], [])
    model = open_language(tuned, packed=True)

    def other_code(array):
        array.view(np.uint8)[3, 5] ^= 1

    def double(array):
        array *= 2

    scales = "weight scales differing"
    for part, edit, gate in (
        ("weight", other_code, "weight codes differing"), ("weight_block_scale", other_code, scales),
        ("weight_tensor_scale", double, scales),
    ):  # fmt: skip
        graph = ir.load(export.root / "model.onnx")
        value = graph.graph.initializers[f"model.layers.1.mlp.up_proj.{part}"]
        array = value.const_value.numpy().copy()
        edit(array)
        value.const_value = ir.tensor(array, name=value.name)
        failed = {found.name: found.value for found in number_gates(graph, model, {}) if not found.passed}
        assert failed == {gate: 1}


@pytest.mark.parametrize("base", [Base.FP16, Base.FP32])
def test_a_graph_made_of_layers_is_the_graph_traced_as_a_whole(tuned, tmp_path, base):
    model = open_language(tuned, packed=True)
    contents = []
    for name, build in (("layers", layered_graph), ("whole", decoder_graph)):
        path = tmp_path / f"{name}.onnx"
        ir.save(build(model, {}, base, cache=True).model, path)
        onnx.checker.check_model(str(path), full_check=True)
        stored = onnx.load(path).graph.initializer
        contents.append(sorted((t.data_type, tuple(t.dims), numpy_helper.to_array(t).tobytes()) for t in stored))
    assert contents[0] == contents[1]


def test_formats_that_are_not_the_artifacts_are_refused(tuned, texts, language_artifact, tmp_path):
    with pytest.raises(LintFindingsError, match="--format nvfp4"):
        export_language(tuned, tmp_path / "out", options(texts, format="fp8"))
    with pytest.raises(ConfigurationError, match="weights are in FP8"):
        export_language(language_artifact("llama"), tmp_path / "out", options(texts, format="nvfp4-weight-only"))
    with pytest.raises(ConfigurationError, match="--calibration does not apply"):
        export_language(tuned, tmp_path / "out", options(texts, calibration="mse"))
    with pytest.raises(ConfigurationError, match=r"compute capability 8\.9"):
        export_language(tuned, tmp_path / "out", options(texts, compute_capabilities=["8.9"]))
    refused = CliRunner().invoke(
        main, ["export", str(tuned), "--target", "trt", "--format", "modelopt-checkpoint", "--output",
               str(tmp_path / "out")],
    )  # fmt: skip
    assert refused.exit_code == 13
    assert "--layout modelopt" in refused.output
    assert not (tmp_path / "out").exists()


def test_a_plan_names_format_and_capability(tuned, texts, tmp_path):
    shown = CliRunner().invoke(
        main, ["export", str(tuned), "--target", "trt", "--output", str(tmp_path / "out"), "--dry-run",
               "--calibration-data", str(texts)],
    )  # fmt: skip
    assert shown.exit_code == 0, shown.output
    assert f"{LAYERS} in NVFP4" in shown.output
    assert "nvfp4-weight-only" in shown.output
    assert "12.0" in shown.output
    assert "8.9" not in shown.output


def test_validation_says_what_is_proved(export):
    ended = CliRunner().invoke(main, ["validate", str(export.root)])
    assert ended.exit_code == 0, ended.output
    assert "PROVED-WITHOUT-RUNNING" in ended.output
    record = json.loads(Path(f"{export.root}.validation.json").read_text())
    assert {gate["name"]: gate["passed"] for gate in record["gates"]} == {
        "outputs that are no numbers": True, "findings of the linter": True,
        "linear products not in fp16 for 12.0": True, "statements that do not hold": True,
    }  # fmt: skip


@pytest.mark.parametrize("build", [layered_graph, decoder_graph])
def test_weights_too_small_for_half_precision_are_refused(tuned, build):
    """In the second layer alone, which is not the one that a layered graph is traced from."""
    model = open_language(tuned, packed=True)
    weights = dict(model.weights)
    old = weights["model.layers.1.mlp.up_proj"]
    smallest = torch.full_like(old.scales.block.float(), 1.125 * 2.0**-6).to(torch.float8_e4m3fn)
    weights["model.layers.1.mlp.up_proj"] = BlockCodes(old.codes, BlockScales(smallest, 2.0**-15))
    small = replace(model, weights=weights)
    with pytest.raises(LintFindingsError, match=r"not-half\S* model\.layers\.1\.mlp\.up_proj\.weight"):
        build(small, {}, Base.FP16, cache=False)
    assert build(small, {}, Base.FP32, cache=False)


@pytest.mark.parametrize(("exponent", "exact"), [(-14, True), (-15, False), (8, True)])
def test_values_that_half_precision_does_not_hold_are_refused(exponent, exact):
    """The smallest normal block scale is 2^-6; with three mantissa bits and a code of a half, its last bit is 2^-10."""
    scales = BlockScales(torch.tensor([[1.125 * 2.0**-6]]).to(torch.float8_e4m3fn), 2.0**exponent)
    values = ml_dtypes.float4_e2m1fn(0.5).astype(np.float64) * scales.product.double().numpy()
    assert bool((values.astype(np.float16) == values).all()) is exact
    if exact:
        check_half_blocks("w", scales)
    else:
        with pytest.raises(NotHalf, match="block scales"):
            check_half_blocks("w", scales)
