"""What checkpoints of other libraries say of their outputs and their images, and how it is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from vision_checkpoints import PROCESSOR, save_model, save_timm, save_transformers
from vit_families import family, random_pixels, vision_family

from fp8pipe.core.errors import BadArtifactError, ConfigurationError
from fp8pipe.models.vision.prepare import vision_outputs
from fp8pipe.models.vision.sources import load_vision_model, save_vision_model


@pytest.mark.parametrize(
    ("changes", "expected", "noted"),
    [
        ({}, "softmax", False), ({"problem_type": "single_label_classification"}, "softmax", False),
        ({"problem_type": "multi_label_classification"}, "sigmoid", False),
        ({"problem_type": "regression"}, "none", False), ({"num_labels": 1}, "none", True),
        ({"num_labels": 1, "problem_type": "regression"}, "none", False),
    ],
)  # fmt: skip
def test_what_outputs_mean_comes_from_the_checkpoint(
    changes: dict[str, Any], expected: str, noted: bool, tmp_path: Path
):
    save_transformers(tmp_path / "hf", "hf-vit", **changes)
    vision = load_vision_model(str(tmp_path / "hf"))
    assert vision.architecture.activation == expected
    assert bool([note for note in vision.notes if "one output" in note]) is noted
    save_vision_model(vision, tmp_path / "ours")
    again = load_vision_model(str(tmp_path / "ours"))
    assert (again.architecture, again.digest) == (vision.architecture, vision.digest)


def test_one_output_of_timm_is_a_value_unless_the_user_says_more(tmp_path: Path):
    save_timm(tmp_path / "timm", classes=1)
    vision = load_vision_model(str(tmp_path / "timm"))
    assert vision.architecture.activation == "none"
    assert "one output" in vision.notes[-1]
    asked = load_vision_model(str(tmp_path / "timm"), activation="sigmoid")
    assert (asked.architecture.activation, asked.notes) == ("sigmoid", vision.notes[:-1])
    assert asked.digest != vision.digest
    with pytest.raises(ConfigurationError, match="head-activation softmax"):
        load_vision_model(str(tmp_path / "timm"), activation="softmax")
    save_vision_model(vision_family(family("timm-dinov2")), tmp_path / "features")
    with pytest.raises(ConfigurationError, match="head-activation sigmoid") as caught:
        load_vision_model(str(tmp_path / "features"), activation="sigmoid")
    assert caught.value.why == "they are features"


def test_doubled_and_shifted_class_names_are_read_and_noted(tmp_path: Path):
    labels = {1: "crane", 2: "ant", 3: "crane", 4: "bee", 5: "elk"}
    save_transformers(tmp_path / "hf", "hf-vit", id2label=labels)
    vision = load_vision_model(str(tmp_path / "hf"))
    assert vision.architecture.classes == ("crane (0)", "ant", "crane (2)", "bee", "elk")
    assert [("in order" in note, "several outputs" in note) for note in vision.notes[-2:]] == [
        (True, False), (False, True),
    ]  # fmt: skip
    save_vision_model(vision, tmp_path / "ours")
    assert load_vision_model(str(tmp_path / "ours")).digest == vision.digest


@pytest.mark.parametrize(("name", "value"), [("vit.layernorm.weight", float("nan")), ("classifier.bias", float("inf"))])
def test_weights_that_are_not_finite_are_refused_by_name(name: str, value: float, tmp_path: Path):
    save_transformers(tmp_path, "hf-vit")
    weights = load_file(tmp_path / "model.safetensors")
    weights[name][2] = value
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigurationError, match="not finite") as caught:
        load_vision_model(str(tmp_path))
    assert f"{name} (1 of {weights[name].numel()})" in caught.value.why


def test_our_own_directories_are_refused_likewise(tmp_path: Path):
    save_vision_model(vision_family(family("timm-vit")), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["norm.bias"][:] = torch.nan
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ConfigurationError, match="not finite") as caught:
        load_vision_model(str(tmp_path))
    assert "norm.bias (32 of 32)" in caught.value.why


def test_the_image_processor_inside_of_a_processor(tmp_path: Path):
    save_transformers(tmp_path, "hf-deit")
    alone = load_vision_model(str(tmp_path)).preprocessing
    (tmp_path / "preprocessor_config.json").unlink()
    nested = {"image_processor": PROCESSOR, "processor_class": "CLIPProcessor", "tokenizer": {}}
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    assert load_vision_model(str(tmp_path)).preprocessing == alone
    (tmp_path / "processor_config.json").write_text(json.dumps({"processor_class": "CLIPProcessor"}))
    with pytest.raises(ConfigurationError, match="how its pixels are made") as caught:
        load_vision_model(str(tmp_path))
    assert "processor_config.json" in caught.value.why


@pytest.mark.parametrize("wrong", [{"image_mean": [0.5]}, {"image_std": [0.5] * 4}, {"image_mean": "half"}])
def test_means_and_deviations_of_other_channels(wrong: dict[str, Any], tmp_path: Path):
    save_transformers(tmp_path, "hf-deit", wrong)
    with pytest.raises(ConfigurationError, match="preprocessing is not supported") as caught:
        load_vision_model(str(tmp_path))
    assert "channels" in caught.value.why or "half" in caught.value.why


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"layer_norm_eps": None}, "layer_norm_eps"), ({"image_size": "big"}, "image_size"),
        ({"id2label": ["a", "b"]}, "list"), ({"id2label": {"0": "a", "1": "b"}}, "id2label"),
    ],
)  # fmt: skip
def test_settings_that_transformers_does_not_take_are_told(change: dict[str, Any], why: str, tmp_path: Path):
    save_transformers(tmp_path, "hf-vit")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(BadArtifactError, match="cannot be loaded") as caught:
        load_vision_model(str(tmp_path))
    assert why in caught.value.why


def test_a_mapping_of_numbers_and_names_is_kept(tmp_path: Path):
    """MLCD's rotary positions; anything deeper is refused by name."""
    arguments = family("hf-clip-backbone").architecture.arguments
    model = save_model(tmp_path, "MLCDVisionModel", arguments)
    vision = load_vision_model(str(tmp_path))
    pixels = random_pixels(family("hf-clip-backbone"), 2)
    with torch.no_grad():
        torch.testing.assert_close(vision_outputs(vision.model, pixels), model(pixels).pooler_output)
    save_vision_model(vision, tmp_path / "ours")
    assert load_vision_model(str(tmp_path / "ours")).digest == vision.digest
    config = json.loads((tmp_path / "config.json").read_text())
    config["rope_parameters"]["original"] = {"file": "x"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigurationError, match="cannot be stored") as caught:
        load_vision_model(str(tmp_path))
    assert "rope_parameters" in caught.value.why


def test_names_of_functions_are_parts_of_a_model_of_timm(tmp_path: Path):
    save_timm(tmp_path / "timm", img_size=64, act_layer="relu", norm_layer="rmsnorm")
    vision = load_vision_model(str(tmp_path / "timm"))
    assert type(vision.model.norm).__name__ == "RmsNorm"
    save_timm(tmp_path / "other", model="convit_tiny", img_size=64, depth=1, local_up_to_layer=1)
    with pytest.raises(ConfigurationError, match="cannot be used") as caught:
        load_vision_model(str(tmp_path / "other"))
    assert "shapes and parts" in caught.value.fix


def test_a_download_that_was_cut_off_is_told(tmp_path: Path):
    save_transformers(tmp_path, "hf-vit")
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(BadArtifactError, match="cannot be loaded") as caught:
        load_vision_model(str(tmp_path))
    assert "incomplete" in caught.value.why


def test_a_backbone_without_its_pooling_layer_is_told(tmp_path: Path):
    save_transformers(tmp_path, "hf-vit-backbone")
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: value for name, value in weights.items() if not name.startswith("pooler.")}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigurationError, match="does not hold all weights") as caught:
        load_vision_model(str(tmp_path))
    assert "pooling layer" in caught.value.fix
