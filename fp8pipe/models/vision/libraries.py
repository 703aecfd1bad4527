"""Pretrained vision models of timm (from the hub or a directory) and of transformers (a directory).

Either becomes the same three things: weights by the names of the prepared model, an architecture and a preprocessing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

from torch import Tensor, nn

from fp8pipe.core.config import build_config
from fp8pipe.core.errors import BadArtifactError, ConfigurationError, MissingCapabilityError
from fp8pipe.models.checkpoint.sidecars import read_config
from fp8pipe.models.compat import import_timm
from fp8pipe.models.settings import check_config, declared_fields
from fp8pipe.models.vision.answers import activation_of
from fp8pipe.models.vision.architecture import Architecture, check_arguments, transformers_class
from fp8pipe.models.vision.names import named_outputs, unique_names
from fp8pipe.models.vision.plain import check_plain
from fp8pipe.models.vision.prepare import class_count, prepare_model
from fp8pipe.models.vision.preprocessing import Preprocessing
from fp8pipe.models.vision.structure import pair_of_integers
from fp8pipe.models.vision.towers import check_all_read, vision_config, vision_part


class Pretrained(NamedTuple):
    """What a checkpoint becomes, and what a user should know of how it was read."""

    weights: dict[str, Tensor]
    architecture: Architecture
    preprocessing: Preprocessing
    notes: tuple[str, ...] = ()


# Entries that say where and by what a configuration was written, not what is built.
_RECORDS: Final = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures")
_ONE_OUTPUT: Final = (
    "the head has one output, and the checkpoint does not say that it is a probability: its value is served as it is; "
    "--head-activation sigmoid makes a probability of it"
)
_CHANNELS: Final = 3
_FILTERS: Final = {0: "nearest", 2: "bilinear", 3: "bicubic"}


def load_from_folder(folder: Path, image_size: tuple[int, int] | None) -> Pretrained:
    """A model in a directory of timm (its config.json names an architecture) or of transformers.

    Args:
        folder: config.json and safetensors; with transformers also preprocessor_config.json.
        image_size: (height, width) in pixels, None for that of the weights or the configuration.

    Raises:
        ConfigurationError: no vision model, weights missing, no preprocessing beside them, or another image size.
        BadArtifactError: a file cannot be read.
    """
    config = read_config(folder / "config.json")
    if not isinstance(config.get("architecture"), str):
        check_config(folder)
        return _from_transformers(folder, config, image_size)
    _check_weights(folder, "model.safetensors")
    written = config.get("model_args", {})
    try:
        check_arguments(written)
    except (ValueError, TypeError) as error:
        raise ConfigurationError(f"{folder / 'config.json'} cannot be used", why=str(error), fix="remove it") from error
    return load_from_timm(f"local-dir:{folder}", image_size, written)


def load_from_timm(
    source: str, image_size: tuple[int, int] | None, written: Mapping[str, Any] | None = None
) -> Pretrained:
    """A pretrained timm model.

    Args:
        source: a model name with or without a tag, or `local-dir:` and a directory.
        image_size: (height, width) in pixels, None for that of the weights.
        written: arguments of the model that are stored beside its weights.

    Raises:
        ConfigurationError: timm has no such model or no weights for it, or it takes no other image size.
        MissingCapabilityError: timm is not installed, or the weights could not be downloaded.
    """
    timm = import_timm()
    model = _create(timm, source, image_size)
    check_plain(model, source)
    config: dict[str, Any] = timm.data.resolve_model_data_config(model)
    size = image_size or _built_size(model) or (int(config["input_size"][1]), int(config["input_size"][2]))
    arguments = {**(written or {}), "num_classes": model.num_classes, "img_size": list(size)}
    prepared, name = prepare_model(model), str(model.pretrained_cfg["architecture"])
    names, notes = unique_names(_class_names(prepared))
    architecture, said = _architecture("timm", name, arguments, size, names)
    return Pretrained(prepared.state_dict(), architecture, _timm_preprocessing(config, size), (*notes, *said))


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
        if isinstance(error, TypeError) and options:  # of a model that takes no size: for the true reason
            check_plain(timm.create_model(source, pretrained=False), source)
        raise ConfigurationError(
            f"timm {timm.__version__} cannot give the model {source}",
            why=_first_line(error) or type(error).__name__,
            fix="check the name (timm.list_models(pretrained=True) lists them) and the image size",
        ) from error


def _built_size(model: Any) -> tuple[int, int] | None:
    """The image size that the module was built for; the one noted for its data may be another."""
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    return pair_of_integers(size) if isinstance(size, tuple | list) else None


def _class_names(model: nn.Module) -> tuple[str, ...]:
    """The names that came with the weights; ImageNet's synsets for 1000 classes; else numbers. None for a backbone."""
    count = class_count(model)
    if count is None:
        return ()
    config: Any = getattr(model, "pretrained_cfg", {})
    names = config.get("label_names")
    if names and len(names) == count:
        return tuple(names)
    from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset(model)
    if subset == "imagenet-1k":
        return tuple(ImageNetInfo(subset).label_names())
    return tuple(map(str, range(count)))


