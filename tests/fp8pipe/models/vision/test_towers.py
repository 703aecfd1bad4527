"""A vision model out of a checkpoint that holds more: its features are transformers' own, and nothing of it is lost."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from vision_checkpoints import save_model, save_transformers
from vit_families import family, random_pixels

from fp8pipe.core.errors import ConfigurationError
from fp8pipe.models.compat import import_transformers
from fp8pipe.models.vision.prepare import vision_outputs
from fp8pipe.models.vision.sources import load_vision_model, save_vision_model

_CLIP = family("hf-clip").architecture.arguments
TOWERS = {key: _CLIP[key] for key in ("vision_config", "text_config")}
# The width of both towers' projections stands outside of either.
CASES = [("CLIPModel", {"projection_dim": 20}), ("SiglipModel", {}), ("MetaClip2Model", {"projection_dim": 20})]


@pytest.mark.parametrize(("cls", "changes"), CASES)
def test_image_features_are_those_of_transformers(cls: str, changes: dict, tmp_path: Path):
    model = save_model(tmp_path, cls, TOWERS | changes)
    vision = load_vision_model(str(tmp_path))
    pixels = random_pixels(family("hf-clip"), 3)
    with torch.no_grad():
        features = model.get_image_features(pixel_values=pixels).pooler_output
        assert features.shape == (3, changes.get("projection_dim", 32))
        torch.testing.assert_close(vision_outputs(vision.model, pixels), features, rtol=0, atol=1e-5)
    assert vision.architecture.classes is None
    save_vision_model(vision, tmp_path / "ours")
    assert load_vision_model(str(tmp_path / "ours")).digest == vision.digest


@pytest.mark.parametrize(
    ("cls", "kind"), [("CLIPModel", "CLIPImageProcessor"), ("SiglipModel", "SiglipImageProcessor")]
)
def test_features_of_pictures_are_those_of_transformers(cls: str, kind: str, tmp_path: Path):
    """From the picture on: processor and `get_image_features`, for any shape, and where a picture is transparent."""
    chosen = {"image_processor_type": kind, "resample": 3, "do_center_crop": kind.startswith("CLIP"), "crop_size": 32}
    model = save_model(tmp_path, cls, TOWERS | ({"projection_dim": 20} if cls == "CLIPModel" else {}), chosen)
    vision = load_vision_model(str(tmp_path))
    processor = import_transformers().AutoImageProcessor.from_pretrained(tmp_path)
    assert type(processor).__name__ == kind
    for shape in ((32, 32), (90, 161), (161, 90), (3, 200), (200, 3), (1, 1), (7, 5)):
        random = np.random.default_rng(shape[0])
        for channels in (3, 4):
            image = Image.fromarray(random.integers(0, 256, (*shape, channels), dtype=np.uint8))
            with torch.no_grad():
                theirs = model.get_image_features(**processor(images=image, return_tensors="pt")).pooler_output
                ours = vision_outputs(vision.model, vision.preprocessing.image_to_tensor(image)[None])
            # The same codes; the two normalize them in another order of float32 operations.
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("stem", ["CLIP", "Siglip"])
def test_a_classifier_beside_the_configuration_of_a_text_encoder(stem: str, tmp_path: Path):
    """A classifier's own configuration has both encoders, and its weights are the vision side's."""
    towers = TOWERS | {"id2label": {0: "a", 1: "b", 2: "c"}}
    model = save_model(tmp_path, f"{stem}ForImageClassification", towers)
    vision = load_vision_model(str(tmp_path))
    pixels = torch.randn(2, 3, *vision.architecture.image_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(vision_outputs(vision.model, pixels), model(pixels).logits, rtol=0, atol=1e-5)
    assert vision.architecture.classes == ("a", "b", "c")


def test_a_projection_that_no_class_reads_is_refused(tmp_path: Path):
    save_model(tmp_path, "ChineseCLIPModel", TOWERS | {"projection_dim": 20})
    with pytest.raises(ConfigurationError, match="does not use") as caught:
        load_vision_model(str(tmp_path))
    assert "visual_projection.weight" in caught.value.why


@pytest.mark.parametrize("cls", ["Aimv2Model", "AltCLIPModel", "BlipModel"])
def test_towers_whose_class_reads_other_names_are_told_apart(cls: str, tmp_path: Path):
    """transformers' class of the vision side alone finds none of its weights in the whole checkpoint."""
    text = TOWERS["text_config"] | ({"encoder_hidden_size": 32} if cls == "BlipModel" else {})
    save_model(tmp_path, cls, TOWERS | {"text_config": text, "projection_dim": 20})
    with pytest.raises(ConfigurationError, match="does not hold all weights") as caught:
        load_vision_model(str(tmp_path))
    assert f"save the vision model of the {cls} by itself" in caught.value.fix


def test_weights_that_are_left_over_are_refused_and_tables_of_indices_are_not(tmp_path: Path):
    save_transformers(tmp_path, "hf-vit-backbone")
    weights = load_file(tmp_path / "model.safetensors")
    spare = {
        "embeddings.position_ids": torch.arange(17),
        "logit_scale": torch.ones(()),
        "text_model.x": torch.ones(2),
    }
    save_file(weights | spare, tmp_path / "model.safetensors", metadata={"format": "pt"})
    load_vision_model(str(tmp_path))
    spare["classifier.weight"] = torch.ones(5, 32)
    save_file(weights | spare, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigurationError, match="does not use") as caught:
        load_vision_model(str(tmp_path))
    assert caught.value.why == "not read: classifier.weight"
