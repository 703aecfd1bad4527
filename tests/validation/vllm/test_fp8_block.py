"""Exports with one scale per block in an engine: accepted as they are, and rejected by name with one scale doubled."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from artifact_tree import rehash
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from trained_exports import checked, export_both, scaled_inputs

from exporters.vllm.options import ExportFormat, VllmExportOptions
from fp8pipe.artifact import open_artifact
from validation.vllm.expected import ExpectedWeights, plan_of
from validation.vllm.held import Holding
from validation.vllm.kernels import find_kernel
from validation.vllm.reference import _rounded

LAYER = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`quantized` beside `plain`, `again` beside `trained`; in `doubled`, one scale of `quantized` is doubled."""
    root = export_both(tmp_path_factory.mktemp("blocks"), VllmExportOptions(format=ExportFormat.FP8_BLOCK))
    doubled = Path(shutil.copytree(root / "quantized", root / "doubled"))
    tensors = load_file(doubled / "model.safetensors")
    tensors[LAYER + "_scale"][1, 2] *= 2
    save_file(tensors, doubled / "model.safetensors", metadata={"format": "pt"})
    rehash(doubled)
    return root


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.usefixtures("forked_engines")
def test_vllm_accepts_it_and_rejects_one_doubled_scale_by_name(exports: Path) -> None:
    record = checked(exports / "quantized", against=exports / "plain")
    assert (record.verdict, record.reference, record.reasons) == ("ACCEPT", "source", [])
    weights, kernels = record.weights, record.served.kernels
    assert (weights.layers, weights.differing, weights.read["stored"] >= 14) == (14, 0, True)
    assert kernels.kernels == {"CpuFp8Scheme": 8}
    record = checked(exports / "doubled", against=exports / "plain")
    assert record.verdict == "REJECT"
    for report in (record.weights, record.served.weights):
        assert report.different == [LAYER]
        assert 0 < report.differing <= 128 * 128  # zeros stay zeros


@pytest.mark.parametrize(("name", "source"), [("quantized", "plain"), ("again", "trained")])
def test_a_torch_engine_is_accepted_for_the_source(exports: Path, engine: Any, name: str, source: str) -> None:
    record = checked(exports / name, against=exports / source)
    assert record.verdict == "ACCEPT", record.reasons
    assert record.weights is not None
    assert (record.weights.layers, record.weights.differing_codes) == (14, 0)


def test_a_doubled_scale_is_rejected_with_and_without_the_source(exports: Path, engine: Any) -> None:
    record = checked(exports / "doubled", against=exports / "plain")
    assert (record.verdict, record.weights.different) == ("REJECT", [LAYER])
    assert record.weights.row_error > 1


def grouped_inputs(model: nn.Module) -> None:
    """Activations in E4M3, one scale per 128 features of a token."""

    def to_e4m3(x: Tensor) -> Tensor:
        groups = x.float().unflatten(-1, (-1, 128))
        scale = (groups.abs().amax(-1, keepdim=True) / 448).clamp(min=1 / (448 * 512))
        return ((groups / scale).to(torch.float8_e4m3fn).float() * scale).flatten(-2).to(x.dtype)

    for name, module in model.named_modules():
        if name.endswith("_proj"):
            module.register_forward_pre_hook(lambda _, args: (to_e4m3(args[0]), *args[1:]))


def test_inputs_are_rounded_in_groups(exports: Path, engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FP8PIPE_VLLM_ACTIVATIONS", "quant")
    found = {}
    for rounding in (grouped_inputs, scaled_inputs):
        engine({"bfloat16": rounding})
        found[rounding] = checked(exports / "again", against=exports / "trained").served
    # The engine that rounds like the torch model of the form differs from it by nothing but the order of sums.
    assert found[grouped_inputs].kernels.rounding == 14
    assert found[grouped_inputs].form_kl < 0.1 * found[scaled_inputs].form_kl


def test_groups_of_an_input_have_their_own_scale() -> None:
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(4))
    x[:, 128:] *= 1000
    assert torch.equal(_rounded(x, 128), torch.cat([_rounded(part) for part in x.split(128, dim=1)], dim=1))
    assert not torch.equal(_rounded(x, 128), _rounded(x))


@pytest.mark.parametrize(("name", "source"), [("quantized", "plain"), ("again", "trained"), ("quantized", None)])
def test_an_engine_of_codes_must_hold_codes_and_scales_of_blocks(exports: Path, name: str, source: str | None) -> None:
    artifact, stored = open_artifact(exports / name), load_file(exports / name / "model.safetensors")
    plan = None if source is None else plan_of(artifact, exports / source)
    codes, scale = ExpectedWeights(artifact, plan).read(LAYER).held(Holding(torch.bfloat16, codes=True))
    assert torch.equal(codes.value, stored[LAYER].float())
    assert torch.equal(scale.value, stored[LAYER + "_scale"])


def test_a_kernel_of_blocks_shows_codes_and_the_scale_of_each_element(exports: Path) -> None:
    stored = load_file(exports / "quantized" / "model.safetensors")
    codes, scale = stored[LAYER], stored[LAYER + "_scale"]
    layer = nn.Module()
    layer.weight, layer.weight_scale = (nn.Parameter(value, requires_grad=False) for value in (codes, scale))
    layer.quant_method, layer.params_dtype, layer.weight_block_size = SimpleNamespace(), torch.bfloat16, [128, 128]
    kernel = find_kernel(layer, *codes.shape)
    assert (kernel.holds, kernel.codes[0].view(torch.uint8).equal(codes.view(torch.uint8))) == ("codes", True)
    assert kernel.scale is not None
    assert torch.equal(kernel.scale, torch.kron(scale, torch.ones(128, 128)))
    layer.weight_scale = nn.Parameter(scale[:, :2].contiguous(), requires_grad=False)  # packed in another layout
    assert find_kernel(layer, *codes.shape).scale is None
