"""Bases in FP8 are what the libraries say that define the formats: bit for bit, whatever shares a scale."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from reference_checkpoints import (
    MODELOPT,
    edit_config,
    read_back,
    write_compressed_tensors,
    write_modelopt,
    write_native,
)
from safetensors.torch import load_file, save_file
from tiny_checkpoints import make_model
from torch import Tensor

from fp8pipe.models.checkpoint.names import Naming, checkpoint_names
from fp8pipe.models.checkpoint.quantized import values
from fp8pipe.models.checkpoint.quantized.base import base_entries, copy_base_files, read_base
from fp8pipe.models.compat import import_transformers
from fp8pipe.numerics.blocks import block_grid

LINEARS = 14


@pytest.fixture(scope="module")
def model_of() -> Any:
    """`model_of()` is a fresh copy of the tiny model, whose sides are whole blocks."""
    return make_model


def decoded(root: Path) -> dict[str, Tensor]:
    return {name: entry.read() for name, entry in base_entries(root).items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    different = [name for name in found if not torch.equal(found[name], expected[name])]
    assert not different
    assert {found[name].dtype for name in found} == {expected[name].dtype for name in expected}


@pytest.mark.parametrize("strategy", ["tensor", "channel", "block"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_compressed_tensors_as_its_own_library_decompresses_it(
    tmp_path: Path, model_of: Any, strategy: str, dtype: torch.dtype
) -> None:
    root = write_compressed_tensors(tmp_path / "base", model_of(), strategy, dtype)
    assert_same(decoded(root), read_back(root, import_transformers().CompressedTensorsConfig, dtype))
    stored = read_base(root).stored
    assert stored is not None
    assert (stored.method, stored.weights) == ("compressed-tensors", LINEARS)
    assert stored.granularity == [{"tensor": "per-tensor", "channel": "per-channel", "block": "per-block"}[strategy]]


@pytest.mark.parametrize("scale_format", ["float", "ue8m0"])
def test_native_blocks_as_transformers_dequantizes_them(tmp_path: Path, model_of: Any, scale_format: str) -> None:
    root = write_native(tmp_path / "base", model_of(), scale_format)
    assert_same(decoded(root), read_back(root, import_transformers().FineGrainedFP8Config))
    assert str(read_base(root).stored) == "FP8 (fp8, per-block of 128x128), 14 weight(s) dequantized to BF16"


@pytest.mark.parametrize("algorithm", list(MODELOPT))
def test_modelopt_by_its_definition(tmp_path: Path, model_of: Any, algorithm: str) -> None:
    expected = write_modelopt(tmp_path / "base", model_of(), algorithm, beside=algorithm != "FP8_PB_WO")
    found = decoded(tmp_path / "base")
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        ours = tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        assert np.array_equal(ours.view(np.int16), expected[name].view(np.int16)), name
    base = read_base(tmp_path / "base")
    assert len(base.runtime) == LINEARS
    assert "14 tensor(s) of the base for activations" in base.warnings()[1]


@pytest.mark.parametrize("shape", [(192, 320), (128, 64), (1, 300), (257, 128)])
def test_the_last_block_of_a_side_may_be_partial(shape: tuple[int, int]) -> None:
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    torch.manual_seed(1)
    codes = (torch.randn(shape) * 50).to(torch.float8_e4m3fn)
    scale = torch.rand(block_grid(shape, (128, 128)))
    args = QuantizationArgs(num_bits=8, type="float", strategy="block", block_structure=[128, 128])
    expected = dequantize(codes, scale, None, args, torch.float32).to(torch.bfloat16)
    assert torch.equal(values.dequantize_codes(codes, scale, (128, 128), torch.bfloat16), expected)


@pytest.mark.parametrize("block", [(128, 128), (64, 32), None])
def test_a_large_or_stacked_weight_is_decoded_part_by_part(
    monkeypatch: pytest.MonkeyPatch, block: tuple[int, int] | None
) -> None:
    torch.manual_seed(2)
    codes = (torch.randn(3, 300, 200) * 50).to(torch.float8_e4m3fn)
    scale = torch.rand(block_grid(codes.shape, block) if block else (3, 300, 1))
    ones = torch.ones(block or (1, 200))
    expected = torch.stack([c.float() * torch.kron(s, ones)[:300, :200] for c, s in zip(codes, scale, strict=True)])
    for chunk in (1 << 24, 20_000, 1):  # one row of blocks is the least
        monkeypatch.setattr(values, "_CHUNK", chunk)
        assert torch.equal(values.dequantize_codes(codes, scale, block, torch.float32), expected), chunk


def test_every_code_of_the_grid_has_the_value_of_its_definition() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(1, 256)
    wanted = codes.numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float32) * np.float32(0.3)
    found = values.dequantize_codes(codes.view(torch.float8_e4m3fn), torch.tensor([[0.3]]), None, torch.float32)
    assert np.array_equal(found.numpy(), wanted, equal_nan=True)


def test_the_dtype_is_the_models(tmp_path: Path, model_of: Any) -> None:
    root = write_native(tmp_path / "base", model_of())
    for said, dtype in (("float32", torch.float32), ("float16", torch.float16), (None, torch.bfloat16)):
        edit_config(root, dtype=said, torch_dtype=None)
        found = decoded(root)["model.layers.0.mlp.up_proj.weight"]
        assert found.dtype == dtype
    edit_config(root, text_config={"torch_dtype": "float16"})
    assert decoded(root)["model.layers.0.mlp.up_proj.weight"].dtype == torch.float16


def test_what_goes_on_says_nothing_of_the_format(tmp_path: Path, model_of: Any) -> None:
    write_modelopt(tmp_path / "base", model_of(), "FP8")
    block = {"quant_method": "modelopt", "quant_algo": "FP8"}
    edit_config(tmp_path / "base", quantization_config=block, text_config={"a": 1, "quantization_config": block})
    (tmp_path / "next").mkdir()
    copy_base_files(tmp_path / "base", tmp_path / "next")
    config = json.loads((tmp_path / "next" / "config.json").read_text(encoding="utf-8"))
    before = json.loads((tmp_path / "base" / "config.json").read_text(encoding="utf-8"))
    assert config.pop("text_config") == {"a": 1}
    assert config == {key: before[key] for key in before if key not in ("quantization_config", "text_config")}
    assert not (tmp_path / "next" / "hf_quant_config.json").exists()
    assert (tmp_path / "next" / "tokenizer.json").read_bytes() == (tmp_path / "base" / "tokenizer.json").read_bytes()
    names = checkpoint_names(tmp_path / "base", Naming(), ["model.layers.0.mlp.up_proj"])
    assert names == {"model.layers.0.mlp.up_proj": "model.layers.0.mlp.up_proj"}


def test_a_plain_base_passes_as_it_is(tmp_path: Path) -> None:
    held = {"a.weight": torch.zeros(2, 2, dtype=torch.bfloat16), "h.0.attn.bias": torch.ones(1, 1, 4, 4).byte()}
    save_file(held, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"quantization_config": null, "a": [1]}')
    base = read_base(tmp_path)
    assert (base.stored, base.warnings(), base.config) == (None, [], {"quantization_config": None, "a": [1]})
    assert_same(decoded(tmp_path), load_file(tmp_path / "model.safetensors"))