def _timm_preprocessing(config: dict[str, Any], size: tuple[int, int]) -> Preprocessing:
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
    rest = {key: config[key] for key in ("interpolation", "mean", "std")}
    _check_moments(config["mean"], config["std"])
    return build_config(Preprocessing, {"resize": resize, "crop": size, **rest})


def _architecture(
    library: Literal["timm", "transformers"],
    name: str,
    arguments: dict[str, Any],
    size: tuple[int, int],
    classes: tuple[str, ...],
    problem: str | None = None,
) -> tuple[Architecture, tuple[str, ...]]:
    """The architecture, and what was concluded without being said by the checkpoint; without classes a backbone."""
    activation = activation_of(len(classes), problem) if classes else "none"
    architecture = Architecture(
        library=library, name=name, arguments=arguments, image_size=size, classes=classes or None,
        head="classifier" if classes else "features", activation=activation,
    )  # fmt: skip
    alone = len(classes) == 1 and problem not in ("regression", "multi_label_classification")
    return architecture, (_ONE_OUTPUT,) if alone else ()


def _check_weights(folder: Path, pattern: str) -> None:
    if not any(folder.glob(pattern)):
        raise ConfigurationError(
            f"{folder} holds no safetensors weights",
            why=f"no {pattern} is there, and pickled weights are not loaded",
            fix="save the model again in safetensors",
        )


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


def _from_transformers(folder: Path, config: Mapping[str, Any], image_size: tuple[int, int] | None) -> Pretrained:
    name = _class_name(config, folder)
    model = _load(folder, name, config)
    check_plain(model, f"{folder} ({name})")
    size = image_size or _image_size(model.config)
    count = class_count(model)
    names, notes = ((), []) if count is None else named_outputs(model.config.id2label, count)
    arguments = json.loads(json.dumps(_declared(type(model.config), model.config.to_dict())))
    problem = getattr(model.config, "problem_type", None)
    architecture, said = _architecture("transformers", name, arguments, size, names, problem)
    preprocessing = _transformers_preprocessing(folder, size)
    return Pretrained(prepare_model(model).state_dict(), architecture, preprocessing, (*notes, *said))


def _declared(config_class: Any, found: Mapping[str, Any]) -> dict[str, Any]:
    """What the class of a configuration knows; checkpoints hold more, which no model of it reads."""
    kept = declared_fields(config_class) - set(_RECORDS) | {"model_type"}
    inner = config_class.sub_configs
    return {k: _declared(inner[k], v) if k in inner and v else v for k, v in found.items() if k in kept}


