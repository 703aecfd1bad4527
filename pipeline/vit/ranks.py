"""`quantize-vit` on several processes: ranks above 0 make calibration images and count right answers for rank 0.

Rank 0 trains and writes the artifact. Images and counts do not depend on which process computed them. Every machine
needs the model and the labelled pictures; the output's directory is rank 0's alone.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from calibration.make import IMAGES_JOB, batch_maker
from fp8pipe.core.devices import on_device, use_own_gpu
from fp8pipe.core.errors import ConfigurationError
from fp8pipe.core.launch import RankContext
from fp8pipe.core.work import Item, Job, StorePool, WorkPool, assist
from fp8pipe.core.work_ray import RayPool
from fp8pipe.models.vision.image_folder import ImageFolder
from fp8pipe.models.vision.quantized import load_quantized
from fp8pipe.models.vision.sources import VisionModel, load_vision_model
from fp8pipe.models.vision.structure import read_structure
from fp8pipe.numerics.bf16 import widen_bf16_products
from fp8pipe.numerics.convolutions import plain_convolutions
from pipeline.vit.config import QuantizeVitConfig
from pipeline.vit.evaluate import ACCURACY_JOB, compared_models, hit_counter, read_evaluation_folder
from pipeline.vit.payload import open_accuracy_payload
from pipeline.vit.stage import image_request

__all__ = ["assist_quantize_vit", "job_opener", "open_pool"]


@contextmanager
def open_pool(config: QuantizeVitConfig, place: RankContext | None, ray: str | None) -> Iterator[WorkPool | None]:
    """The pool of rank 0: the other ranks, or the Ray cluster at the address `ray`; None if there are neither.

    Raises:
        ConfigurationError: both are given, or there is no such cluster.
        MissingCapabilityError: the cluster cannot be reached.
    """
    if ray is not None:
        if place is not None:
            raise ConfigurationError(
                "torchrun and --ray cannot be used together",
                why="each of them starts the processes that share the work",
                fix="leave one of them out",
            )
        config = on_device(config)
        load = functools.partial(job_opener, config)
        with RayPool(ray, load, threads=torch.get_num_threads(), gpu=config.device == "cuda") as cluster:
            yield cluster
    elif place is not None:
        with StorePool(place) as others:
            yield others
    else:
        yield None


def assist_quantize_vit(config: QuantizeVitConfig, place: RankContext) -> None:
    """Compute for rank 0, which runs `quantize_vit` with the same configuration, until it has finished.

    Raises:
        Fp8PipeError: the inputs cannot be loaded or are not those of rank 0.
    """
    config = on_device(config)
    if config.device == "cuda":
        use_own_gpu(place.local)
    assist(place, lambda: job_opener(config))


def job_opener(config: QuantizeVitConfig) -> Callable[[Job], Item]:
    """Load a run's model and labelled pictures, and return the function that prepares the jobs of that run.

    `config` names the device. All is loaded before the first job, so that nobody waits for a process that loads.

    Raises:
        Fp8PipeError: the model or the pictures cannot be loaded. The returned function raises ConfigurationError if
            the configuration is not that of rank 0.
    """
    widen_bf16_products()
    vision = load_vision_model(config.model, config.size, activation=config.activation)
    structure = read_structure(vision.model, vision.architecture.image_size)
    placed = replace(vision, model=vision.model.to(torch.device(config.device)))
    classes = vision.architecture.choices
    folder = None if config.evaluate is None else read_evaluation_folder(config.evaluate, classes)

    def begin(job: Job) -> Item:
        if job.name == IMAGES_JOB:
            item = batch_maker(image_request(config), placed, structure, job.payload)
        elif job.name == ACCURACY_JOB:
            item = _counter(config, placed, folder, job.payload)
        else:
            raise ValueError(f"unknown job {job.name!r}")

        def compute(number: int) -> bytes:
            with plain_convolutions(torch.device(config.device)):
                return item(number)

        return compute

    return begin


def _counter(config: QuantizeVitConfig, vision: VisionModel, folder: ImageFolder | None, payload: bytes) -> Item:
    classes = vision.architecture.choices
    if folder is None:
        raise ConfigurationError(
            "this process was started with other options than rank 0",
            why="rank 0 counts right answers on labelled pictures (--evaluate); this one was started without them",
            fix="start every process with the same model and the same options",
        )
    assert classes is not None  # read_evaluation_folder refuses models without
    with tempfile.TemporaryDirectory() as scratch:
        open_accuracy_payload(payload, Path(scratch), vision, folder)
        quantized = load_quantized(Path(scratch)).to(torch.device(config.device))
    models = compared_models(vision, quantized)
    return hit_counter(models, folder, vision.preprocessing, classes, torch.device(config.device))
