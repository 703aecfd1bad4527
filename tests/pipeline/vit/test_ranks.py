"""`quantize-vit` on several processes and on Ray: the artifact of one process, byte for byte."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from breadth import only_long
from forked import forked
from machines import cut_quantize_command, network, run_on
from PIL import Image
from rank_work import commanded
from ranks import run_ranks
from vit_families import family, vision_family

from calibration.config import SynthesisConfig
from calibration.make import ImageRequest, batch_maker, make_images
from fp8pipe.core.errors import ConfigurationError
from fp8pipe.core.work import Item, Job, LocalPool
from fp8pipe.models.vision.image_folder import read_image_folder
from fp8pipe.models.vision.sources import load_vision_model, save_vision_model
from fp8pipe.models.vision.structure import read_structure
from pipeline.vit.config import QuantizeVitConfig
from pipeline.vit.evaluate import ACCURACY_JOB
from pipeline.vit.payload import accuracy_payload, open_accuracy_payload
from pipeline.vit.ranks import job_opener

ROOT = Path(__file__).resolve().parents[3]
CONFIG = """
model: {model}
bits: w4a4
images: 10
evaluate: {pictures}
synthesis: {{steps: 2, batch_size: 2}}
distill: {{steps: 2, batch_size: 4}}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, labelled pictures and a configuration."""
    root = tmp_path_factory.mktemp("ranks")
    save_vision_model(vision_family(family("timm-vit")), root / "model")
    generator = torch.Generator().manual_seed(0)
    for name in ("ant", "bee"):
        (root / "pictures" / name).mkdir(parents=True)
        for number in range(3):
            values = torch.randint(256, (20, 20, 3), dtype=torch.uint8, generator=generator)
            Image.fromarray(values.numpy()).save(root / "pictures" / name / f"{number}.png")
    (root / "config.yaml").write_text(CONFIG.format(model=root / "model", pictures=root / "pictures"))
    return root


def arguments(place: Path, output: str) -> list[str]:
    return ["quantize-vit", "--config", str(place / "config.yaml"), "--output", str(place / output)]


def run(place: Path, output: str, *launcher: str, extra: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *launcher, "-m", "fp8pipe", *arguments(place, output), *extra]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)


def files(root: Path) -> dict[str, str]:
    """SHA-256 of every file that does not hold times."""
    timed = {"manifest.json", "manifest.sha256", "metrics.jsonl", "run.json", "card.md", "README.md", "report.html"}
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name not in timed
    }


@pytest.fixture(scope="module")
def alone(place: Path) -> dict[str, str]:
    done = forked("-c", "from fp8pipe.cli import main; main()", *arguments(place, "alone"))
    done.join()
    assert done.exitcode == 0
    return files(place / "alone")


def torchrun(count: int) -> tuple[str, ...]:
    return ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count))


def test_processes_of_torchs_launcher_write_the_artifact_of_one(
    place: Path, alone: dict[str, str], tmp_path: Path
) -> None:
    assert run_ranks(2, commanded, [*arguments(place, "ranks-2"), "--json"], str(tmp_path)) == {0: 0, 1: 0}
    assert files(place / "ranks-2") == alone
    assert "calibration/images.safetensors" in alone
    printed = [(tmp_path / rank).read_text().count('"kind": "vit"') for rank in ("0", "1")]
    assert printed == [1, 0]


@only_long
def test_torchrun_writes_the_artifact_of_one_process(place: Path, alone: dict[str, str]) -> None:
    """As users start it: what is more than above is the start and the end of five interpreters."""
    done = run(place, "ranks-4", *torchrun(4), extra=("--json",))
    assert done.returncode == 0, done.stderr
    assert files(place / "ranks-4") == alone
    assert done.stdout.count('"kind": "vit"') == 1  # rank 0 alone prints


def test_an_error_ends_all_ranks_with_one_message(place: Path) -> None:
    done = run(place, "none", *torchrun(2), extra=("--calibration", "images:/nowhere"))
    assert done.returncode != 0
    assert done.stderr.count("error: ") == done.stderr.count("no such directory") == 1
    assert "unforeseen failure" not in done.stderr


def test_a_rank_whose_machine_is_cut_off_ends_with_an_error_and_rank_0_goes_on(
    place: Path, alone: dict[str, str]
) -> None:
    with network(2) as machines:
        config, output = str(place / "config.yaml"), place / "cut"
        codes = run_on(machines, cut_quantize_command, config, str(output), machines, 2.0, barrier_s=1.0)
    assert codes == [0, 130]
    log = (place / "cut-1.log").read_text()
    assert log.count("error: ") == log.count("cut off from the others of this run for 2 s") == 1
    assert files(output) == alone


def test_ray_writes_the_artifact_of_one_process(place: Path, alone: dict[str, str]) -> None:
    pytest.importorskip("ray")
    done = run(place, "ray", extra=("--ray", "local"))
    assert done.returncode == 0, done.stderr
    assert files(place / "ray") == alone
    assert "actors" in done.stderr


@pytest.mark.parametrize("address", ["nowhere:1:2", "auto"])
def test_a_cluster_that_is_not_there(address: str, place: Path) -> None:
    pytest.importorskip("ray")
    done = run(place, "none", extra=("--ray", address))
    assert done.returncode == 11
    assert "cannot be reached" in done.stderr


class Remembering(LocalPool):
    """A pool that keeps its jobs."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []

    def results(self, job: Job, item: Item):
        self.jobs.append(job)
        return super().results(job, item)


def test_a_rank_with_other_options_refuses_the_work_of_rank_0(place: Path) -> None:
    vision = load_vision_model(str(place / "model"))
    structure = read_structure(vision.model, vision.architecture.image_size)
    request = ImageRequest("synthetic", 5, 0, SynthesisConfig(steps=1, batch_size=2))
    pool = Remembering()
    make_images(request, vision, structure, pool=pool)
    (job,) = pool.jobs
    assert job.count == 3
    batch_maker(request, vision, structure, job.payload)
    with pytest.raises(ConfigurationError, match="other images than rank 0") as caught:
        batch_maker(replace(request, seed=1), vision, structure, job.payload)
    assert "seed" in caught.value.why


def test_a_rank_with_other_pictures_refuses_to_count(place: Path, alone: dict[str, str], tmp_path: Path) -> None:
    vision = load_vision_model(str(place / "model"))
    folder = read_image_folder(place / "pictures")
    shutil.copytree(place / "pictures", tmp_path / "pictures")
    with next((tmp_path / "pictures").rglob("*.png")).open("ab") as file:
        file.write(b"\0")  # the same names, but another size
    payload = accuracy_payload(place / "alone", vision, folder)
    open_accuracy_payload(payload, tmp_path, vision, folder)
    assert (tmp_path / "model.safetensors").read_bytes() == (place / "alone" / "model.safetensors").read_bytes()
    for other in (replace(folder, files=folder.files[::-1]), read_image_folder(tmp_path / "pictures")):
        with pytest.raises(ConfigurationError, match="the pictures of this rank are not those of rank 0"):
            open_accuracy_payload(payload, tmp_path, vision, other)


def test_a_rank_without_labelled_pictures_refuses_to_count(place: Path) -> None:
    begin = job_opener(QuantizeVitConfig(model=str(place / "model"), bits="w4a4", device="cpu"))
    with pytest.raises(ConfigurationError, match="other options than rank 0") as caught:
        begin(Job(ACCURACY_JOB, 1, b""))
    assert "--evaluate" in caught.value.why
    with pytest.raises(ValueError, match="unknown job 'other'"):
        begin(Job("other", 1, b""))
