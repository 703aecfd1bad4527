"""Making images: streams, restarts, resuming, valid pixels, and what users ask for wrongly."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from forked import forked
from PIL import Image
from vit_families import family, vision_family

from calibration.config import SynthesisConfig
from calibration.dead_leaves import dead_leaves
from calibration.generator import Synthesizer
from calibration.image_set import ImageSet
from calibration.make import ImageRequest, make_images
from calibration.views import image_stream
from fp8pipe.core.config import build_config
from fp8pipe.core.errors import BadArtifactError, ConfigurationError
from fp8pipe.models.vision.structure import read_structure


def settings(**changes: object) -> SynthesisConfig:
    return build_config(SynthesisConfig, {"steps": 3, "batch_size": 4, "bf16": False} | changes)


def tiny(name: str = "timm-vit"):
    vision = vision_family(family(name))
    return vision, read_structure(vision.model, vision.architecture.image_size)


def request(method: str = "synthetic", count: int = 4, seed: int = 0, **changes: object) -> ImageRequest:
    return ImageRequest(method, count, seed, settings(**changes))


def test_the_same_seed_gives_the_same_images_and_another_one_others():
    vision, structure = tiny()
    first, again, other = (make_images(request(seed=seed), vision, structure) for seed in (0, 0, 1))
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.labels, again.labels)
    assert not torch.equal(first.images, other.images)


def test_an_image_depends_on_its_number_alone():
    """Images 4 to 7 made in one go with 0 to 3, or by themselves: the same bits at the same batch size."""
    vision, structure = tiny()
    together = make_images(request(count=8), vision, structure)
    apart = Synthesizer(vision, structure, settings(), seed=0).batch(4, 4)
    assert torch.equal(together.images[4:], apart.images)
    assert torch.equal(together.labels[4:], apart.labels)


def test_company_in_the_batch_changes_at_most_a_rounding():
    """In other batch sizes matrix products may add in another order, which Adam's normalisation can magnify."""
    vision, structure = tiny()
    four = Synthesizer(vision, structure, settings(), seed=0).batch(0, 4)
    two = Synthesizer(vision, structure, settings(), seed=0).batch(0, 2)
    assert torch.equal(four.labels[:2], two.labels)
    assert (four.images[:2].int() - two.images.int()).abs().float().mean() < 0.05


def test_the_model_is_left_as_it_was():
    vision, structure = tiny()
    before = {name: tensor.clone() for name, tensor in vision.model.state_dict().items()}
    make_images(request(), vision, structure)
    assert all(torch.equal(before[name], tensor) for name, tensor in vision.model.state_dict().items())
    assert all(p.grad is None for p in vision.model.parameters())


def test_the_losses_fall():
    vision, structure = tiny()
    options = {"steps": 40, "start": "noise", "jitter": 0, "mirror": False, "learning_rate": 0.1}
    short = make_images(request(**(options | {"steps": 1})), vision, structure)
    long = make_images(request(**options), vision, structure)
    for name in ("class", "similarity"):
        assert sum(long.losses[name]) < sum(short.losses[name])


@pytest.mark.parametrize(
    "name", ["timm-swin-wide", "timm-dinov2", "hf-siglip-backbone", "hf-clip-backbone", "hf-vit-backbone"]
)
def test_other_families_make_images_too(name):
    vision, structure = tiny(name)
    made = make_images(request(count=2), vision, structure)
    assert made.images.shape == (2, 3, *structure.image_size)
    assert (made.labels is None) == structure.is_backbone


def test_the_published_settings_run():
    vision, structure = tiny()
    config = build_config(SynthesisConfig, {"preset": "published", "steps": 2, "batch_size": 2})
    assert build_config(SynthesisConfig, config.model_dump()) == config
    assert (config.learning_rate, config.start, config.variation) == (0.1, "noise", 2.5e-5)
    made = Synthesizer(vision, structure, config, seed=0).batch(0, 2)
    assert made.images.dtype == torch.uint8


