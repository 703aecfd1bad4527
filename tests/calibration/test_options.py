"""Options of the synthesis on whole models: what they do to images, what they refuse, and that cuts change nothing."""

from __future__ import annotations

import pytest
import torch
from vit_families import family, vision_family

from calibration.config import SynthesisConfig
from calibration.generator import Synthesizer
from calibration.make import ImageRequest, make_images
from calibration.terms import TokenPruner
from fp8pipe.core.config import build_config
from fp8pipe.core.errors import ConfigurationError
from fp8pipe.models.vision.attention import explicit_attention, intercept_attention
from fp8pipe.models.vision.prepare import vision_outputs
from fp8pipe.models.vision.structure import read_structure

OPTIONS = {
    "masked": {"spread": 1.0, "masked": 0.1},
    "priors": {"similarity": 0.0, "priors": 1.0},
    "regions": {"regions": 0.5},
    "pruned": {"keep": 0.5, "prune_after": 1},
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


def test_pruned_models_see_the_patches_that_receive_most_attention():
    """Against the model cut by hand: the block's output shortened, the rest of the blocks run on that."""
    vision, structure = tiny()
    model = vision.model.eval()
    pixels = torch.randn(2, 3, *structure.image_size, generator=torch.Generator().manual_seed(1))
    pruner = TokenPruner(model, structure, 1, 0.5)
    noted = {}

    def attend(name, q, k, v, mask, scale):
        def on_probs(probs):
            if name == pruner.site.name:
                pruner.note(probs)
                noted["probs"] = probs
            return probs

        return explicit_attention(q, k, v, mask, scale, on_probs=on_probs)

    with torch.no_grad(), intercept_attention(model, structure.attention_names, attend), pruner.active(model):
        found = vision_outputs(model, pixels)
    with torch.no_grad():
        hidden = model._pos_embed(model.patch_embed(pixels))
        hidden = model.blocks[0](model.norm_pre(hidden))
        prefix, area = pruner.site.prefix_tokens, structure.patch_grid[0] * structure.patch_grid[1]
        among = noted["probs"][:, :, 0, prefix:]  # what the class token attends to, a head's shares adding up to 1
        scores = (among / among.sum(-1, keepdim=True)).mean(1)
        rows = scores.topk(round(area / 2), dim=1).indices.sort(dim=1).values
        short = torch.stack([torch.cat([h[:prefix], h[prefix + r]]) for h, r in zip(hidden, rows, strict=True)])
        for block in model.blocks[1:]:
            short = block(short)
        expected = model.forward_head(model.norm(short))
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize(
    ("name", "options"),
    [("timm-beit", {"keep": 0.5, "prune_after": 1}), ("timm-eva02-rope", {"keep": 0.5, "prune_after": 1}),
     ("timm-swin-wide", {"keep": 0.5}), ("timm-swin-wide", {"priors": 1.0}), ("timm-swin-wide", {"masked": 1.0}),
     ("hf-vit-backbone", {"regions": 0.5}), ("timm-vit", {"keep": 0.5, "prune_after": 99})],
)  # fmt: skip
def test_models_that_an_option_does_not_fit_are_refused(name, options):
    vision, structure = tiny(name)
    with pytest.raises(ConfigurationError) as caught:
        Synthesizer(vision, structure, settings(**options), seed=0)
    assert caught.value.exit_code == 10


def test_options_that_exclude_each_other_are_refused():
    with pytest.raises(ConfigurationError, match="keep"):
        settings(keep=0.5, priors=1.0)


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_runs_with_the_model_in_bf16(option):
    """Products are in bf16 then; terms, their sums and what is recorded of them stay fp32."""
    vision, structure = tiny()
    images = make_images(ImageRequest("synthetic", 4, 0, settings(bf16=True, **OPTIONS[option])), vision, structure)
    assert all(value == value for values in images.losses.values() for value in values)
