"""Pretrained models of timm, from the hub or from a directory that timm wrote for it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fp8pipe.core.config import build_config
from fp8pipe.core.errors import ConfigurationError, MissingCapabilityError
from fp8pipe.models.compat import import_timm
from fp8pipe.models.vision.architecture import Architecture
from fp8pipe.models.vision.outputs import class_count
from fp8pipe.models.vision.prepare import prepare_model
from fp8pipe.models.vision.preprocessing import Preprocessing

__all__ = ["is_timm_folder", "load_from_timm"]


def is_timm_folder(path: Path) -> bool:
    """Whether a directory's config.json is one of timm's (it names an architecture)."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and isinstance(config.get("architecture"), str)


def load_from_timm(
    name: str | Path, image_size: tuple[int, int] | None
) -> tuple[dict[str, Tensor], Architecture, Preprocessing]:
    """A pretrained timm model: weights by the names of the prepared model, architecture and preprocessing.

    Args:
        name: a model name with or without a tag, or a directory.
        image_size: (height, width) in pixels, None for that of the weights.

    Raises:
        ConfigurationError: timm has no such model or no weights for it, or it takes no other image size.
        MissingCapabilityError: timm is not installed, or the weights could not be downloaded.
    """
    timm = import_timm()
    if isinstance(name, Path):
        _check_folder(name)
    source = f"local-dir:{name}" if isinstance(name, Path) else name
    model = _create(timm, source, image_size)
    config: dict[str, Any] = timm.data.resolve_model_data_config(model)
    size = image_size or _built_size(model) or (int(config["input_size"][1]), int(config["input_size"][2]))
    arguments: dict[str, Any] = {"num_classes": model.num_classes, "img_size": list(size)}
    if isinstance(name, Path):
        written = json.loads((name / "config.json").read_text(encoding="utf-8"))
        arguments = written.get("model_args", {}) | arguments
    prepared = prepare_model(model)
    classes = _class_names(prepared)
    architecture = Architecture(
        library="timm",
        name=str(model.pretrained_cfg["architecture"]),
        arguments=arguments,
        image_size=size,
        classes=classes,
        head="features" if classes is None else "classifier",
    )
    return prepared.state_dict(), architecture, _preprocessing(config, size)


def _create(timm: Any, source: str, image_size: tuple[int, int] | None) -> Any:
    from huggingface_hub import errors as hub

    options = {} if image_size is None else {"img_size": image_size}
    try:
        return timm.create_model(source, pretrained=True, **options)
    except (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled, hub.HfHubHTTPError, OSError) as error:
        raise MissingCapabilityError(
            f"the weights of {source} could not be downloaded",
            why=f"{type(error).__name__}: {_first_line(error)}",
            fix="check the network (HF_HUB_OFFLINE must be unset to download); sample:vit-digits needs none",
        ) from error
    except (RuntimeError, TypeError, ValueError, AssertionError, KeyError) as error:
        raise ConfigurationError(
            f"timm {timm.__version__} cannot give the model {source}",
            why=_first_line(error) or type(error).__name__,
            fix="check the name (timm.list_models(pretrained=True) lists them) and the image size",
        ) from error


def _built_size(model: Any) -> tuple[int, int] | None:
    """The image size that the module was built for; the one noted for its data may be another."""
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    return (int(size[0]), int(size[1])) if isinstance(size, tuple | list) and len(size) == 2 else None


def _check_folder(folder: Path) -> None:
    if not (folder / "model.safetensors").is_file():
        raise ConfigurationError(
            f"{folder} holds no safetensors weights",
            why="no model.safetensors is there, and pickled weights are not loaded",
            fix="save the model again in safetensors",
        )


def _class_names(model: nn.Module) -> tuple[str, ...] | None:
    """The names that came with the weights; ImageNet's synsets for 1000 classes; else numbers."""
    count = class_count(model)
    if count is None:
        return None
    config: Any = getattr(model, "pretrained_cfg", {})
    names = config.get("label_names")
    if names and len(names) == count:
        return tuple(names)
    from timm.data import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset(model)
    if subset == "imagenet-1k":
        return tuple(ImageNetInfo(subset).label_names())
    return tuple(map(str, range(count)))


def _preprocessing(config: dict[str, Any], size: tuple[int, int]) -> Preprocessing:
    """timm's evaluation transform: the crop is a fraction `crop_pct` of the resized image."""
    fraction = float(config["crop_pct"])
    if config["crop_mode"] not in {"center", "squash"}:
        raise ConfigurationError(
            "this model's preprocessing is not supported",
            why=f"its crop mode is {config['crop_mode']}",
            fix="use a model that resizes and crops the centre",
        )
    squash = config["crop_mode"] == "squash"
    resize = tuple(math.floor(side / fraction) for side in size) if squash else math.floor(max(size) / fraction)
    values = {"resize": resize, "crop": size} | {key: config[key] for key in ("interpolation", "mean", "std")}
    return build_config(Preprocessing, values)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