def test_an_image_that_becomes_nan_is_begun_again_and_said(monkeypatch):
    vision, structure = tiny()
    real, calls = Synthesizer._start, []

    def poisoned(self, numbers, streams):
        calls.append(numbers)
        pixels = real(self, numbers, streams)
        if len(calls) == 1:
            pixels[1] = torch.nan
        return pixels

    monkeypatch.setattr(Synthesizer, "_start", poisoned)
    made = make_images(request(), vision, structure)
    assert calls == [[0, 1, 2, 3], [1]]
    assert made.notes == ["image 1 became NaN and was restarted"]


def test_an_image_that_stays_nan_is_an_error_naming_it(monkeypatch):
    vision, structure = tiny()
    size = structure.image_size
    monkeypatch.setattr(
        Synthesizer, "_start", lambda self, numbers, streams: torch.full((len(numbers), 3, *size), torch.nan)
    )
    with pytest.raises(ConfigurationError, match="image 0") as caught:
        make_images(request(), vision, structure)
    assert caught.value.exit_code == 10


def test_finished_batches_are_not_made_again(tmp_path, monkeypatch):
    vision, structure = tiny()
    whole = make_images(request(count=8), vision, structure, checkpoints=tmp_path)
    monkeypatch.setattr(Synthesizer, "batch", lambda *a, **k: pytest.fail("made again"))
    again = make_images(request(count=8), vision, structure, checkpoints=tmp_path)
    assert torch.equal(whole.images, again.images)
    assert whole.losses == again.losses


def test_batches_of_another_run_are_refused(tmp_path):
    vision, structure = tiny()
    make_images(request(), vision, structure, checkpoints=tmp_path)
    with pytest.raises(ConfigurationError, match="seed"):
        make_images(request(seed=1), vision, structure, checkpoints=tmp_path)


