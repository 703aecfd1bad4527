"""Inspection of foreign checkpoints: formats, shapes, scales and saturated codes as counted by hand or by torch."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from fp8pipe.cli import main
from fp8pipe.core.errors import ConfigurationError
from fp8pipe.models.inspection.contents import ScaleBins
from fp8pipe.models.inspection.places import inspect_contents
from fp8pipe.models.inspection.safetensors_layers import decode


def checkpoint(root: Path, tensors: dict[str, torch.Tensor], **quantization: object) -> Path:
    root.mkdir()
    save_file(tensors, root / "model.safetensors")
    config = {"architectures": ["LlamaForCausalLM"]}
    if quantization:
        config["quantization_config"] = quantization
    (root / "config.json").write_text(json.dumps(config))
    return root


def layer(root: Path, name: str = "q"):
    return next(layer for layer in inspect_contents(root).layers if layer.name == name)


def fp8(*shape: int) -> torch.Tensor:
    values = torch.linspace(-400, 400, int(np.prod(shape))).reshape(shape)
    values.view(-1)[:3] = torch.tensor([448.0, -448.0, 448.0])
    return values.to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("scale", "name", "granularity"),
    [
        (torch.tensor(0.25), "weight_scale", "per-tensor"),
        (torch.full((256, 1), 0.25), "weight_scale", "per-channel"),
        (torch.full((2, 1), 0.25), "weight_scale_inv", "blocks of 128x128"),
        (torch.full((256,), 0.25, dtype=torch.bfloat16), "weight_scale", "per-channel"),
    ],
)
def test_fp8_with_scales_of_every_form(tmp_path, scale, name, granularity):
    root = checkpoint(tmp_path / "m", {"q.weight": fp8(256, 128), f"q.{name}": scale, "norm.weight": torch.ones(8)})
    found = layer(root)
    assert (found.format, found.shape, found.granularity) == ("fp8-e4m3", (256, 128), granularity)
    assert (found.codes, found.saturated, found.nan) == (256 * 128, 3, 0)
    assert dict(found.scales.bins) == {-2: scale.numel()}
    assert found.size_bytes == 256 * 128 + scale.nbytes


@pytest.mark.parametrize(
    ("declared", "granularity"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "blocks of 128x128"),
        ({"config_groups": {"group_0": {"weights": {"block_structure": [128, 128]}}}}, "blocks of 128x128"),
        ({"quant_method": "fp8", "weight_block_size": [128, 64]}, "per-block"),  # not those of the scales
        (None, "per-block"),
    ],
)
def test_blocks_that_do_not_divide_a_side_are_those_declared(tmp_path, declared, granularity):
    """Like DeepSeek-V3's kv_a_proj_with_mqa, which has 576 rows: shapes alone do not tell the size of a block."""
    tensors = {"q.weight": fp8(193, 256), "q.weight_scale_inv": torch.full((2, 2), 0.25)}
    root = checkpoint(tmp_path / "m", tensors)
    (root / "config.json").write_text(json.dumps({"quantization_config": declared}))
    assert layer(root).granularity == granularity


def test_modelopt_and_its_input_scales(tmp_path):
    codes = fp8(32, 16)
    codes.view(torch.uint8).view(-1)[5] = 0x7F
    tensors = {"q.weight": codes, "q.weight_scale": torch.tensor(-1.0), "q.input_scale": torch.tensor(1.0)}
    root = checkpoint(tmp_path / "m", tensors, quant_method="modelopt", quant_algo="FP8")
    contents = inspect_contents(root)
    assert contents.form == "modelopt (FP8)"
    (found,) = contents.layers
    assert (found.nan, found.scales.bad, dict(found.scales.bins)) == (1, 1, {})


def test_a_quantized_checkpoint_is_told_whether_it_can_be_a_base(tmp_path):
    held = {"q.weight": fp8(256, 128), "q.weight_scale_inv": torch.rand(2, 1)}
    root = checkpoint(tmp_path / "a", held, quant_method="fp8", weight_block_size=[128, 128])
    said = inspect_contents(root, look=False).facts["as_base"]
    assert said == "can be one: FP8 (fp8, per-block of 128x128), 1 weight(s) dequantized to BF16"
    root = checkpoint(tmp_path / "b", held, quant_method="fp8", weight_block_size=[64, 64])
    said = inspect_contents(root, look=False).facts["as_base"]
    assert said.startswith("cannot be one: q.weight_scale_inv has shape (2, 1)")
    assert "as_base" not in inspect_contents(checkpoint(tmp_path / "c", {"q.weight": torch.ones(2, 2)})).facts


