"""Options of the synthesis that are off by default: each runs, is repeatable, and refuses what it does not fit."""

from __future__ import annotations

import pytest
import torch
from vit_families import family, vision_family

from calibration.config import SynthesisConfig
from calibration.generator import Synthesizer
from calibration.plateau import Plateau
from fp8pipe.config import build_config
from fp8pipe.errors import ConfigurationError
from fp8pipe.vision.structure import read_structure

OPTIONS = [
    {"masked": 0.1, "spread": 1.0},
    {"priors": 1.0, "similarity": 0.0, "regions": 0.5},
    {"keep": 0.5, "prune_after": 1},
    {"plateau": 0.5, "plateau_window": 2, "steps": 8},
]


def synthesizer(name: str, **changes: object) -> Synthesizer:
    vision = vision_family(family(name))
    structure = read_structure(vision.model, vision.architecture.image_size)
    config = build_config(SynthesisConfig, {"steps": 3, "batch_size": 4, "bf16": False} | changes)
    return Synthesizer(vision, structure, config, seed=0)


@pytest.mark.parametrize("options", OPTIONS)
def test_images_depend_on_their_number_alone_and_not_on_earlier_batches(options):
    one = synthesizer("timm-vit", **options)
    one.batch(0, 4)
    after, alone = one.batch(4, 4), synthesizer("timm-vit", **options).batch(4, 4)
    assert torch.equal(after.images, alone.images)
    assert after.losses == alone.losses
    plain = synthesizer("timm-vit", steps=options.get("steps", 3)).batch(4, 4)
    assert not torch.equal(alone.images, plain.images)


@pytest.mark.parametrize("name", ["timm-swin", "timm-beit", "timm-eva02-rope"])
def test_models_that_use_positions_later_refuse_to_drop_patches(name):
    with pytest.raises(ConfigurationError):
        synthesizer(name, keep=0.5, prune_after=1)


def test_a_loss_that_stops_falling_leaves_and_the_others_stay():
    watch = Plateau(0.1, 2)
    for step in range(3):
        assert watch.going(torch.tensor([8.0 - 2 * step, 1.0, torch.nan])).all()
    assert watch.going(torch.tensor([2.0, 1.0, torch.nan])).tolist() == [True, False, True]


def test_terms_on_all_patches_refuse_fewer():
    with pytest.raises(ConfigurationError, match="keep"):
        build_config(SynthesisConfig, {"keep": 0.5, "priors": 1.0})
