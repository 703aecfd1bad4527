"""MXFP4 experts, as gpt-oss is published: every code against transformers' own dequantization, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from language_models import ARCHITECTURES, write
from safetensors.torch import load_file, save_file

from fp8pipe.core.errors import ConfigurationError
from fp8pipe.models.checkpoint.quantized.base import read_base
from fp8pipe.models.compat import import_transformers
from fp8pipe.models.language.base import check_base, check_values

STACKS = [f"model.layers.{layer}.mlp.experts.{leaf}" for layer in (0, 1) for leaf in ("gate_up_proj", "down_proj")]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Random codes, all values of a byte among them, and scales from tiny to large."""
    write(ARCHITECTURES["gpt_oss"], tmp_path)
    tensors, generator = load_file(tmp_path / "model.safetensors"), torch.Generator().manual_seed(5)
    for name in STACKS:
        experts, inner, out = tensors.pop(name).shape
        shape = (experts, out, inner // 32)
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), generator=generator).to(torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(100, 135, shape, generator=generator).to(torch.uint8)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    block = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": block}))
    return tmp_path


def test_every_value_is_that_of_transformers(base: Path) -> None:
    import_transformers()
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    stored, found = load_file(base / "model.safetensors"), read_base(base)
    for name in STACKS:
        theirs = convert_moe_packed_tensors(stored[f"{name}_blocks"], stored[f"{name}_scales"], dtype=torch.bfloat16)
        module, _, leaf = name.rpartition(".")
        parts = [found.entries[f"{module}.{number}.{leaf}.weight"] for number in range(len(theirs))]
        assert all(torch.equal(part.read(), one) for part, one in zip(parts, theirs, strict=True))
        assert torch.equal(parts[2].read_rows(range(3, 9)), theirs[2][3:9])
        assert torch.equal(found.state()[name][...], theirs)
    assert str(found.stored) == "FP4 (mxfp4, per-block of 1x32), 4 weight(s) dequantized to BF16"
    check_values(base, "mine", check_base(base, "mine"))  # no tensor is missing, none has another shape


@pytest.mark.parametrize(
    ("change", "told"),
    [(lambda tensors: tensors.pop(f"{STACKS[0]}_scales"), "has no scales"),
     (lambda tensors: tensors.pop(f"{STACKS[0]}_blocks"), "_scales has dtype U8, not read as mxfp4"),
     (lambda tensors: tensors.update({f"{STACKS[0]}_scales": tensors[f"{STACKS[1]}_scales"].clone()}), "expected U8")],
)  # fmt: skip
def test_what_does_not_fit_is_refused(base: Path, change, told: str) -> None:
    tensors = load_file(base / "model.safetensors")
    change(tensors)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigurationError) as caught:
        read_base(base)
    assert told in str(caught.value.why)


def test_a_scale_that_means_nan_is_found_with_the_values(base: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    tensors[f"{STACKS[0]}_scales"][1, 2, 1] = 255
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigurationError, match=r"experts\.1\.gate_up_proj\.weight"):
        check_values(base, "mine", check_base(base, "mine"))
