"""Directories of vision models as transformers and timm write them, small and random."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vit_families import CLASSES, family, randomize

from fp8pipe.models.compat import import_timm, import_transformers

PROCESSOR = {
    "do_resize": True, "size": {"height": 32, "width": 32}, "resample": 2, "do_rescale": True,
    "rescale_factor": 1 / 255, "do_center_crop": False, "do_normalize": True,
    "image_mean": [0.5, 0.4, 0.3], "image_std": [0.1, 0.2, 0.3],
}  # fmt: skip


def save_model(folder: Path, cls: str, arguments: dict[str, Any], processor: dict[str, Any] | None = None) -> Any:
    """A random model of a class of transformers, saved with an image processor's file; the model."""
    chosen = getattr(import_transformers(), cls)
    model = chosen(chosen.config_class.from_dict(arguments)).eval()
    randomize(model, 0)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR | (processor or {})))
    return model


def save_transformers(folder: Path, name: str, processor: dict[str, Any] | None = None, **changes: Any) -> Any:
    """A model of the family's configuration, saved as transformers does it."""
    architecture = family(name).architecture
    return save_model(folder, architecture.name, architecture.arguments | changes, processor)


def save_timm(folder: Path, classes: int = 5, model: str = "test_vit", **arguments: Any) -> Any:
    """A small model of timm as timm writes it for the hub, with the class names of the families; the model."""
    timm = import_timm()
    arguments = arguments or {"img_size": 64}
    made = timm.create_model(model, num_classes=classes, **arguments).eval()
    randomize(made, 0)
    folder.mkdir(parents=True)
    made.pretrained_cfg |= {"crop_pct": 0.8}
    names = {"label_names": list(CLASSES[:classes])}
    timm.models.save_for_hf(made, folder, names, model_args=arguments, safe_serialization=True)
    return made