def _load(folder: Path, name: str, config: Mapping[str, Any]) -> Any:
    """The model with every weight of the folder; transformers alone would make up the missing, and drop the rest."""
    cls: Any = transformers_class(name)
    _check_weights(folder, "*.safetensors")
    try:
        model, info = cls.from_pretrained(folder, config=vision_config(folder, config), dtype="float32",
                                          local_files_only=True, use_safetensors=True,
                                          output_loading_info=True)  # fmt: skip
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise BadArtifactError(
            f"{folder} cannot be loaded as {name}", why=_first_line(error), fix="check that the download is complete"
        ) from error
    missing = sorted(info["missing_keys"]) + sorted(str(key) for key in info.get("mismatched_keys", ()))
    if missing:
        raise ConfigurationError(
            f"{folder} does not hold all weights of {name}",
            why=f"missing: {', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}",
            fix="use a checkpoint whose config.json names the class that it was saved from",
        )
    check_all_read(folder, name, info["unexpected_keys"])
    return model


def _class_name(config: Mapping[str, Any], folder: Path) -> str:
    names = config.get("architectures") or []
    name = str(names[0]) if len(names) == 1 else ""
    name = vision_part(name, config)
    if not name.endswith(("ForImageClassification", "ForImageClassificationWithTeacher", "Model", "WithProjection")):
        raise ConfigurationError(
            f"{folder} holds no image classifier or vision backbone",
            why=f"config.json names {name or 'no class'}",
            fix="use a ...ForImageClassification checkpoint, or a plain vision ...Model",
        )
    return name


def _image_size(config: Any) -> tuple[int, int]:
    size = getattr(config, "image_size", None) or getattr(getattr(config, "vision_config", None), "image_size", None)
    if (found := pair_of_integers(size)) is not None:
        return found
    raise ConfigurationError(
        f"the configuration {type(config).__name__} does not say how large images are",
        why=f"image_size is {size!r}",
        fix="use a vision model",
    )


def _transformers_preprocessing(folder: Path, size: tuple[int, int]) -> Preprocessing:
    written = _processor(folder)
    resize: Any = _pair(written.get("size", size), "size")
    crop = _both_sides(resize)
    if written.get("do_center_crop"):
        crop = _both_sides(_pair(written.get("crop_size", crop), "crop_size"))
    else:
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
    mean = written.get("image_mean", (0.5, 0.5, 0.5)) if normalize else (0.0, 0.0, 0.0)
    std = written.get("image_std", (0.5, 0.5, 0.5)) if normalize else (1.0, 1.0, 1.0)
    _check_moments(mean, std)
    values = {"resize": resize, "crop": crop, "interpolation": _FILTERS[written.get("resample", 3)]}
    return build_config(Preprocessing, {**values, "mean": mean, "std": std}).resized_to(size)


def _processor(folder: Path) -> dict[str, Any]:
    """The settings of the image processor: a file of its own, or a part of the processor's of text and images."""
    path, whole = folder / "preprocessor_config.json", folder / "processor_config.json"
    if path.is_file():
        return read_config(path)
    nested = read_config(whole).get("image_processor") if whole.is_file() else None
    if not isinstance(nested, dict):
        raise ConfigurationError(
            f"{folder} does not say how its pixels are made",
            why=f"it has no {path.name}, and no image_processor in a {whole.name}",
            fix="save the image processor beside the model: processor.save_pretrained(...)",
        )
    return nested


def _check_moments(mean: Any, std: Any) -> None:
    """Refuse means and deviations that are not those of three channels."""
    for name, values in (("mean", mean), ("std", std)):
        if not isinstance(values, list | tuple) or len(values) != _CHANNELS:
            raise ConfigurationError(
                f"the {name} of this model's preprocessing is not that of an RGB image",
                why=f"it is {values!r}, and there is one number for each of three channels",
                fix="correct it in the file of the image processor; a grey model's number stands for all three",
            )


def _both_sides(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


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
