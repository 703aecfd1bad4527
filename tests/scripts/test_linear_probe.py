"""The linear probe: its split, its convex fit against an independent solver, and its directory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from script_modules import load_script
from vit_families import family, vision_family

from fp8pipe.core.errors import ConfigurationError
from fp8pipe.models.vision.image_folder import read_image_folder
from fp8pipe.models.vision.prepare import vision_outputs
from fp8pipe.models.vision.sources import load_vision_model, save_vision_model
from fp8pipe.models.vision.structure import read_structure

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "linear_probe.py"


@pytest.fixture(scope="module")
def probe() -> ModuleType:
    return load_script(SCRIPT)


def write_colours(folder: Path, count: int) -> None:
    """Pictures of three classes that any features tell apart: a bright channel each, and noise."""
    random = np.random.default_rng(0)
    for channel, name in enumerate(("blue", "green", "red")):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            pixels = random.integers(0, 100, (32, 48, 3), dtype=np.uint8)
            pixels[..., 2 - channel] += 150
            Image.fromarray(pixels).save(folder / name / f"{index}.png")


def test_the_split_is_stratified_and_seeded(probe: ModuleType):
    labels = (0,) * 10 + (1,) * 20
    train, held_out = probe.split_rows(labels, 0.7, seed=0)
    assert sorted(train + held_out) == list(range(30))
    assert [sum(labels[row] == one for row in train) for one in (0, 1)] == [7, 14]
    assert probe.split_rows(labels, 0.7, seed=0) == (train, held_out)
    assert probe.split_rows(labels, 0.7, seed=1) != (train, held_out)
    with pytest.raises(ConfigurationError, match="class 0 cannot be split"):
        probe.split_rows((0, 1, 1), 0.5, seed=0)


def test_the_fit_is_the_minimum_that_scikit_learn_finds(probe: ModuleType):
    from sklearn.linear_model import LogisticRegression

    random = torch.Generator().manual_seed(0)
    features = torch.randn(200, 6, generator=random) * torch.tensor([1.0, 5.0, 0.1, 1.0, 2.0, 1.0]) + 3
    labels = torch.randint(0, 4, (200,), generator=random)
    head = probe.fit_head(features, labels, 4, decay=0.05)
    standard = (features - features.mean(dim=0)) / features.std(dim=0)
    # Its loss is C x the sum of cross-entropies + |W|^2/2: ours times 1/decay, with C = 1/(N x decay).
    oracle = LogisticRegression(C=1 / (200 * 0.05), tol=1e-8, max_iter=2000).fit(standard, labels)
    expected = torch.from_numpy(oracle.predict_proba(standard)).float()
    # Two solvers that stop near the same minimum.
    torch.testing.assert_close(head(features).softmax(dim=-1), expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize("name", ["timm-dinov2", "hf-dinov2-other-size"])
def test_the_command_writes_a_model_that_classifies(name: str, tmp_path: Path):
    save_vision_model(vision_family(family(name)), tmp_path / "backbone")
    write_colours(tmp_path / "pictures", 12)
    command = [sys.executable, str(SCRIPT), "--dtype", "float32"]
    for option, name_of in {"model": "backbone", "data": "pictures", "output": "probed", "split": "split"}.items():
        command += [f"--{option}", str(tmp_path / name_of)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert (said["train"], said["held_out"]) == (30, 6)
    assert said["held_out_top1"] == 1.0
    vision = load_vision_model(str(tmp_path / "probed"))
    assert vision.architecture.classes == ("blue", "green", "red")
    structure = read_structure(vision.model, vision.architecture.image_size)
    assert structure.heads == ("head",)
    assert "head" in structure.linear_names
    folder = read_image_folder(tmp_path / "pictures")
    with Image.open(folder.files[-1]) as image:
        logits = vision_outputs(vision.model, vision.preprocessing.image_to_tensor(image)[None])
    assert logits.argmax().item() == 2
    parts = {part: read_image_folder(tmp_path / "split" / part) for part in ("train", "held-out")}
    assert {part: len(found.files) for part, found in parts.items()} == {"train": 30, "held-out": 6}
    real = {file.resolve() for found in parts.values() for file in found.files}
    assert real == {file.resolve() for file in folder.files}


def test_mistakes_end_with_their_code(tmp_path: Path):
    save_vision_model(vision_family(family("timm-vit")), tmp_path / "classifier")
    write_colours(tmp_path / "pictures", 3)
    base = [sys.executable, str(SCRIPT), "--output", str(tmp_path / "out")]
    done = subprocess.run(
        [*base, "--model", str(tmp_path / "classifier"), "--data", str(tmp_path / "pictures")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 10
    assert "needs a backbone" in done.stderr
    assert not (tmp_path / "out").exists()
