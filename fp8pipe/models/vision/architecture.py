"""The architecture of a vision model as data, without weights: enough to build the module offline."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from fp8pipe.core.config import FrozenConfig
from fp8pipe.core.errors import ConfigurationError, MissingCapabilityError, class_and_first_line
from fp8pipe.models.compat import import_timm, import_transformers
from fp8pipe.models.settings import foreign_arguments
from fp8pipe.models.vision.answers import Activation, ranks
from fp8pipe.models.vision.prepare import class_count, prepare_model
from fp8pipe.models.vision.structure import read_structure

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ARCHITECTURE_FILE: Final = "architecture.json"

# The timm arguments that a stored model may set: shapes and components. Other arguments can name files, URLs or code
# (`checkpoint_path`, `pretrained_cfg`, `cache_dir`), so they are rejected.
_ARGUMENTS: Final = frozenset(
    ("img_size", "patch_size", "in_chans", "num_classes", "global_pool", "embed_dim", "depth", "depths", "num_heads",
     "head_dim", "mlp_ratio", "qkv_bias", "qk_norm", "proj_bias", "scale_attn_norm", "scale_mlp_norm", "init_values",
     "class_token", "pos_embed", "no_embed_class", "reg_tokens", "pre_norm", "final_norm", "fc_norm",
     "dynamic_img_size", "dynamic_img_pad", "drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate",
     "attn_drop_rate", "drop_path_rate", "weight_init", "fix_init", "window_size", "always_partition",
     "use_abs_pos_emb", "use_rel_pos_bias", "use_shared_rel_pos_bias", "head_init_scale", "swiglu_mlp", "scale_mlp",
     "attn_type", "rope_type", "num_reg_tokens", "use_rot_pos_emb", "rope_mixed_mode", "rope_grid_indexing",
     "use_mean_pooling", "use_fc_norm", "use_post_norm", "num_prefix_tokens", "distilled",
     "pool_include_prefix", "strict_img_size", "act_layer", "norm_layer")
)  # fmt: skip

Side = Annotated[int, Field(ge=1, le=16384)]


class Architecture(FrozenConfig):
    """Everything needed to build the module of a vision model."""

    library: Literal["timm", "transformers"] = Field(description="the package that builds the model")
    name: str = Field(description="timm: the model's name; transformers: the model's class")
    arguments: dict[str, Any] = Field(
        default_factory=dict, description="timm: arguments of create_model; transformers: the configuration"
    )
    image_size: tuple[Side, Side] = Field(description="(height, width) of the images, pixels")
    classes: tuple[str, ...] | None = Field(
        default=None, description="class names in the order of the outputs; null for a backbone"
    )
    head: Literal["classifier", "features", "probe"] = Field(
        description="classifier: logits of the library's own head; features: pooled features; "
        "probe: fp8pipe's linear head on the class token and the mean of the patch tokens"
    )
    activation: Activation = Field(
        default="softmax",
        description="how outputs become probabilities: softmax for mutually exclusive classes, sigmoid for independent "
        "labels, none if the outputs are plain values or features",
    )

    @model_validator(mode="before")
    @classmethod
    def _usual_activation(cls, data: Any) -> Any:
        """Sets the field for files written before it existed, when every classifier was assumed to use softmax."""
        if isinstance(data, dict) and "activation" not in data:
            return {**data, "activation": usual_activation(data.get("head"))}
        return data

    @property
    def ranked(self) -> bool:
        """Whether the prediction is the class with the largest output."""
        return ranks(self.activation, len(self.classes or ()))

    @property
    def choices(self) -> tuple[str, ...] | None:
        """The classes to predict from; None if there is no choice: features, plain values or a single label."""
        chooses = self.activation != "none" and len(self.classes or ()) > 1
        return self.classes if chooses else None

    @model_validator(mode="after")
    def _nothing_but_shapes(self) -> Architecture:
        if self.library == "timm":
            if not re.fullmatch(r"[A-Za-z0-9_.]+", self.name):
                raise ValueError(
                    f"{self.name!r} is not a plain timm model name: it may refer to a file or a hub repository"
                )
            check_arguments(self.arguments)
        elif foreign := list(foreign_arguments(transformers_class(self.name).config_class, self.arguments)):
            raise ValueError(f"arguments that a stored model may not pass to transformers: {'; '.join(foreign)}")
        return self

    @model_validator(mode="after")
    def _classes_fit(self) -> Architecture:
        if (self.head == "features") != (self.classes is None):
            needs = "requires" if self.classes is None else "does not take"
            raise ValueError(f"head {self.head!r} {needs} class names")
        if self.classes is not None and (not self.classes or len(set(self.classes)) != len(self.classes)):
            raise ValueError("class names must be unique, and there must be at least one")
        if self.classes is None and self.activation != "none":
            raise ValueError(f"features are not logits, so the activation must be 'none', not {self.activation!r}")
        return self


def usual_activation(head: Any) -> Activation:
    """The output activation of a head that does not declare one."""
    return "none" if head == "features" else "softmax"


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Reject timm arguments that do not describe shapes or components of a model.

    Raises:
        ValueError: an argument is not permitted, or its value is not a number, a string, None or a list of these.
    """
    foreign = sorted(set(arguments) - _ARGUMENTS)
    if foreign:
        raise ValueError(f"arguments that a stored model may not pass to timm: {', '.join(foreign)}")
    for name, value in arguments.items():
        parts = value if isinstance(value, list | tuple) else [value]
        if not all(part is None or isinstance(part, str | int | float) for part in parts):
            raise ValueError(f"the argument {name} is {value!r}, but only numbers, strings and lists are allowed")


