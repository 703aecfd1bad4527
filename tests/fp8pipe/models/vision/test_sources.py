"""Every way to name a vision model ends in one that can be rebuilt; every mistake is explained."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from vision_checkpoints import save_timm, save_transformers
from vit_families import CLASSES, family, random_pixels, randomize, vision_family

from fp8pipe.core.errors import BadArtifactError, ConfigurationError
from fp8pipe.models.compat import import_timm
from fp8pipe.models.vision.prepare import vision_outputs
from fp8pipe.models.vision.preprocessing import Preprocessing
from fp8pipe.models.vision.sources import VisionModel, load_vision_model, save_vision_model


@pytest.mark.parametrize("name", ["timm-beit", "hf-siglip-backbone", "timm-dinov2"])
def test_saved_and_loaded(name: str, tmp_path: Path):
    vision = vision_family(family(name))
    save_vision_model(vision, tmp_path / "model")
    again = load_vision_model(str(tmp_path / "model"))
    assert again.digest == vision.digest
    assert (again.architecture, again.preprocessing) == (vision.architecture, vision.preprocessing)
    pixels = random_pixels(family(name), 2)
    assert torch.equal(vision_outputs(again.model, pixels), vision_outputs(vision.model, pixels))
    assert not again.model.training
    assert not any(parameter.requires_grad for parameter in again.model.parameters())


def test_the_digest_is_of_the_content():
    one = family("timm-vit")
    vision = vision_family(one)
    assert vision.digest.startswith("sha256:")
    assert vision_family(one).digest == vision.digest
    assert vision_family(one, seed=1).digest != vision.digest
    other = vision.preprocessing.model_copy(update={"mean": (0.1, 0.1, 0.1)})
    changed = VisionModel.of(vision.model.state_dict(), vision.architecture, other, "x")
    assert changed.digest != vision.digest


def test_damaged_directories_are_named(tmp_path: Path):
    folder = tmp_path / "model"
    save_vision_model(vision_family(family("timm-vit")), folder)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-10])
    with pytest.raises(BadArtifactError, match=r"model\.safetensors"):
        load_vision_model(str(folder))
    (folder / "model.safetensors").write_bytes(whole)
    weights = load_file(folder / "model.safetensors")
    save_file({key: value for key, value in weights.items() if key != "head.bias"}, folder / "model.safetensors")
    with pytest.raises(BadArtifactError, match="do not fit") as caught:
        load_vision_model(str(folder))
    assert "head.bias" in caught.value.why
    (folder / "preprocessing.json").unlink()
    with pytest.raises(BadArtifactError, match=r"preprocessing\.json"):
        load_vision_model(str(folder))


def test_another_image_size_than_the_saved_one_is_refused(tmp_path: Path):
    save_vision_model(vision_family(family("timm-vit")), tmp_path)
    assert load_vision_model(str(tmp_path), (32, 48)).architecture.image_size == (32, 48)
    with pytest.raises(ConfigurationError, match="reads images of 32x48"):
        load_vision_model(str(tmp_path), (32, 32))


@pytest.mark.parametrize("src", ["", "  ", "/no/such/folder", "org/name", "vit_tiny_patch16_224"])
def test_names_of_nothing(src: str):
    with pytest.raises(ConfigurationError, match="no vision model"):
        load_vision_model(src)


def test_a_directory_without_a_model(tmp_path: Path):
    with pytest.raises(ConfigurationError, match="is not a vision model"):
        load_vision_model(str(tmp_path))
    with pytest.raises(ConfigurationError, match="did you mean sample:vit-s"):
        load_vision_model("sample:vits")


@pytest.mark.parametrize("name", ["hf-vit", "hf-dinov2", "hf-swin", "hf-clip-backbone", "hf-siglip-backbone"])
def test_directories_of_transformers(name: str, tmp_path: Path):
    size = family(name).architecture.image_size
    processor = {"size": {"height": size[0], "width": size[1]}}
    model = save_transformers(tmp_path, name, processor)
    vision = load_vision_model(str(tmp_path))
    pixels = random_pixels(family(name), 2)
    with torch.no_grad():
        expected = vision_outputs(model, pixels)
        given = vision_outputs(vision.model, pixels)
    # SigLIP's pooling is rewritten into linears: another order of the same float32 sums.
    torch.testing.assert_close(given, expected, rtol=0, atol=1e-5)
    assert vision.architecture.image_size == size
    assert vision.preprocessing.crop == size
    assert vision.preprocessing.mean == (0.5, 0.4, 0.3)
    assert vision.preprocessing.interpolation == "bilinear"
    expected_classes = tuple(f"LABEL_{i}" for i in range(5)) if family(name).heads else None
    assert vision.architecture.classes == expected_classes
    save_vision_model(vision, tmp_path / "ours")
    assert load_vision_model(str(tmp_path / "ours")).digest == vision.digest


def test_class_names_come_along(tmp_path: Path):
    save_transformers(tmp_path, "hf-deit", id2label=dict(enumerate(CLASSES)))
    assert load_vision_model(str(tmp_path)).architecture.classes == CLASSES


@pytest.mark.parametrize(
    ("processor", "expected"),
    [
        ({}, {"resize": (32, 32), "crop": (32, 32)}),
        ({"size": 32}, {"resize": (32, 32), "crop": (32, 32)}),
        (
            {"size": {"shortest_edge": 40}, "do_center_crop": True, "crop_size": {"height": 32, "width": 32}},
            {"resize": 40, "crop": (32, 32)},
        ),
        ({"size": 40, "do_center_crop": True, "crop_size": 32}, {"resize": (40, 40), "crop": (32, 32)}),
        ({"size": {"shortest_edge": 80}, "do_center_crop": True, "crop_size": 64}, {"resize": 40, "crop": (32, 32)}),
        ({"do_normalize": False}, {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}),
        ({"resample": 3}, {"interpolation": "bicubic"}),
        ({"resample": 1}, {"interpolation": "lanczos"}),
        ({"rescale_factor": 1 / 127.5}, {"mean": (0.25, 0.2, 0.15), "std": (0.05, 0.1, 0.15)}),
        ({"do_pad": True, "pad_size": 32, "size": 24}, {"resize": (24, 24), "crop": (32, 32), "anchor": "corner"}),
    ],
)
def test_how_transformers_writes_preprocessing(processor: dict[str, Any], expected: dict[str, Any], tmp_path: Path):
    save_transformers(tmp_path, "hf-deit", processor)
    found = load_vision_model(str(tmp_path)).preprocessing
    assert {key: getattr(found, key) for key in expected} == expected


@pytest.mark.parametrize(
    ("processor", "why"),
    [
        ({"resample": 9}, "resample 9"),
        ({"size": {"longest_edge": 32}}, "longest_edge"),
        ({"size": {"shortest_edge": 32}}, "pictures of different sizes"),
        ({"image_mean": [0.5], "image_std": [0.5]}, "a mean of 1 channels"),
        ({"image_processor_type": "NoSuchProcessor"}, "cannot load it"),
        # ConvNeXT's class resizes to more than its size, and crops: no setting says so.
        ({"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 32}, "do_center_crop": True,
          "crop_size": 32}, "ConvNextImageProcessor differs from"),
    ],
)  # fmt: skip
def test_preprocessing_that_is_not_supported(processor: dict[str, Any], why: str, tmp_path: Path):
    save_transformers(tmp_path, "hf-deit", processor)
    with pytest.raises(ConfigurationError, match="preprocessing is not supported") as caught:
        load_vision_model(str(tmp_path))
    assert why in caught.value.why


def test_the_processor_decides_on_the_size_of_images(tmp_path: Path):
    """As transformers' own pipeline: DINOv2 takes any size, DeiT that of its configuration alone."""
    crop = {"size": {"shortest_edge": 20}, "do_center_crop": True, "crop_size": 16}
    save_transformers(tmp_path / "dinov2", "hf-dinov2", crop)
    vision = load_vision_model(str(tmp_path / "dinov2"))
    assert vision.architecture.image_size == vision.preprocessing.crop == (16, 16)
    assert "says images of 32x32 pixels, its preprocessing makes 16x16: the size of the prep" in vision.notes[0]
    asked = load_vision_model(str(tmp_path / "dinov2"), (32, 32))
    assert asked.architecture.image_size == asked.preprocessing.crop == (32, 32)
    assert (asked.preprocessing.resize, asked.notes) == (40, ())
    save_transformers(tmp_path / "deit", "hf-deit", crop)
    vision = load_vision_model(str(tmp_path / "deit"))
    assert vision.architecture.image_size == vision.preprocessing.crop == (32, 32)
    assert "which the model does not accept: the preprocessing is scaled to 32x32" in vision.notes[0]


