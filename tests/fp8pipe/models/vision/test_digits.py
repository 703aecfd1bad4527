"""The digits' split and folder, and the committed ViT: its digest, size and accuracy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fp8pipe.core.errors import BadArtifactError, ConfigurationError
from fp8pipe.models.vision import samples
from fp8pipe.models.vision.prepare import vision_outputs
from fp8pipe.models.vision.samples import DIGITS_CLASSES, digits_split, digits_weights_folder, write_digits
from fp8pipe.models.vision.sources import load_vision_model
from fp8pipe.models.vision.structure import read_structure


def test_the_split_is_fixed_and_disjoint():
    from sklearn.datasets import load_digits

    train, held_out = digits_split()
    assert (len(train.labels), len(held_out.labels)) == (1198, 599)
    bunch = load_digits()
    third = torch.from_numpy(bunch.images[2::3])
    assert torch.equal(held_out.images[:, 0], (third * 255 / 16).round().to(torch.uint8))
    assert held_out.labels.tolist() == bunch.target[2::3].tolist()
    images = [set(map(bytes, part.images[:, 0].reshape(len(part.labels), -1).numpy())) for part in (train, held_out)]
    assert not images[0] & images[1]
    assert held_out.labels.bincount().min() > 50


def test_the_folder_holds_the_scans(tmp_path: Path):
    _, held_out = digits_split()
    write_digits(tmp_path / "digits", held_out)
    assert sorted(path.name for path in (tmp_path / "digits").iterdir()) == sorted(DIGITS_CLASSES)
    files = sorted((tmp_path / "digits").glob("*/*.png"), key=lambda path: path.name)
    assert len(files) == 599
    label = held_out.labels[7].item()
    assert files[7].parent.name == str(label)
    with Image.open(files[7]) as image:
        assert image.mode == "L"
        assert np.array_equal(np.asarray(image), held_out.images[7, 0].numpy())
    with pytest.raises(ConfigurationError, match="not empty"):
        write_digits(tmp_path / "digits", held_out)


@torch.no_grad()
def test_the_vit_classifies_held_out_scans():
    vision = load_vision_model("sample:vit-digits")
    assert vision.architecture.classes == DIGITS_CLASSES
    _, held_out = digits_split()
    pictures = (Image.fromarray(image.permute(1, 2, 0).numpy()) for image in held_out.images)
    pixels = torch.stack([vision.preprocessing.image_to_tensor(picture) for picture in pictures])
    hits = vision_outputs(vision.model, pixels).argmax(dim=-1) == held_out.labels
    # 590 of 599 when it was trained; another machine's float32 may turn a near-tie.
    assert hits.sum().item() in range(588, 593)


def test_the_vit_is_small_and_ordinary():
    vision = load_vision_model("sample:vit-digits")
    assert (digits_weights_folder() / "model.safetensors").stat().st_size < 3_000_000
    structure = read_structure(vision.model, vision.architecture.image_size)
    site = structure.attentions[0]
    assert len(structure.attentions) == 6
    assert (site.heads, site.head_dim, site.tokens, site.prefix_tokens, site.grid) == (6, 16, 37, 1, (6, 6))


def test_other_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "model.safetensors").write_bytes(b"other")
    monkeypatch.setattr(samples, "_WEIGHTS", tmp_path)
    with pytest.raises(BadArtifactError, match="not the published ViT"):
        load_vision_model("sample:vit-digits")
    monkeypatch.setattr(samples, "_WEIGHTS", tmp_path / "gone")
    with pytest.raises(BadArtifactError, match="not the published ViT"):
        load_vision_model("sample:vit-digits")