_KILLED = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from test_images import make_images, request, tiny
vision, structure = tiny()
make_images(request(count=24, steps=12), vision, structure, checkpoints=Path(sys.argv[2]))
"""


def test_a_killed_run_ends_with_the_same_images(tmp_path):
    vision, structure = tiny()
    whole = make_images(request(count=24, steps=12), vision, structure)
    kills = 0
    for wanted in (1, 3, 5):
        process = forked("-c", _KILLED, str(Path(__file__).resolve().parent), str(tmp_path))
        deadline = time.monotonic() + 120
        while process.is_alive() and len(list(tmp_path.glob("batch-*"))) < wanted and time.monotonic() < deadline:
            time.sleep(0.01)
        process.kill()  # a run that outlasted the deadline must not go on beside the next one, either
        process.join()
        kills += process.exitcode == -signal.SIGKILL
    assert kills
    resumed = make_images(request(count=24, steps=12), vision, structure, checkpoints=tmp_path)
    assert torch.equal(resumed.images, whole.images)


def test_a_second_process_is_kept_out_of_the_batches_of_the_first(tmp_path):
    vision, structure = tiny()
    make_images(request(), vision, structure, checkpoints=tmp_path)
    holder = "import sys; from pathlib import Path; from fp8pipe.artifact.writer import lock\n"
    holder += "with lock(Path(sys.argv[1])):\n    print(flush=True)\n    sys.stdin.read()"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    command = [sys.executable, "-c", holder, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as process:
        process.stdout.readline()
        with pytest.raises(ConfigurationError, match="another process"):
            make_images(request(), vision, structure, checkpoints=tmp_path)
        process.stdin.close()
    make_images(request(), vision, structure, checkpoints=tmp_path)


def test_noise_and_folders_are_images_too(tmp_path):
    vision, structure = tiny()
    noise = make_images(request("gaussian", count=3), vision, structure)
    assert noise.images.shape == (3, 3, *structure.image_size)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for index in range(3):
            Image.new("RGB", (40, 40), (index * 50, 20, 90)).save(tmp_path / name / f"{index}.png")
    pictures = make_images(request(f"images:{tmp_path}", count=5), vision, structure)
    assert pictures.images.shape == (5, 3, *structure.image_size)
    assert sorted(pictures.labels.unique().tolist()) == [0, 1]
    with pytest.raises(ConfigurationError, match="too few"):
        make_images(request(f"images:{tmp_path}", count=7), vision, structure)
    (tmp_path / "a" / "0.png").write_bytes(b"no picture")
    with pytest.raises(ConfigurationError, match=r"0\.png"):
        make_images(request(f"images:{tmp_path}", count=6), vision, structure)


def test_the_images_of_an_artifact_serve_again(tmp_path):
    vision, structure = tiny()
    made = make_images(request(count=4, steps=2), vision, structure)
    made.save(tmp_path / "calibration")
    again = make_images(request(f"artifact:{tmp_path}", count=3), vision, structure)
    assert torch.equal(again.images, made.images[:3])
    assert again.method == "synthetic"
    assert len(again.losses["similarity"]) == 3
    with pytest.raises(ConfigurationError, match="holds 4"):
        make_images(request(f"artifact:{tmp_path}", count=5), vision, structure)


@pytest.mark.parametrize("method", ["", "noise", "image:x", "images:/nowhere/at/all"])
def test_methods_that_do_not_exist_are_refused(method):
    vision, structure = tiny()
    with pytest.raises(ConfigurationError) as caught:
        make_images(request(method), vision, structure)
    assert caught.value.exit_code == 10


def test_patch_similarity_is_synthesis_by_entropy():
    vision, structure = tiny()
    made = make_images(request("patch-similarity"), vision, structure)
    assert "entropy" in made.losses
    assert "similarity" not in made.losses


def test_a_set_is_saved_and_read_back(tmp_path):
    vision, structure = tiny()
    made = make_images(request(), vision, structure)
    made.save(tmp_path, vision.architecture.classes)
    again = ImageSet.load(tmp_path)
    assert torch.equal(made.images, again.images)
    assert torch.equal(made.labels, again.labels)
    assert (made.losses, made.method, made.seed) == (again.losses, again.method, again.seed)
    with Image.open(tmp_path / "contact_sheet.png") as sheet:
        assert sheet.size == (4 * structure.image_size[1], structure.image_size[0] + 12)
    facts = json.loads((tmp_path / "images.json").read_text())
    (tmp_path / "images.json").write_text(json.dumps(facts | {"count": 5}))
    with pytest.raises(BadArtifactError):
        ImageSet.load(tmp_path)


def test_leaves_are_pictures_of_their_number_alone():
    both = dead_leaves(3, 0, 2, (24, 40))
    assert both.shape == (2, 3, 24, 40)
    assert both.min() >= 0
    assert both.max() <= 1
    assert torch.equal(both[1], dead_leaves(3, 1, 1, (24, 40))[0])
    assert not torch.equal(both[0], both[1])


def test_leaves_have_the_spectrum_of_photographs():
    """Power falls about as 1/f^2 over the middle frequencies, where white noise is flat."""
    pictures = dead_leaves(0, 0, 24, (64, 64)).mean(1)
    power = torch.fft.fft2(pictures - pictures.mean((1, 2), keepdim=True)).abs().square().mean(0)
    f = (torch.fft.fftfreq(64)[:, None].square() + torch.fft.fftfreq(64)[None].square()).sqrt()
    bands = [power[(f > low) & (f <= 2 * low)].mean() for low in (0.05, 0.1, 0.2)]
    slopes = [float(torch.log2(a / b)) for a, b in itertools.pairwise(bands)]
    assert all(1.0 < slope < 4.5 for slope in slopes)


def test_streams_of_images_and_attempts_differ():
    draws = {float(torch.rand((), generator=image_stream(0, i, a))) for i in range(4) for a in range(3)}
    assert len(draws) == 12
