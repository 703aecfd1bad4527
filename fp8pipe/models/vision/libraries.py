"""Loads pretrained vision models of timm (from the hub or a directory) and of transformers (from a directory).

For both libraries the result is the same: weights under the names of the prepared model (see `prepare_model`), the
architecture, and the preprocessing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from fp8pipe.core.errors import (
    BadArtifactError,
    ConfigurationError,
    MissingCapabilityError,
    class_and_first_line,
    class_and_one_line,
    first_line,
)
from fp8pipe.models.checkpoint.sidecars import read_config
from fp8pipe.models.compat import import_timm
from fp8pipe.models.settings import check_config, declared_fields
from fp8pipe.models.vision.answers import activation_of
from fp8pipe.models.vision.architecture import Architecture, check_arguments, transformers_class
from fp8pipe.models.vision.names import named_outputs, unique_names
from fp8pipe.models.vision.plain import check_plain
from fp8pipe.models.vision.prepare import class_count, prepare_model, vision_outputs
from fp8pipe.models.vision.preprocessing import Preprocessing
from fp8pipe.models.vision.processors import processor_recipe, timm_recipe
from fp8pipe.models.vision.structure import pair_of_integers
from fp8pipe.models.vision.towers import check_all_read, vision_config, vision_part


class Pretrained(NamedTuple):
    """A pretrained model as read from its files, with notes for the user on how the files were interpreted."""

    weights: dict[str, Tensor]
    architecture: Architecture
    preprocessing: Preprocessing
    notes: tuple[str, ...] = ()


# Configuration entries about how the file was written, which do not affect the model.
_RECORDS: Final = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures")
_OWN_SHAPES: Final = "use a checkpoint whose model_args give shapes and parts of a vision transformer alone"
_ONE_OUTPUT: Final = (
    "the head has one output, and the checkpoint does not say that it is a probability: its value is served unchanged; "
    "--head-activation sigmoid turns it into a probability"
)


def load_from_folder(folder: Path, image_size: tuple[int, int] | None) -> Pretrained:
    """Load a vision model from a directory.

    The directory is one of timm if `architecture` in its config.json is a string, otherwise one of transformers.

    Args:
        folder: contains config.json and safetensors; for transformers also the settings of the image processor.
        image_size: (height, width) in pixels; None for the size that the model's files give.

    Raises:
        ConfigurationError: it is not a vision model, weights or preprocessing are missing, or the image size is not
            supported.
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
        raise ConfigurationError(f"{folder / 'config.json'} cannot be used", why=str(error), fix=_OWN_SHAPES) from error
    return load_from_timm(f"local-dir:{folder}", image_size, written)


def load_from_timm(
    source: str, image_size: tuple[int, int] | None, written: Mapping[str, Any] | None = None
) -> Pretrained:
    """Load a pretrained timm model.

    Args:
        source: a timm model name, with or without a tag, or `local-dir:` followed by a directory.
        image_size: (height, width) in pixels; None for the size that the weights were trained for.
        written: model arguments from the config.json beside the weights.

    Raises:
        ConfigurationError: timm has no such model, no weights for it, or the model does not support the image size.
        MissingCapabilityError: timm is not installed, or the weights could not be downloaded.
    """
    timm = import_timm()
    model = _create(timm, source, image_size)
    check_plain(model, source)
    config: dict[str, Any] = timm.data.resolve_model_data_config(model)
    stated = (int(config["input_size"][1]), int(config["input_size"][2]))
    built = _built_size(model) or stated
    size = image_size or built
    conflict: tuple[str, ...] = ()
    if size != stated and image_size is None:
        conflict = (f"{_conflict(built, stated)}: its position embedding fits {_shown(built)}, which is used",)
    arguments = {**(written or {}), "num_classes": model.num_classes, "img_size": list(size)}
    prepared, name = prepare_model(model), str(model.pretrained_cfg["architecture"])
    names, notes = unique_names(_class_names(prepared))
    architecture, said = _architecture("timm", name, arguments, size, names)
    return Pretrained(prepared.state_dict(), architecture, timm_recipe(config, size), (*conflict, *notes, *said))


