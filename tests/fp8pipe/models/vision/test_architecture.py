"""An architecture builds the same module anywhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from vit_families import CLASSES, FAMILIES, NAMES, Family, family, random_pixels

from fp8pipe.core.config import build_config
from fp8pipe.core.errors import BadArtifactError, ConfigurationError
from fp8pipe.models.vision.architecture import Architecture, ClassAndPatches, build
from fp8pipe.models.vision.prepare import class_count, vision_outputs
from fp8pipe.models.vision.preprocessing import read_model_file, write_model_file
from fp8pipe.models.vision.structure import read_structure


def described(**changes: object) -> Architecture:
    values = {"library": "timm", "name": "vit_tiny_patch16_224", "image_size": (32, 32), "head": "classifier",
              "arguments": {"img_size": 32, "num_classes": 5, "depth": 1}, "classes": CLASSES}  # fmt: skip
    return build_config(Architecture, values | changes)


@pytest.mark.parametrize("one", FAMILIES, ids=NAMES)
@torch.no_grad()
def test_every_family_survives_a_file(one: Family, tmp_path: Path):
    write_model_file(one.architecture, tmp_path / "architecture.json")
    again = read_model_file(Architecture, tmp_path / "architecture.json")
    first, second = build(one.architecture), build(again)
    second.load_state_dict(first.state_dict())
    pixels = random_pixels(one, 2)
    output = vision_outputs(first, pixels)
    assert torch.equal(output, vision_outputs(second, pixels))
    assert class_count(first) == (None if one.architecture.classes is None else 5)
    assert output.shape[0] == 2


def test_building_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    build(described())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "vit_of_nowhere"}, "cannot build vit_of_nowhere"),
        ({"arguments": {"img_size": 32, "no_such": 1}}, "no_such"),
        ({"arguments": {"img_size": 30, "num_classes": 5, "patch_size": 0}}, "cannot build"),
        ({"arguments": {"checkpoint_path": "/tmp/x.pth"}}, "may not pass to timm: checkpoint_path"),
        ({"arguments": {"pretrained": True, "pretrained_cfg": {"url": "http://x"}}}, "pretrained, pretrained_cfg"),
        ({"arguments": {"cache_dir": "/tmp"}}, "cache_dir"),
        ({"arguments": {"embed_dim": {"file": "/tmp/x"}}}, "the argument embed_dim is"),
        ({"name": "hf-hub:someone/model"}, "not a plain timm model name"),
        ({"name": "local-dir:/tmp/model"}, "not a plain timm model name"),
        ({"name": "../model"}, "not a plain timm model name"),
        ({"classes": ("one", "two")}, "it has 5 classes, but 2 class names are given"),
        ({"library": "transformers", "name": "ViTOfNowhere"}, "no model class ViTOfNowhere"),
        ({"library": "transformers", "name": "AutoImageProcessor"}, "no model class AutoImageProcessor"),
        (
            {"library": "transformers", "name": "ViTForImageClassification", "arguments": {"hidden_size": "wide"}},
            "cannot build",
        ),
    ],
)
def test_what_cannot_be_built_is_explained(changes: dict[str, object], words: str):
    with pytest.raises(ConfigurationError, match=words):
        build(described(**changes))


@pytest.mark.parametrize(
    "changes", [{"classes": None}, {"head": "features"}, {"classes": ()}, {"classes": ("a", "a")}, {"extra": 1}]
)
def test_contradictions_are_refused(changes: dict[str, object]):
    with pytest.raises(ConfigurationError):
        described(**changes)


def test_a_damaged_file_is_named(tmp_path: Path):
    (tmp_path / "architecture.json").write_text('{"library": "timm"}')
    with pytest.raises(BadArtifactError, match="architecture") as caught:
        read_model_file(Architecture, tmp_path / "architecture.json")
    assert "image_size" in caught.value.why
    with pytest.raises(BadArtifactError, match="gone"):
        read_model_file(Architecture, tmp_path / "gone.json")


@pytest.mark.parametrize(
    ("name", "width"),
    [("timm-dinov2", 64), ("hf-vit-backbone", 64), ("hf-dinov2-other-size", 64), ("hf-siglip-backbone", 32),
     ("timm-swin-wide", 32), ("hf-swin-wide", 32), ("hf-clip-backbone", 64)],
)  # fmt: skip
@torch.no_grad()
def test_a_probe_on_every_kind_of_backbone(name: str, width: int):
    one = family(name)
    architecture = one.architecture.model_copy(update={"head": "probe", "classes": CLASSES, "activation": "softmax"})
    model = build(architecture)
    assert isinstance(model, ClassAndPatches)
    structure = read_structure(model, architecture.image_size)
    assert structure.heads == ("head",)
    assert structure.classes == 5
    assert not any("pooler" in name or ".head." in name for name in structure.linear_names)
    pixels = random_pixels(one, 2)
    features = model.features(pixels)
    assert features.shape == (2, width)
    tokens = (
        model.backbone.forward_features(pixels).flatten(1, -2)
        if one.architecture.library == "timm"
        else model.backbone(pixels).last_hidden_state
    )
    prefix = structure.attentions[-1].prefix_tokens
    expected = [tokens[:, 0]] * (prefix > 0) + [tokens[:, prefix:].mean(dim=1)]
    torch.testing.assert_close(features, torch.cat(expected, dim=1))
    torch.testing.assert_close(vision_outputs(model, pixels), model.head(features))


def test_a_probe_needs_a_backbone():
    with pytest.raises(ConfigurationError, match="needs a backbone"):
        build(described(head="probe"))
