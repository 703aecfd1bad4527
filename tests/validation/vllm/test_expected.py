"""What an engine ought to hold comes from the source wherever the source has it, in every form of export."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_artifacts import details_of
from tiny_checkpoints import make_model, quantize, write_plain

from exporters.vllm.export import export_vllm
from exporters.vllm.options import VllmExportOptions
from fp8pipe.artifact import ArtifactWriter, LayerRecord, NumberFormat, open_artifact
from fp8pipe.artifact.layers import Encoding
from fp8pipe.core.errors import BadArtifactError, ConfigurationError
from validation.vllm.expected import Expected, ExpectedWeights, count_differences, open_export

LAYER = "model.layers.1.self_attn.k_proj.weight"
NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_plain(tmp_path_factory.mktemp("plain") / "model", make_model())


@pytest.fixture(scope="module")
def trained(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tensors, layers = {}, []
    encoding = Encoding(format="e4m3", bits=8, granularity="per-tensor")
    for name, value in load_file(plain / "model.safetensors").items():
        tensors[name] = value
        if name.endswith("_proj.weight"):
            tensors[name], tensors[name + "_scale"], _ = quantize(value.float(), "tensor")
            layers.append(LayerRecord(name=name.removesuffix(".weight"), weight=encoding, shape=tuple(value.shape)))
    root = tmp_path_factory.mktemp("trained") / "falqon"
    with ArtifactWriter(root, kind="falqon", stage="finetune") as writer:
        for file in plain.iterdir():
            if not file.name.startswith("model"):
                (writer.root / file.name).write_bytes(file.read_bytes())
        save_file(tensors, writer.root / "model.safetensors", metadata={"format": "pt"})
        number_format = NumberFormat(name="e4m3", granularity="per-tensor")
        writer.commit(number_format=number_format, layers=layers, details=details_of("falqon", base_dtype="bfloat16"))
    return root


def export(source: Path, place: Path, form: str = "fp8") -> Path:
    return export_vllm(source, place, VllmExportOptions(format=form)).root


def tampered(root: Path, name: str, place: Path) -> Path:
    """The export with one tensor of zeros, and hashes that agree."""
    old = open_artifact(root).manifest
    with ArtifactWriter(place, kind=old.kind, stage="export") as writer:
        for entry in old.files:
            (writer.root / entry.path).write_bytes((root / entry.path).read_bytes())
        tensors = load_file(root / "model.safetensors")
        tensors[name] = torch.zeros_like(tensors[name])
        save_file(tensors, writer.root / "model.safetensors", metadata={"format": "pt"})
        writer.commit(
            details=old.details, parents=old.parents, layers=old.layers, number_format=old.number_format,
            config=old.config,
        )  # fmt: skip
    return place


@pytest.mark.parametrize("form", ["fp8", "bf16"])
@pytest.mark.parametrize("name", [LAYER, NORM])
def test_values_are_the_sources_whatever_the_export_holds(trained, tmp_path, form, name):
    whole = export(trained, tmp_path / "whole", form)
    other = tampered(whole, name, tmp_path / "other")
    source = load_file(trained / "model.safetensors")
    wanted = source[name].float() * source.get(name + "_scale", torch.tensor(1.0))
    if form == "bf16":
        wanted = wanted.bfloat16().float()
    for root in (whole, other):
        against = ExpectedWeights(open_export(root), trained)
        read = against.read(name)
        assert against.reference == "source"
        assert torch.equal(read.value, wanted)
        assert (read.codes is not None) == (form == "fp8" and name == LAYER)
        own = ExpectedWeights(open_export(root))
        assert own.reference == "export"
        assert torch.equal(own.read(name).value, wanted) == (root == whole)
    assert against.quantized(name) == (form == "fp8" and name == LAYER)


def test_every_tensor_but_scales_is_expected(trained, tmp_path):
    against = ExpectedWeights(open_export(export(trained, tmp_path / "x")), trained)
    stored = load_file(tmp_path / "x" / "model.safetensors")
    assert [tensor.name for tensor in against] == against.names
    assert set(against.names) == {name for name in stored if not name.endswith("_scale")}


def test_another_parent_and_another_kind_are_refused(trained, plain, tmp_path):
    made = export(trained, tmp_path / "x")
    with pytest.raises(ConfigurationError, match="was not made from"):
        ExpectedWeights(open_export(made), plain)
    with pytest.raises(BadArtifactError, match="wrong kind"):
        open_export(trained)
    (made / "config.json").write_text("{}")
    with pytest.raises(BadArtifactError, match=r"config\.json has 2 bytes"):
        open_export(made)


def test_digests_are_of_the_fp32_bytes_and_of_those_without_a_sign_of_zero():
    value = torch.tensor([[0.0, -0.0], [1.0, -2.0]])
    found = Expected("w", value, None, None, True).digests()
    plus = torch.tensor([[0.0, 0.0], [1.0, -2.0]])
    assert found == {
        "shape": [2, 2], "transposed": True, "sha256": hashlib.sha256(value.numpy().tobytes()).hexdigest(),
        "sha256_unsigned_zero": hashlib.sha256(plus.numpy().tobytes()).hexdigest(),
    }  # fmt: skip
    turned = Expected("w", value.t(), None, None, False).digests()
    assert turned["sha256"] == hashlib.sha256(value.t().contiguous().numpy().tobytes()).hexdigest()


def test_differences_are_counted_in_bits_and_in_codes():
    codes = torch.tensor([[1.0, -2.0, 0.0, 448.0]]).to(torch.float8_e4m3fn)
    expected = Expected("w", codes.float() * 0.1, codes, torch.tensor(0.1), False)
    plain = Expected("w", expected.value, None, None, False)
    assert count_differences(expected, expected.value.clone()) == (0, 0)
    assert count_differences(plain, expected.value * 2) == (3, 0)
    assert count_differences(plain, torch.zeros(4)) == (4, 0)
    negative = expected.value.clone()
    negative[0, 2] = -0.0
    assert count_differences(expected, negative) == (1, 1)
