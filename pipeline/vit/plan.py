"""Plan a quantization run (`--dry-run`): layers from the model, and memory, disk and time from small dry runs."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Final

from calibration.make import ARTIFACT_PREFIX, FOLDER_PREFIX
from fp8pipe.core.devices import resolve_device
from fp8pipe.core.plan import Plan, can_measure, missing_disk, missing_memory, missing_packages
from fp8pipe.models.vision.sources import load_vision_model
from fp8pipe.models.vision.structure import read_structure
from pipeline.dry_run.process import Scaled, dry_run
from pipeline.dry_run.vision import PICTURES, STEPS
from pipeline.tracking.config import missing_trackers
from pipeline.vit.config import QuantizeVitConfig
from pipeline.vit.initialise import weight_formats
from pipeline.vit.stage import image_request

_BATCH: Final = 32  # batch size of calibration passes
_KEPT: Final = 2  # number of checkpoints that are kept
_PACKAGES: Final = ("timm", "torchvision", "pillow")
_GPU_MEMORY: Final = "memory is the host's; on the GPU images are made in batches that its free memory holds"
_SMALLER: Final = "a smaller distill.batch_size or synthesis.batch_size, or fewer --images"


def plan_quantize_vit(config: QuantizeVitConfig, output: Path | None = None) -> Plan:
    """Plan a run by running the stage with few images and steps in a temporary directory; nothing else is written.

    Args:
        config: the resolved configuration.
        output: directory of the artifact; None if the user has not named one.

    Raises:
        ConfigurationError: the run itself would reject the model, the bits or the calibration.
        MissingCapabilityError: a GPU was requested, but no suitable one is available.
    """
    device = resolve_device(config.device, config.gpu_need)
    config = config.model_copy(update={"device": device.name})
    image_request(config)  # rejects an unknown method
    vision = load_vision_model(config.model, config.size, activation=config.activation)
    size = vision.architecture.image_size
    structure = read_structure(vision.model, size)
    parameters = sum(p.numel() for p in vision.model.parameters())
    formats = weight_formats(structure, config.precision, config.edges)
    bits = sum(site.shape[0] * site.shape[1] * formats[site.name].bits for site in structure.linears)
    found = _measured(config) if can_measure() else _estimated(config, parameters, 3 * size[0] * size[1])
    peak, disk, written, seconds, notes = found
    where = output or Path(config.model).name
    packages = _PACKAGES if vision.architecture.library == "timm" else ()
    given = (config.calibration,) if config.calibration.startswith((FOLDER_PREFIX, ARTIFACT_PREFIX)) else ()
    return Plan(
        reads=(config.model, *given, *(() if config.evaluate is None else (config.evaluate,))),
        writes=(f"{where}", f"{where}.partial while it runs"),
        peak_memory_bytes=peak,
        disk_bytes=disk,
        output_bytes=written,
        seconds=sum(seconds.values()) if seconds else None,
        hardware="a CPU" if config.device == "cpu" else str(config.gpu_need),
        packages=packages,
        missing=(
            *missing_packages(packages),
            *missing_trackers(config.report_to),
            *missing_memory(peak, _SMALLER),
            *missing_disk(output or Path(), disk),
        ),
        notes=(*vision.notes, *structure.notes, *notes, *((_GPU_MEMORY,) if config.device == "cuda" else ())),
        facts={
            "device": str(device),
            "linears": len(structure.linears),
            "attentions": len(structure.attentions),
            "parameters": parameters,
            "weight_bytes": bits // 8,
            **{f"{name}_seconds": round(value, 1) for name, value in seconds.items()},
        },
    )


_Needs = tuple[int, int, int, dict[str, float], tuple[str, ...]]


def _measured(config: QuantizeVitConfig) -> _Needs:
    """Plan from dry runs with few images, extrapolated to all images.

    Returns:
        Peak memory, peak disk use and output size (bytes), time of each part (seconds), and notes.
    """
    counts = _image_counts(config)
    runs = []
    with tempfile.TemporaryDirectory(prefix="fp8pipe-dry-run-") as scratch:
        for count in counts:
            job = {"config": config.model_dump(mode="json"), "images": count}
            runs.append((count, dry_run("pipeline.dry_run.vision", job, Path(scratch) / f"{count}")))
    scaled = Scaled(tuple(runs), config.images)
    step, written = scaled.size("step"), scaled.size("output")
    every = config.distill.save_every
    saves = math.ceil(config.distill.steps / every) if every else min(1, config.distill.steps)
    training = scaled.size("kept") + min(saves, _KEPT + 1) * step
    in_the_end = scaled.size("kept") + min(saves, _KEPT) * step + written
    notes = (
        f"memory, disk and time from dry runs with {' and '.join(map(str, counts))} images and {STEPS} steps, "
        "in your batch sizes",
    )
    peak = max(max(scaled.peak(name) for name in scaled.phases()), scaled.child_peak)
    return peak, max(training, in_the_end), written, _seconds(config, scaled, saves), notes


def _image_counts(config: QuantizeVitConfig) -> tuple[int, ...]:
    """The number of images in each dry run: one and two full batches, or all images if there are no more than two."""
    largest = max(_BATCH, config.distill.batch_size, config.synthesis.batch_size)
    few = math.ceil(largest / _BATCH) * _BATCH
    return (config.images,) if config.images <= 2 * few else (few, 2 * few)


def _seconds(config: QuantizeVitConfig, scaled: Scaled, saves: int) -> dict[str, float]:
    made = max(1.0, config.synthesis.steps / STEPS) if config.calibration in ("synthetic", "patch-similarity") else 1.0
    pictures = scaled.runs[-1][1].facts["pictures"]
    return {
        "image": scaled.seconds("images") * made,
        "range": scaled.seconds("transforms") + scaled.seconds("ranges"),
        "training": scaled.seconds("step", least=True) * config.distill.steps + scaled.seconds("save") * saves,
        "proof": sum(scaled.seconds(name) for name in ("start", "load", "deploy", "agree", "commit")),
        "evaluation": scaled.seconds("evaluate") * pictures / min(pictures, PICTURES) if pictures else 0.0,
    }


def _estimated(config: QuantizeVitConfig, parameters: int, pixels: int) -> _Needs:
    """The same figures as `_measured`, estimated from sizes alone: without activations and time.

    Args:
        config: the resolved configuration.
        parameters: number of the model's parameters.
        pixels: number of values per image.
    """
    images = config.images * pixels
    note = "memory and disk are estimated from sizes, without activations: this system does not report peak memory"
    written = parameters * 2 + images
    return parameters * 4 * 5 + images * 5, written + images + parameters * 4 * 3 * _KEPT, written, {}, (note,)
