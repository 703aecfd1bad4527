"""A vision model without its weights, as data: enough to build the empty module anywhere, with no download."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from fp8pipe.core.config import FrozenConfig
from fp8pipe.core.errors import ConfigurationError, MissingCapabilityError
from fp8pipe.models.compat import import_timm, import_transformers
from fp8pipe.models.vision.outputs import class_count
from fp8pipe.models.vision.prepare import prepare_model
from fp8pipe.models.vision.probed import ClassAndPatches

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["ARCHITECTURE_FILE", "Architecture", "build", "transformers_class"]

ARCHITECTURE_FILE: Final = "architecture.json"

Side = Annotated[int, Field(ge=1, le=16384)]


class Architecture(FrozenConfig):
    """What it takes to build the module of a vision model."""

    library: Literal["timm", "transformers"] = Field(description="the package that builds it")
    name: str = Field(description="timm: the model's name; transformers: the model's class")
    arguments: dict[str, Any] = Field(
        default_factory=dict, description="timm: arguments of create_model; transformers: the configuration"
    )
    image_size: tuple[Side, Side] = Field(description="(height, width) of the images, pixels")
    classes: tuple[str, ...] | None = Field(default=None, description="name of each class; none for a backbone")
    head: Literal["classifier", "features", "probe"] = Field(
        description="classifier: logits of the library's own head; features: pooled features; "
        "probe: a linear head of this project on the class token and the mean of the patches"
    )

    @model_validator(mode="after")
    def _classes_fit(self) -> Architecture:
        if (self.head == "features") != (self.classes is None):
            raise ValueError(f"head {self.head!r} with {'no' if self.classes is None else 'given'} classes")
        if self.classes is not None and (not self.classes or len(set(self.classes)) != len(self.classes)):
            raise ValueError("the class names must be different, and at least one")
        return self


def build(architecture: Architecture) -> nn.Module:
    """The module with random weights: prepared (see `prepare_model`), in eval mode, float32; nothing is downloaded.

    The random state of the process is left as it was.

    Raises:
        ConfigurationError: the library does not know it, or builds something else than described.
        MissingCapabilityError: the library is not installed.
    """
    with torch.random.fork_rng(devices=[]):
        model = _timm(architecture) if architecture.library == "timm" else _transformers(architecture)
        if architecture.head == "probe":
            model = ClassAndPatches(prepare_model(model), architecture.image_size, len(architecture.classes or ()))
    model = prepare_model(model)
    expected = None if architecture.classes is None else len(architecture.classes)
    if class_count(model) != expected:
        raise ConfigurationError(
            f"{architecture.library} builds another {architecture.name} than was described",
            why=f"it has {class_count(model)} classes, and {expected} are named",
            fix="correct the class names or the arguments",
        )
    return model


def _timm(architecture: Architecture) -> nn.Module:
    timm = import_timm()
    try:
        model = timm.create_model(architecture.name, pretrained=False, **architecture.arguments)
    except Exception as error:  # arguments go to foreign code, which raises what it likes
        raise ConfigurationError(
            f"timm {timm.__version__} cannot build {architecture.name}",
            why=str(error).strip().partition("\n")[0] or type(error).__name__,
            fix="check the name, its arguments and the image size, or install the timm it was made with",
        ) from error
    return model


def _transformers(architecture: Architecture) -> nn.Module:
    cls: Any = transformers_class(architecture.name)
    try:
        config = cls.config_class.from_dict(dict(architecture.arguments))
        return cls._from_config(config)
    except Exception as error:  # as above
        raise ConfigurationError(
            f"transformers cannot build {architecture.name}",
            why=f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}",
            fix="check the configuration, or install the transformers it was made with",
        ) from error


def transformers_class(name: str) -> type[PreTrainedModel]:
    """The model class of transformers with this name.

    Raises:
        ConfigurationError: there is none, or the name is something else.
    """
    try:
        transformers = import_transformers()
    except ModuleNotFoundError as error:
        raise MissingCapabilityError(
            "this model needs the package transformers", why=str(error), fix="pip install transformers"
        ) from error
    found = getattr(transformers, name, None)
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise ConfigurationError(
            f"transformers {transformers.__version__} has no model class {name}",
            why="the name is not one of its model classes",
            fix="name a vision model class, for example ViTForImageClassification",
        )
    return found
