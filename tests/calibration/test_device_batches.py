"""Images in the batches that a GPU holds: kept one by one, resumed with another GPU, halved where they do not fit."""

from __future__ import annotations

import logging

import pytest
import torch
from vit_families import family, vision_family

from calibration import generator
from calibration.config import SynthesisConfig
from calibration.generator import Synthesizer
from calibration.image_set import ImageSet
from calibration.make import ImageRequest, make_images
from fp8pipe.core.config import build_config
from fp8pipe.models.vision.structure import read_structure


@pytest.fixture(scope="module")
def tiny():
    vision = vision_family(family("timm-vit"))
    return vision, read_structure(vision.model, vision.architecture.image_size)


@pytest.fixture
def made(monkeypatch):
    """Lets so many images fit, and notes the numbers of those that are made together."""
    batches: list[list[int]] = []
    real = Synthesizer._optimise

    def note(self, numbers, attempts, on_step):
        if len(numbers) > note.fit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        batches.append(numbers)
        return real(self, numbers, attempts, on_step)

    def fit(at_once: int, really: int = 1000) -> list[list[int]]:
        monkeypatch.setattr(generator, "images_at_once", lambda structure, config, device: at_once)
        note.fit = really
        batches.clear()
        return batches

    monkeypatch.setattr(Synthesizer, "_optimise", note)
    return fit


def request(count: int) -> ImageRequest:
    config = build_config(SynthesisConfig, {"steps": 2, "batch_size": 4, "bf16": False})
    return ImageRequest("synthetic", count, 0, config)


def test_batches_that_fit_are_made_together_and_kept_one_by_one(tiny, made, tmp_path):
    batches = made(9)
    whole = make_images(request(14), *tiny, checkpoints=tmp_path)
    assert batches == [list(range(8)), list(range(8, 14))]
    kept = sorted(tmp_path.glob("batch-*"))
    assert [len(ImageSet.load(folder).images) for folder in kept] == [4, 4, 4, 2]
    assert torch.equal(torch.cat([ImageSet.load(folder).images for folder in kept]), whole.images)
    assert {len(values) for values in whole.losses.values()} == {14}


def test_a_run_resumes_where_fewer_or_more_fit(tiny, made, tmp_path):
    made(9)
    whole = make_images(request(14), *tiny, checkpoints=tmp_path)
    for number in (4, 12):
        folder = tmp_path / f"batch-{number:06d}"
        folder.rename(tmp_path / f"taken-{number}")
    batches = made(1000)
    again = make_images(request(14), *tiny, checkpoints=tmp_path)
    assert batches == [[4, 5, 6, 7], [12, 13]]  # one that is kept ends a batch
    assert torch.equal(again.labels, whole.labels)
    # In other batch sizes matrix products may add in another order, which Adam's normalisation can magnify.
    assert (again.images.int() - whole.images.int()).abs().float().mean() < 0.05


def test_fewer_than_a_batch_are_made_in_turn(tiny, made):
    batches = made(3)
    assert len(make_images(request(5), *tiny).images) == 5
    assert batches == [[0, 1, 2], [3], [4]]


def test_what_does_not_fit_is_halved_and_said(tiny, made, caplog):
    batches = made(1000, really=2)
    with caplog.at_level(logging.WARNING, "calibration"):
        assert len(make_images(request(5), *tiny).images) == 5
    assert batches == [[0, 1], [2, 3], [4]]
    assert [record.getMessage() for record in caplog.records] == [
        "5 images at once did not fit the GPU's memory; going on with 2"
    ]
    made(1000, really=0)
    with pytest.raises(torch.OutOfMemoryError):
        make_images(request(2), *tiny)