def _create(timm: Any, source: str, image_size: tuple[int, int] | None) -> Any:
    from huggingface_hub import errors as hub

    options = {} if image_size is None else {"img_size": image_size}
    try:
        return timm.create_model(source, pretrained=True, **options)
    except (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled, hub.HfHubHTTPError, OSError) as error:
        raise MissingCapabilityError(
            f"the weights of {source} could not be downloaded",
            why=class_and_first_line(error),
            fix="check the network (HF_HUB_OFFLINE must be unset to download); sample:vit-digits needs none",
        ) from error
    except (RuntimeError, TypeError, ValueError, AssertionError, KeyError) as error:
        if isinstance(error, TypeError) and options:  # the model takes no image size: report the real cause
            check_plain(timm.create_model(source, pretrained=False), source)
        raise ConfigurationError(
            f"timm {timm.__version__} cannot create the model {source}",
            why=first_line(error),
            fix="check the name (timm.list_models(pretrained=True) lists them) and the image size",
        ) from error


def _built_size(model: Any) -> tuple[int, int] | None:
    """The (height, width) that the module was built for, which may differ from its data configuration."""
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    return pair_of_integers(size) if isinstance(size, tuple | list) else None


def _class_names(model: nn.Module) -> tuple[str, ...]:
    """Class names of a timm model: stored names, else ImageNet-1k synsets, else numbers; () for a backbone."""
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


def _choose_size(
    model: nn.Module, stated: tuple[int, int], prepared: tuple[int, int]
) -> tuple[tuple[int, int], tuple[str, ...]]:
    """Choose the image size if the user gave none: the image processor's, unless the model does not run at that size.

    Args:
        model: the model.
        stated: (height, width) in the model's configuration.
        prepared: (height, width) that the image processor produces.
    """
    if stated == prepared:
        return stated, ()
    said = _conflict(stated, prepared)
    if _runs(model, prepared):
        return prepared, (
            f"{said}: the size of the preprocessing is used (--image-size {_shown(stated)} selects the other)",
        )
    return stated, (f"{said}, which the model does not accept: the preprocessing is scaled to {_shown(stated)}",)


def _conflict(stated: tuple[int, int], prepared: tuple[int, int]) -> str:
    ours, theirs = _shown(stated), _shown(prepared)
    return f"the model's configuration says images of {ours} pixels, its preprocessing makes {theirs}"