def test_incomplete_directories_of_transformers(tmp_path: Path):
    save_transformers(tmp_path, "hf-deit")
    (tmp_path / "preprocessor_config.json").rename(tmp_path / "kept.json")
    with pytest.raises(ConfigurationError, match="how its pixels are made"):
        load_vision_model(str(tmp_path))
    (tmp_path / "kept.json").rename(tmp_path / "preprocessor_config.json")
    weights = load_file(tmp_path / "model.safetensors")
    del weights["classifier.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigurationError, match="does not hold all weights") as caught:
        load_vision_model(str(tmp_path))
    assert "classifier.weight" in caught.value.why
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ConfigurationError, match="no safetensors"):
        load_vision_model(str(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["DeiTForMaskedImageModeling"]}))
    with pytest.raises(ConfigurationError, match="no image classifier"):
        load_vision_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigurationError, match=r"config\.json"):
        load_vision_model(str(tmp_path))


def test_directories_of_timm(tmp_path: Path):
    model = save_timm(tmp_path / "timm")
    vision = load_vision_model(str(tmp_path / "timm"))
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(vision_outputs(vision.model, pixels), model(pixels))
    assert vision.architecture.classes == CLASSES
    config = json.loads((tmp_path / "timm" / "config.json").read_text())
    config["model_args"]["checkpoint_path"] = str(tmp_path / "evil.pth")
    (tmp_path / "timm" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigurationError, match="checkpoint_path"):
        load_vision_model(str(tmp_path / "timm"))
    half = (0.5, 0.5, 0.5)
    assert vision.preprocessing == Preprocessing(resize=80, crop=(64, 64), mean=half, std=half)
    assert "says images of 64x64 pixels, its preprocessing makes 160x160: its position embedding" in vision.notes[0]
    (tmp_path / "timm" / "model.safetensors").unlink()
    with pytest.raises(ConfigurationError, match="no safetensors"):
        load_vision_model(str(tmp_path / "timm"))


