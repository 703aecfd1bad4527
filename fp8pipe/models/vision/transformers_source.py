"""Vision models in a directory that transformers wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from fp8pipe.core.config import build_config
from fp8pipe.core.errors import BadArtifactError, ConfigurationError
from fp8pipe.models.vision.architecture import Architecture, transformers_class
from fp8pipe.models.vision.outputs import class_count
from fp8pipe.models.vision.prepare import prepare_model
from fp8pipe.models.vision.preprocessing import Preprocessing

__all__ = ["load_from_transformers"]

# Two-tower checkpoints hold a vision model that has a class of its own.
_VISION_PART: Final = {"CLIPModel": "CLIPVisionModel", "SiglipModel": "SiglipVisionModel"}
# Entries that say where and by what a configuration was written, not what is built.
_RECORDS: Final = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures")
_FILTERS: Final = {0: "nearest", 2: "bilinear", 3: "bicubic"}


def load_from_transformers(
    folder: Path, image_size: tuple[int, int] | None
) -> tuple[dict[str, Tensor], Architecture, Preprocessing]:
    """A vision model of transformers: weights by the names of the prepared model, architecture and preprocessing.

    Args:
        folder: config.json, preprocessor_config.json and safetensors.
        image_size: (height, width) in pixels, None for the configuration's.

    Raises:
        ConfigurationError: no vision model, weights missing, or no preprocessing beside them.
        BadArtifactError: a file cannot be read.
    """
    name = _class_name(_read(folder / "config.json"), folder)
    model = _load(folder, name)
    size = image_size or _image_size(model.config)
    classes = None
    if class_count(model) is not None:
        classes = tuple(str(model.config.id2label[index]) for index in range(model.config.num_labels))
    arguments = {key: value for key, value in model.config.to_dict().items() if key not in _RECORDS}
    architecture = Architecture(
        library="transformers",
        name=name,
        arguments=json.loads(json.dumps(arguments)),
        image_size=size,
        classes=classes,
        head="features" if classes is None else "classifier",
    )
    preprocessing = _preprocessing(folder, size)
    return prepare_model(model).state_dict(), architecture, preprocessing


def _load(folder: Path, name: str) -> Any:
    """The model with every weight from the folder; transformers alone would make up what is missing."""
    cls: Any = transformers_class(name)
    if not any(folder.glob("*.safetensors")):
        raise ConfigurationError(
            f"{folder} holds no safetensors weights",
            why="pickled weights are not loaded",
            fix="save the model again with save_pretrained(...)",
        )
    try:
        model, info = cls.from_pretrained(folder, dtype="float32", local_files_only=True, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise BadArtifactError(
            f"{folder} cannot be loaded as {name}",
            why=str(error).strip().partition("\n")[0],
            fix="check that the download is complete",
        ) from error
    missing = sorted(info["missing_keys"]) + sorted(str(key) for key in info.get("mismatched_keys", ()))
    if missing:
        raise ConfigurationError(
            f"{folder} does not hold all weights of {name}",
            why=f"missing: {', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}",
            fix="use a checkpoint whose config.json names the class that it was saved from",
        )
    return model


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadArtifactError(
            f"{path} cannot be read", why=f"{type(error).__name__}: {error}", fix="fetch the model again"
        ) from error
    if not isinstance(content, dict):
        raise BadArtifactError(f"{path} cannot be read", why="it is not a JSON object", fix="fetch the model again")
    return content


def _class_name(config: dict[str, Any], folder: Path) -> str:
    names = config.get("architectures") or []
    name = str(names[0]) if len(names) == 1 else ""
    name = _VISION_PART.get(name, name)
    if not name.endswith(("ForImageClassification", "ForImageClassificationWithTeacher", "Model", "WithProjection")):
        raise ConfigurationError(
            f"{folder} holds no image classifier or vision backbone",
            why=f"config.json names {name or 'no class'}",
            fix="use a ...ForImageClassification checkpoint, or a plain vision ...Model",
        )
    return name


def _image_size(config: Any) -> tuple[int, int]:
    size = getattr(config, "image_size", None) or getattr(getattr(config, "vision_config", None), "image_size", None)
    if isinstance(size, int):
        return size, size
    if isinstance(size, tuple | list) and len(size) == 2:
        return int(size[0]), int(size[1])
    raise ConfigurationError(
        f"the configuration {type(config).__name__} does not say how large images are",
        why=f"image_size is {size!r}",
        fix="use a vision model",
    )


def _preprocessing(folder: Path, size: tuple[int, int]) -> Preprocessing:
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        raise ConfigurationError(
            f"{folder} does not say how its pixels are made",
            why="it has no preprocessor_config.json",
            fix="save the image processor beside the model: processor.save_pretrained(...)",
        )
    written = _read(path)
    own = _pair(written.get("size", size), "size")
    crop: Any = own if isinstance(own, tuple) else (own, own)
    resize: Any = own
    if written.get("do_center_crop"):
        crop = _pair(written.get("crop_size", crop), "crop_size")
        crop = (crop, crop) if isinstance(crop, int) else crop
    elif isinstance(own, int):
        resize = crop  # without a crop, one number means both sides
    if not written.get("do_resize", True):
        resize = crop = size
    normalize = written.get("do_normalize", True)
    factor = float(written.get("rescale_factor", 1 / 255)) if written.get("do_rescale", True) else 1.0
    if abs(factor * 255 - 1) > 1e-6 or written.get("resample", 3) not in _FILTERS:
        raise ConfigurationError(
            "this model's preprocessing is not supported",
            why=f"rescale factor {factor}, resample {written.get('resample')}",
            fix="use 1/255, and nearest, bilinear or bicubic",
        )
    values = {
        "resize": resize,
        "crop": crop,
        "interpolation": _FILTERS[written.get("resample", 3)],
        "mean": written.get("image_mean", (0.5, 0.5, 0.5)) if normalize else (0.0, 0.0, 0.0),
        "std": written.get("image_std", (0.5, 0.5, 0.5)) if normalize else (1.0, 1.0, 1.0),
    }
    return build_config(Preprocessing, values).resized_to(size)


def _pair(size: Any, what: str) -> int | tuple[int, int]:
    """An int for the shorter side, (height, width) for both."""
    if isinstance(size, dict):
        if set(size) == {"shortest_edge"}:
            return int(size["shortest_edge"])
        if set(size) >= {"height", "width"}:
            return int(size["height"]), int(size["width"])
    elif isinstance(size, int):
        return size
    elif isinstance(size, tuple | list) and len(size) == 2:
        return int(size[0]), int(size[1])
    raise ConfigurationError(
        "this model's preprocessing is not supported", why=f"{what} is {size!r}", fix="give height and width"
    )
