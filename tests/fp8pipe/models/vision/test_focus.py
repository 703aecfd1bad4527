"""`sample:vit-s` is the ONNX model it was read from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fp8pipe.core.errors import BadArtifactError, ConfigurationError, MissingCapabilityError
from fp8pipe.models.compat import import_timm
from fp8pipe.models.samples import focus_onnx
from fp8pipe.models.vision.prepare import vision_outputs
from fp8pipe.models.vision.samples import focus_weights
from fp8pipe.models.vision.sources import VisionModel, load_vision_model
from fp8pipe.models.vision.structure import read_structure

POSITIONS = "/backbone/embeddings/Concat_6_output_0"
TOKENS = "/backbone/layernorm/Add_1_output_0"


@pytest.fixture(scope="module")
def onnx_file() -> Path:
    pytest.importorskip("onnx")
    try:
        return focus_onnx()
    except MissingCapabilityError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def vision(onnx_file: Path) -> VisionModel:
    return load_vision_model("sample:vit-s", (224, 224))


@torch.no_grad()
def test_tokens_equal_those_of_the_onnx_model(onnx_file: Path, vision: VisionModel):
    onnx = pytest.importorskip("onnx")
    ort = pytest.importorskip("onnxruntime")
    graph = onnx.load(str(onnx_file))
    for name in (POSITIONS, TOKENS):
        graph.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    pixels = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    positions, tokens = session.run([POSITIONS, TOKENS], {"input_image": pixels.numpy()})
    ours = vision.model.pos_embed.clone()
    # The file resamples its table without antialiasing, timm with: alike, position by position, and not the same.
    alike = torch.cosine_similarity(ours, torch.from_numpy(positions), dim=-1)
    assert alike.min() > 0.9
    try:
        vision.model.pos_embed.copy_(torch.from_numpy(positions))
        given = vision.model.forward_features(pixels)
    finally:
        vision.model.pos_embed.copy_(ours)
    # Tokens have a deviation of about 2; float32 through 12 layers leaves 2e-5 of two implementations.
    torch.testing.assert_close(given, torch.from_numpy(tokens), rtol=0, atol=1e-4)


def test_at_its_own_grid_the_table_is_not_resampled(onnx_file: Path):
    onnx = pytest.importorskip("onnx")
    tensors = {t.name: t for t in onnx.load(str(onnx_file)).graph.initializer}
    table = focus_weights(onnx_file, (518, 518))["pos_embed"]
    kept = onnx.numpy_helper.to_array(tensors["onnx::Reshape_1962"])
    assert torch.equal(table[:, 1:], torch.from_numpy(kept.copy()))


def test_resampling_is_timms(onnx_file: Path):
    import_timm()
    from timm.layers import resample_abs_pos_embed

    whole = focus_weights(onnx_file, (518, 518))["pos_embed"]
    wide = focus_weights(onnx_file, (112, 140))["pos_embed"]
    assert wide.shape == (1, 81, 384)
    assert torch.equal(wide, resample_abs_pos_embed(whole, [8, 10], old_size=[37, 37], num_prefix_tokens=1))


def test_it_is_a_backbone_of_12_layers(vision: VisionModel):
    structure = read_structure(vision.model, (224, 224))
    assert structure.is_backbone
    assert len(structure.attentions) == 12
    assert len(structure.linears) == 1 + 12 * 4
    site = structure.attentions[0]
    assert (site.heads, site.head_dim, site.prefix_tokens, site.grid) == (6, 64, 1, (16, 16))
    assert vision.preprocessing.crop == (224, 224)
    assert vision_outputs(vision.model, torch.zeros(1, 3, 224, 224)).shape == (1, 384)


def test_sizes_that_are_no_multiple_of_the_patch_are_refused():
    with pytest.raises(ConfigurationError, match="patches are 14"):
        load_vision_model("sample:vit-s", (100, 112))


def test_a_file_with_other_tensors_is_refused(tmp_path: Path):
    onnx = pytest.importorskip("onnx")
    graph = onnx.helper.make_graph([], "empty", [], [])
    onnx.save(onnx.helper.make_model(graph), tmp_path / "other.onnx")
    with pytest.raises(BadArtifactError, match="tensors of the ViT-S"):
        focus_weights(tmp_path / "other.onnx", (112, 112))
