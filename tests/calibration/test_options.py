"""Options of the synthesis on whole models: what they do to images, and that interruptions change nothing."""

from __future__ import annotations

import pytest
import torch
from vit_families import family, vision_family

from calibration.config import SynthesisConfig
from calibration.generator import Synthesizer
from calibration.make import ImageRequest, make_images
from fp8pipe.core.config import build_config
from fp8pipe.models.vision.structure import read_structure

OPTIONS = {
    "entropy": {"similarity": 0.0, "entropy": 1.0},
    "published": {"start": "noise", "canvas": "pixels", "views": "shifts"},
    "maps": {"maps": "probabilities", "similarity_form": "absolute"},
    "plateau": {"plateau": 0.5, "plateau_window": 1},
}


def settings(**changes: object) -> SynthesisConfig:
    return build_config(SynthesisConfig, {"steps": 4, "batch_size": 4, "bf16": False} | changes)


def tiny(name: str = "timm-vit"):
    vision = vision_family(family(name))
    return vision, read_structure(vision.model, vision.architecture.image_size)


@pytest.mark.parametrize("option", OPTIONS)
def test_images_of_a_batch_are_the_same_alone_and_after_a_cut(option, tmp_path, monkeypatch):
    vision, structure = tiny()
    config = settings(**OPTIONS[option])
    whole = make_images(ImageRequest("synthetic", 8, 0, config), vision, structure, checkpoints=tmp_path)
    later = Synthesizer(vision, structure, config, seed=0).batch(4, 4)
    assert torch.equal(whole.images[4:], later.images)
    sorted(tmp_path.iterdir())[-1].unlink()  # the last batch was not finished
    again = make_images(ImageRequest("synthetic", 8, 0, config), vision, structure, checkpoints=tmp_path)
    assert torch.equal(whole.images, again.images)
    assert whole.losses == again.losses


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_changes_the_images(option):
    vision, structure = tiny()
    plain = make_images(ImageRequest("synthetic", 4, 0, settings()), vision, structure)
    other = make_images(ImageRequest("synthetic", 4, 0, settings(**OPTIONS[option])), vision, structure)
    assert not torch.equal(plain.images, other.images)


def test_finished_images_keep_the_pixels_they_had():
    """With a tolerance that all miss, everybody leaves after two windows of one step."""
    vision, structure = tiny()
    early = Synthesizer(vision, structure, settings(steps=50, plateau=0.99, plateau_window=1), seed=0)
    steps = []
    found = early.batch(0, 4, on_step=steps.append)
    assert steps == [1, 2]
    assert found.images.shape == (4, 3, *structure.image_size)
    assert all(len(values) == 4 for values in found.losses.values())


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_runs_with_the_model_in_bf16(option):
    """Products are in bf16 then; terms, their sums and what is recorded of them stay fp32."""
    vision, structure = tiny()
    images = make_images(ImageRequest("synthetic", 4, 0, settings(bf16=True, **OPTIONS[option])), vision, structure)
    assert all(value == value for values in images.losses.values() for value in values)