def _shown(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


@torch.no_grad()
def _runs(model: nn.Module, size: tuple[int, int]) -> bool:
    try:
        vision_outputs(model.eval(), torch.zeros(1, 3, *size))
    except (AssertionError, ValueError, RuntimeError, IndexError, TypeError, ConfigurationError):
        return False
    return True


def _architecture(
    library: Literal["timm", "transformers"],
    name: str,
    arguments: dict[str, Any],
    size: tuple[int, int],
    classes: tuple[str, ...],
    problem: str | None = None,
) -> tuple[Architecture, tuple[str, ...]]:
    """Create the architecture of a loaded model.

    Args:
        library: the library that builds the model.
        name: name of the timm model or of the transformers class.
        arguments: arguments or configuration of the model.
        size: (height, width) of the images, pixels.
        classes: class names; empty for a backbone.
        problem: transformers' `problem_type`, if the model has one.

    Returns:
        The architecture, and notes for the user on what was inferred.
    """
    activation = activation_of(len(classes), problem) if classes else "none"
    try:
        architecture = Architecture(
            library=library, name=name, arguments=arguments, image_size=size, classes=classes or None,
            head="classifier" if classes else "features", activation=activation,
        )  # fmt: skip
    except ValidationError as error:
        raise ConfigurationError(
            f"the configuration of this {name} cannot be stored beside quantized weights",
            why="; ".join(one["msg"] for one in error.errors()),
            fix="use a model whose configuration holds numbers and names alone",
        ) from error
    alone = len(classes) == 1 and problem not in ("regression", "multi_label_classification")
    return architecture, (_ONE_OUTPUT,) if alone else ()


def _check_weights(folder: Path, pattern: str) -> None:
    if not any(folder.glob(pattern)):
        raise ConfigurationError(
            f"{folder} holds no safetensors weights",
            why=f"no {pattern} is there, and pickled weights are not loaded",
            fix="save the model again in safetensors",
        )


def _from_transformers(folder: Path, config: Mapping[str, Any], image_size: tuple[int, int] | None) -> Pretrained:
    name = _class_name(config, folder)
    model = _load(folder, name, config)
    check_plain(model, f"{folder} ({name})")
    stated = _image_size(model.config)
    recipe, remarks = _processor(folder, stated)
    size = image_size
    if size is None:
        size, more = _choose_size(model, stated, recipe.crop)
        remarks += more
    count = class_count(model)
    names, notes = ((), []) if count is None else named_outputs(model.config.id2label, count)
    arguments = json.loads(json.dumps(_declared(type(model.config), model.config.to_dict())))
    problem = getattr(model.config, "problem_type", None)
    architecture, said = _architecture("transformers", name, arguments, size, names, problem)
    weights = prepare_model(model).state_dict()
    return Pretrained(weights, architecture, recipe.resized_to(size), (*remarks, *notes, *said))


def _declared(config_class: Any, found: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a configuration that its class declares; others, which the model ignores, are dropped."""
    kept = declared_fields(config_class) - set(_RECORDS) | {"model_type"}
    inner = config_class.sub_configs
    return {k: _declared(inner[k], v) if k in inner and v else v for k, v in found.items() if k in kept}


def _load(folder: Path, name: str, config: Mapping[str, Any]) -> Any:
    """Load a transformers model. Missing or unused weights are an error here; transformers itself only warns."""
    cls: Any = transformers_class(name)
    _check_weights(folder, "*.safetensors")
    try:
        model, info = cls.from_pretrained(folder, config=vision_config(folder, config, name), dtype="float32",
                                          local_files_only=True, use_safetensors=True,
                                          output_loading_info=True)  # fmt: skip
    except Exception as error:  # third-party code, which may raise any type
        raise BadArtifactError(
            f"{folder} cannot be loaded as {name}",
            why=_why_not(error),
            fix="check that the download is complete, and the settings in config.json",
        ) from error
    missing = sorted(info["missing_keys"]) + sorted(str(key) for key in info.get("mismatched_keys", ()))
    if missing:
        whole = str((config.get("architectures") or [name])[0])
        pooled = "use one that was saved with its pooling layer: its features are what that layer gives"
        named = "use a checkpoint whose config.json names the class that it was saved from"
        if whole != name:
            named = f"save the vision model of the {whole} by itself, with its image processor, and use that"
        raise ConfigurationError(
            f"{folder} does not hold all weights of {name}",
            why=f"missing: {', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}",
            fix=pooled if all(key.startswith("pooler.") for key in missing) else named,
        )
    check_all_read(folder, name, info["unexpected_keys"])
    return model


def _why_not(error: Exception) -> str:
    if "ignore_mismatched_sizes" in str(error):
        return "weights have other shapes than config.json says; are there as many names in id2label as outputs?"
    return class_and_one_line(error, 200)


def _class_name(config: Mapping[str, Any], folder: Path) -> str:
    names = config.get("architectures") or []
    name = str(names[0]) if len(names) == 1 else ""
    name = vision_part(name, config)
    if not name.endswith(("ForImageClassification", "ForImageClassificationWithTeacher", "Model", "WithProjection")):
        raise ConfigurationError(
            f"{folder} holds no image classifier or vision backbone",
            why=f"config.json names {', '.join(map(str, names)) or 'no class'}",
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


def _processor(folder: Path, size: tuple[int, int]) -> tuple[Preprocessing, tuple[str, ...]]:
    """The preprocessing of a transformers directory, from its image processor, with notes for the user.

    `size` is the (height, width) in the model's configuration.
    """
    path, whole = folder / "preprocessor_config.json", folder / "processor_config.json"
    if path.is_file():
        read_config(path)
    elif not (whole.is_file() and isinstance(read_config(whole).get("image_processor"), dict)):
        raise ConfigurationError(
            f"{folder} does not say how its pixels are made",
            why=f"it has no {path.name}, and no image_processor in a {whole.name}",
            fix="save the image processor beside the model: processor.save_pretrained(...)",
        )
    return processor_recipe(folder, size)