def test_gptq_is_unpacked_to_its_shape(tmp_path):
    packed = torch.full((128 // 8, 32), 0x0F0F0F0F, dtype=torch.int32)  # every nibble at an end
    tensors = {"q.qweight": packed, "q.scales": torch.full((2, 32), 2.0**-5, dtype=torch.float16)}
    root = checkpoint(tmp_path / "m", tensors, quant_method="gptq", bits=4)
    found = layer(root)
    assert (found.format, found.shape, found.granularity) == ("int4-gptq", (32, 128), "blocks of 1x64")
    assert (found.codes, found.saturated) == (32 * 128, 32 * 128)
    assert dict(found.scales.bins) == {-5: 64}


def test_four_bit_floats_and_their_block_scales(tmp_path):
    packed = torch.zeros(16, 16, dtype=torch.uint8)
    packed[0, 0], packed[0, 1] = 0x7F, 0x0F  # 6 and -6; 0 and -6
    scales = torch.full((16, 2), 1.5).to(torch.float8_e4m3fn)
    tensors = {"q.weight_packed": packed, "q.weight_scale": scales, "q.weight_global_scale": torch.tensor(2.0)}
    found = layer(checkpoint(tmp_path / "m", tensors, quant_method="compressed-tensors", format="nvfp4-pack-quantized"))
    assert (found.format, found.shape, found.granularity) == ("nvfp4", (16, 32), "blocks of 1x16")
    assert (found.codes, found.saturated) == (16 * 32, 3)
    assert dict(found.scales.bins) == {0: 32}


def test_plain_weights_and_what_lies_beside(tmp_path):
    root = checkpoint(tmp_path / "m", {"q.weight": torch.ones(4, 4).bfloat16()})
    (root / "tokenizer.json").write_text("{}")
    (root / "tokenizer_config.json").write_text('{"chat_template": "x"}')
    contents = inspect_contents(root)
    assert contents.form == "plain"
    assert [(x.format, x.codes) for x in contents.layers] == [("bf16", 0)]
    facts = contents.facts
    assert (facts["architecture"], facts["tokenizer"]) == ("LlamaForCausalLM", "tokenizer.json")
    assert facts["chat_template"] is True


def test_every_e4m3_code_is_decoded_as_torch_does():
    codes = torch.arange(256, dtype=torch.uint8)
    expected = codes.view(torch.float8_e4m3fn).double().numpy()
    np.testing.assert_array_equal(decode(codes.numpy(), "F8_E4M3"), expected)


def test_bins_hold_powers_of_two_from_below():
    bins = ScaleBins()
    bins.add(np.array([1.0, 1.999, 2.0, 0.5, 2.0**-126, 0.0, -1.0, np.nan, np.inf]))
    assert dict(bins.bins) == {0: 2, 1: 1, -1: 1, -126: 1}
    assert (bins.bad, bins.count) == (4, 9)
    assert any(line.startswith("2^0") and line.endswith("#" * 40) for line in bins.bars())


def test_a_graph_file(tmp_path):
    onnx = pytest.importorskip("onnx")
    helper, kinds = onnx.helper, onnx.TensorProto
    codes = np.arange(-32, 32, dtype=np.int8).reshape(8, 8)
    codes[0, 0], codes[1, 1] = 127, -128
    stored = [
        onnx.numpy_helper.from_array(codes, "w"), onnx.numpy_helper.from_array(np.full(8, 0.25, np.float32), "s"),
    ]  # fmt: skip
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s"], ["f"], axis=1), helper.make_node("MatMul", ["x", "f"], ["y"]),
    ]  # fmt: skip
    io = [helper.make_tensor_value_info(name, kinds.FLOAT, [1, 8]) for name in "xy"]
    model = helper.make_model(helper.make_graph(nodes, "g", io[:1], io[1:], stored), ir_version=10,
                              opset_imports=[helper.make_opsetid("", 21)])  # fmt: skip
    onnx.save(model, tmp_path / "m.onnx")
    contents = inspect_contents(tmp_path / "m.onnx")
    found = next(x for x in contents.layers if x.name == "w")
    assert (found.format, found.granularity, found.codes, found.saturated) == ("int8", "per-channel", 64, 2)
    assert dict(found.scales.bins) == {-2: 8}
    assert contents.facts["operators"] == {"DequantizeLinear": 1, "MatMul": 1}


def test_a_gguf_file(tmp_path):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    values = np.full((2, 64), 127 * 2.0**-3, np.float32)
    kind = gguf.GGMLQuantizationType.Q8_0
    writer.add_tensor("blk.0.attn_q.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    contents = inspect_contents(tmp_path / "m.gguf")
    (found,) = contents.layers
    assert (found.name, found.format, found.shape) == ("blk.0.attn_q", "q8_0", (2, 64))
    assert dict(found.scales.bins) == {-3: 4}
    assert contents.facts["architecture"] == "llama"


def test_memory_stays_near_a_chunk(tmp_path):
    tensors = {"q.weight": fp8(8192, 8192), "q.weight_scale": torch.ones(8192, 1)}
    root = checkpoint(tmp_path / "m", tensors)
    tracemalloc.start()
    found = layer(root)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.codes == 1 << 26
    assert peak < 48 << 20  # the tensor has 64 MiB


def test_what_cannot_be_read_is_said(tmp_path):
    root = checkpoint(tmp_path / "m", {"q.weight": torch.ones(64, 64)})
    file = root / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ConfigurationError, match="is cut short"):
        inspect_contents(root)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigurationError, match="holds no weights"):
        inspect_contents(tmp_path / "empty")
    (tmp_path / "empty/pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ConfigurationError, match="only pickled weights are there"):
        inspect_contents(tmp_path / "empty")
    with pytest.raises(ConfigurationError, match="there is no such path"):
        inspect_contents(tmp_path / "none")


def test_the_command_shows_a_foreign_checkpoint(tmp_path):
    root = checkpoint(tmp_path / "m", {"q.weight": fp8(32, 32), "q.weight_scale": torch.full((32, 1), 0.25)})
    ended = CliRunner().invoke(main, ["inspect", str(root), "--layers"])
    assert ended.exit_code == 0, ended.output
    lines = [" ".join(line.split()) for line in ended.stdout.splitlines()]
    assert "fp8-e4m3 per-channel 1 1.15 kB 0.293%" in lines
    assert f"2^-2 32 {'#' * 40}" in lines
    assert any(line.startswith("q fp8-e4m3 32x32") for line in lines)
    document = json.loads(CliRunner().invoke(main, ["inspect", str(root), "--json"]).stdout)
    assert document["contents"]["layers"][0]["saturated"] == 3 / 1024
    headers = json.loads(CliRunner().invoke(main, ["inspect", str(root), "--json", "--headers"]).stdout)
    assert headers["contents"]["layers"][0]["saturated"] is None


@pytest.mark.parametrize(
    ("declared", "form"),
    [
        ([1], "of an unknown form (quantization_config is no mapping)"),
        ({"quant_method": 5, "weight_block_size": "128", "bits": "x"}, "5 (blocks of '128')"),
        ({"quant_method": "x", "config_groups": {"group_0": "y"}}, "x"),
        ({"quant_method": "x", "config_groups": {"group_0": {"weights": "y"}}}, "x"),
        ({"quant_method": "x", "config_groups": ["y"]}, "x"),
    ],
)
def test_a_declaration_of_any_form_is_shown_and_no_base(tmp_path, declared, form):
    root = checkpoint(tmp_path / "m", {"q.weight": fp8(256, 128)})
    (root / "config.json").write_text(json.dumps({"architectures": "One", "quantization_config": declared}))
    found = inspect_contents(root)
    assert found.form == form
    assert found.facts["as_base"].startswith("cannot be one: ")
    assert found.facts["architecture"] == "One"
