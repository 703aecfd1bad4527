"""The preset of the published settings: what it fills in, and that values given explicitly win."""

from __future__ import annotations

from fp8pipe.core.config import build_config
from pipeline.vit.config import QuantizeVitConfig

PAPER = {"model": "m", "bits": "w4a4", "preset": "mimiq-paper"}


def test_the_preset_fills_in_the_published_settings():
    config = build_config(QuantizeVitConfig, PAPER)
    assert (config.images, config.edges, config.rounding) == (10_000, "same", "nearest")
    assert (config.synthesis.steps, config.synthesis.start, config.synthesis.variation) == (2000, "noise", 2.5e-5)
    assert not any(config.conditioning.model_dump().values())
    # 200 epochs of 10,000 images in batches of 16.
    assert config.distill.steps * config.distill.batch_size == 200 * config.images
    assert (config.distill.block_weight, config.distill.structure_weight, config.distill.temperature) == (0, 10, 5)


def test_values_given_beside_the_preset_win():
    given = {"images": 64, "synthesis": {"steps": 5}, "distill": {"steps": 7}, "conditioning": {"centre": True}}
    config = build_config(QuantizeVitConfig, PAPER | given)
    assert (config.images, config.synthesis.steps, config.distill.steps) == (64, 5, 7)
    assert config.conditioning.centre
    assert not config.conditioning.rotate_residual
    assert config.synthesis.start == "noise"
    assert config.distill.block_weight == 0
    assert build_config(QuantizeVitConfig, config.model_dump(mode="json")) == config


def test_without_the_preset_nothing_changes():
    plain = build_config(QuantizeVitConfig, {"model": "m", "bits": "w4a4"})
    assert plain.images == 128
    assert plain.conditioning.rotate_residual