def test_a_directory_of_timm_at_another_size(tmp_path: Path):
    save_timm(tmp_path / "timm")
    vision = load_vision_model(str(tmp_path / "timm"), (96, 64))
    assert vision.architecture.image_size == (96, 64)
    assert vision_outputs(vision.model, torch.zeros(1, 3, 96, 64)).shape == (1, 5)


HUB = """
import sys
from fp8pipe.core.errors import Fp8PipeError
from fp8pipe.models.vision.sources import load_vision_model
try:
    vision = load_vision_model(sys.argv[1])
except Fp8PipeError as error:
    print(error)
    sys.exit(error.exit_code)
print(vision.architecture.image_size, len(vision.architecture.classes), vision.architecture.classes[0])
"""


def from_hub(src: str, cache: Path) -> subprocess.CompletedProcess[str]:
    """In a process of its own, which is told before it starts that there is no network."""
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache)}
    command = [sys.executable, "-c", HUB, src]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def test_pretrained_weights_of_timm_come_from_the_hubs_cache(tmp_path: Path):
    timm = import_timm()
    model = timm.create_model("test_vit")
    randomize(model, 0)
    config = timm.models.get_pretrained_cfg("test_vit")
    repository = "models--" + str(config.hf_hub_id).replace("/", "--")
    snapshot = tmp_path / repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(snapshot.name)
    save_file(model.state_dict(), snapshot / "model.safetensors")
    done = from_hub("timm:test_vit", tmp_path)
    assert done.stdout == "(160, 160) 1000 n01440764\n", done.stderr[-2000:]


def test_without_the_hub(tmp_path: Path):
    done = from_hub("timm:test_vit", tmp_path)
    assert done.returncode == 11, done.stderr[-2000:]
    assert "could not be downloaded" in done.stdout


def test_names_that_timm_does_not_know():
    for name in ("timm:vit_of_nowhere", "timm:", "timm:test_vit.no_such_tag"):
        with pytest.raises(ConfigurationError, match="timm"):
            load_vision_model(name)