def build(architecture: Architecture) -> nn.Module:
    """Build the module with random weights, in float32 and eval mode, prepared by `prepare_model`.

    Nothing is downloaded, and torch's global random state is left unchanged.

    Raises:
        ConfigurationError: the library cannot build the model, or builds it with another number of classes.
        MissingCapabilityError: the library is not installed.
    """
    with torch.random.fork_rng(devices=[]):
        model = _create(architecture)
        if architecture.head == "probe":
            model = ClassAndPatches(prepare_model(model), architecture.image_size, len(architecture.classes or ()))
    model = prepare_model(model)
    expected, found = None if architecture.classes is None else len(architecture.classes), class_count(model)
    if found != expected:
        raise ConfigurationError(
            f"the {architecture.name} built by {architecture.library} does not match its description",
            why=f"it has {found or 'no'} classes, but {expected or 'no'} class names are given",
            fix="correct the class names or the arguments",
        )
    return model


def _create(architecture: Architecture) -> Any:
    cls: Any = transformers_class(architecture.name) if architecture.library == "transformers" else None
    library = import_timm() if cls is None else import_transformers()
    try:
        if cls is None:
            return library.create_model(architecture.name, pretrained=False, **architecture.arguments)
        return cls._from_config(cls.config_class.from_dict(dict(architecture.arguments)))
    except Exception as error:  # third-party code, which may raise any type
        raise ConfigurationError(
            f"{architecture.library} {library.__version__} cannot build {architecture.name}",
            why=class_and_first_line(error),
            fix="check the name, its arguments and the image size, or install the version that it was saved with",
        ) from error


def transformers_class(name: str) -> type[PreTrainedModel]:
    """The transformers model class of this name.

    Raises:
        ConfigurationError: transformers has no class of this name, or it is not a model class.
        MissingCapabilityError: transformers is not installed.
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
            why="no subclass of PreTrainedModel has this name",
            fix="name a vision model class, for example ViTForImageClassification",
        )
    return found


class ClassAndPatches(nn.Module):
    """A backbone with a linear classifier on top: `Linear([class token, mean of the patch tokens])`.

    If the backbone has no prefix tokens, the input is the mean alone. Neither timm nor transformers offers this head
    for every backbone. It is cheap and works well on self-supervised features (reported for DINOv2, arXiv 2304.07193).
    The head is an ordinary `nn.Linear`, so it is quantized together with the backbone.

    Args:
        backbone: prepared by `prepare_model`, without a head of its own.
        image_size: (height, width) in pixels; a forward pass at this size determines prefix tokens and feature width.
        classes: number of classes.

    Raises:
        ConfigurationError: the backbone returns no tokens, or has a head.
    """

    def __init__(self, backbone: nn.Module, image_size: tuple[int, int], classes: int) -> None:
        super().__init__()
        structure = read_structure(backbone, image_size)
        if structure.heads:
            raise ConfigurationError(
                "a linear probe needs a backbone, and this model has a head",
                why=f"{structure.heads[0]} outputs {structure.classes} classes",
                fix="build the model without a head (timm: num_classes=0; transformers: the ...Model class)",
            )
        self.backbone = backbone
        self.prefix_tokens = structure.attentions[-1].prefix_tokens
        self.num_classes = classes
        parameter = next(backbone.parameters())
        with torch.no_grad():
            features = self.features(torch.zeros(1, 3, *image_size, dtype=parameter.dtype, device=parameter.device))
        self.head = nn.Linear(features.shape[-1], classes)

    def features(self, pixels: Tensor) -> Tensor:
        """The input of the head: (N, 3, H, W) -> (N, 2 x width), or (N, width) without prefix tokens."""
        tokens = token_features(self.backbone, pixels)
        mean = tokens[:, self.prefix_tokens :].mean(dim=1)
        return torch.cat((tokens[:, 0], mean), dim=-1) if self.prefix_tokens else mean

    def forward(self, pixels: Tensor) -> Tensor:
        """(N, 3, H, W) -> logits (N, classes)."""
        logits: Tensor = self.head(self.features(pixels))
        return logits


def token_features(backbone: nn.Module, pixels: Tensor) -> Tensor:
    """The tokens after the last block and its norm: (N, tokens, width), prefix tokens first.

    Raises:
        ConfigurationError: the backbone does not return them.
    """
    tokens: Any
    forward: Any = getattr(backbone, "forward_features", None)  # timm
    if forward is not None:
        tokens = forward(pixels)
        if isinstance(tokens, Tensor) and tokens.ndim == 4:  # Swin: (N, rows, columns, width)
            tokens = tokens.flatten(1, 2)
    else:
        tokens = getattr(backbone(pixels), "last_hidden_state", None)
    if not isinstance(tokens, Tensor) or tokens.ndim != 3:
        raise ConfigurationError(
            f"{type(backbone).__name__} does not return its tokens",
            why="neither forward_features nor last_hidden_state is a tensor of shape (N, tokens, width)",
            fix="use a vision transformer backbone of timm or transformers",
        )
    return tokens
