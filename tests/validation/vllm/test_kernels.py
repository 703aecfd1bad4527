"""Validation where kernels multiply FP8 codes: vLLM's own ones for CPUs, which hold codes as those of a GPU do.

The same code judges a GPU: it goes by what lies in each layer.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import kernel_faults
import pytest
import torch
from breadth import only_long
from tiny_checkpoints import make_model, write_plain

from exporters.vllm.export import export_vllm
from exporters.vllm.options import VllmExportOptions
from fp8pipe.artifact.record import ExportRejectedError
from fp8pipe.models.compat import import_transformers
from validation.vllm import launcher
from validation.vllm.record import ValidationRecord
from validation.vllm.validate import describe, validate_export

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
KERNEL = "ChannelWiseTorchFP8ScaledMMLinearKernel"


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Beside what they were made from: `llama`, and `gpt2`, whose weights are stored as `(in, out)` and have biases."""
    root, transformers = tmp_path_factory.mktemp("kernels"), import_transformers()
    torch.manual_seed(3)
    gpt2 = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_embd=128, n_layer=2, n_head=4, n_positions=128, vocab_size=260, bos_token_id=256, eos_token_id=256
        )
    )  # fmt: skip
    for parameter in gpt2.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    for name, model in (("llama", make_model()), ("gpt2", gpt2.eval())):
        export_vllm(write_plain(root / f"{name}-plain", model), root / name, VllmExportOptions())
    return root


@pytest.fixture
def validated(
    exports: Path, forked_engines: None, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str, str], ValidationRecord]:
    """`validated(name, fault)` is the record, of whatever verdict."""
    monkeypatch.setenv("VLLM_PLUGINS", "")  # the plugin would dequantize
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(launcher, "PROBE", Path(kernel_faults.__file__))

    def run(name: str, fault: str) -> ValidationRecord:
        monkeypatch.setenv("KERNEL_FAULT", fault)
        try:
            return validate_export(exports / name, against=exports / f"{name}-plain", prompts=["Hello"], max_tokens=2)
        except ExportRejectedError as error:
            record: ValidationRecord = error.record
            return record

    return run


def test_codes_scales_and_activations_are_proved_bit_for_bit(exports: Path, validated: Any) -> None:
    record = validated("llama", "none")
    assert record.verdict == "ACCEPT", record.reasons
    assert (record.weights, record.logprobs, record.dtype) == (None, None, "bfloat16")  # no engine without rounding
    served = record.served
    assert served is not None
    assert (
        served.form == "on a CPU: bfloat16, eager, activations rounded as the checkpoint declares, without the plugin"
    )
    weights, kernels = served.weights, served.kernels
    assert (weights.layers, weights.differing, weights.differing_codes, weights.missing) == (14, 0, 0, [])
    assert weights.read["codes"] == 14  # as bytes: of fused layers each part
    # Each scale is there, one a row, besides every element of the model.
    rows = sum(p.shape[0] for name, p in make_model().named_parameters() if name.endswith("_proj.weight"))
    assert weights.elements == sum(p.numel() for p in make_model().parameters()) + rows
    assert kernels is not None
    assert (kernels.layers, kernels.rounding, kernels.kernels) == (8, 8, {KERNEL: 8})
    assert (kernels.devices, kernels.holds) == ({"cpu": 8}, {"codes": 8})
    assert kernels.codes > 0
    assert kernels.codes_differing == 0
    assert kernels.worst_product < 0.5
    assert served.form_kl < served.engine_kl  # the form in torch explains what the engine does
    assert any("FP8 code and scale" in line and "bit for bit" in line for line in record.proved)
    assert any("compared within that noise" in line for line in record.not_proved)
    assert KERNEL in describe(exports / "llama", record)


def test_transposed_weights_and_biases_are_proved_too(validated: Any) -> None:
    record = validated("gpt2", "none")
    assert not [gate for gate in record.gates if not gate.passed]
    weights, kernels = record.served.weights, record.served.kernels
    assert (weights.read["codes"], weights.differing, kernels.rounding) == (8, 0, 8)
    assert kernels.worst_product < 0.5


def test_each_layer_with_a_fault_is_rejected_by_its_name_and_kind(validated: Any) -> None:
    record = validated("llama", "three_layers")
    assert record.verdict == "REJECT"
    kernels, weights = record.served.kernels, record.served.weights
    assert f"{kernel_faults.DOUBLED}.weight_scale" in weights.different
    assert f"inputs of {kernel_faults.UNROUNDED} ({KERNEL}) are not rounded" in kernels.other_rounding
    assert kernels.other_holding == [
        f"{kernel_faults.DEQUANTIZED} (UnquantizedLinearMethod) holds numbers, not FP8 codes"
    ]
    for name in ("DOUBLED", "UNROUNDED", "DEQUANTIZED"):
        layer = getattr(kernel_faults, name)
        assert any(layer in reason for reason in record.reasons), (layer, record.reasons)
    assert kernels.codes_differing == 0  # what was seen in the other layers


@only_long
def test_a_bf16_engine_in_place_of_an_fp8_one_is_rejected(validated: Any) -> None:
    record = validated("llama", "bf16_engine")
    assert record.verdict == "REJECT"
    assert len(record.served.kernels.other_holding) == 8
    assert record.served.kernels.rounding == 0
