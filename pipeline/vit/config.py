"""The configuration of `quantize-vit`: frozen pydantic models, stored in the artifact with all defaults resolved."""

from __future__ import annotations

import re
from typing import Annotated, Any, Final, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from calibration.config import SynthesisConfig
from fp8pipe.core.config import CONFIG_ONLY, Flag, FrozenConfig, build_config
from fp8pipe.core.devices import DEVICE_HELP, DeviceName, GpuNeed
from fp8pipe.core.errors import ConfigurationError
from fp8pipe.numerics.kinds import Kind, Precision
from pipeline.tracking.config import ReportTo

_LARGEST_SIDE: Final = 16384
# MimiQ (arXiv 2407.20021): every layer at the requested precision, 10,000 images of 2,000 steps each, no equivalent
# transforms, and 200 epochs of batches of 16 with the two published losses.
_MIMIQ_PAPER: Final[dict[str, Any]] = {
    "images": 10_000, "edges": "same", "rounding": "nearest", "synthesis": {"preset": "published"},
    "conditioning": {"rotate_residual": False, "rotate_heads": False, "centre": False},
    "distill": {"steps": 125_000, "block_weight": 0.0, "save_every": 2500},
}  # fmt: skip
VIT_NEED: Final = GpuNeed("quantize-vit", (8, 0), "bf16")


def parse_image_size(value: Any) -> tuple[int, int]:
    """Parse an image size such as `224` or `96x32` to (height, width) in pixels.

    Raises:
        ValueError: the value has another form, or a side is out of range.
    """
    match = re.fullmatch(r"(\d{1,6})(?:\s*x\s*(\d{1,6}))?", str(value).strip().lower())
    sides = (0, 0) if match is None else (int(match[1]), int(match[2] or match[1]))
    if not all(1 <= side <= _LARGEST_SIDE for side in sides):
        raise ValueError(f"{value!r} is no image size; write 224, or HEIGHTxWIDTH, for instance 96x32")
    return sides


def _spelled(value: Any) -> str | None:
    """The image size in the form `HEIGHTxWIDTH`, in which the configuration stores it."""
    return None if value is None else "{}x{}".format(*parse_image_size(value))


class TransformsConfig(FrozenConfig):
    """The equivalent transforms to apply to the model before quantization; none of them changes its outputs."""

    rotate_residual: bool = Field(True, description="Rotate the residual stream, where the model allows it.")
    rotate_heads: bool = Field(True, description="Rotate queries, keys and values within each head.")
    centre: bool = Field(True, description="Move means of keys, values and norms into biases.")


class DistillConfig(FrozenConfig):
    """Options of the student's distillation."""

    steps: Annotated[int, Flag("distill-steps")] = Field(
        200, ge=0, description="Optimizer steps of distillation; 0 deploys with the measured ranges."
    )
    batch_size: int = Field(16, ge=1, description="Images per step.")
    learning_rate: float = Field(1e-3, gt=0, description="Peak rate of weights, in units of their mean code step.")
    vector_learning_rate: float = Field(
        0.1, ge=0, description="Peak rate of biases, norms and embeddings, in units of the weights' mean code step."
    )
    step_learning_rate: float = Field(1e-3, gt=0, description="Peak rate of the logarithms of quantization steps.")
    warmup_steps: int = Field(10, ge=0, description="Steps of linear warm-up; a cosine to zero follows.")
    temperature: float = Field(
        5.0, gt=0, description="Softens the outputs of teacher and student in the KL divergence."
    )
    structure_weight: float = Field(10.0, ge=0, description="Weight of the head-wise structural loss.")
    block_weight: float = Field(40.0, ge=0, description="Weight of the relative squared error of block outputs.")
    clip_norm: float = Field(1.0, gt=0, description="Global gradient norm limit.")
    augment: bool = Field(
        True,
        description="Mirror, crop, blur and relight the images in each step, and synthetic ones before calibration.",
    )
    smallest_crop: float = Field(0.35, gt=0, le=1, description="Side of the smallest crop, relative to the image's.")
    blur: float = Field(
        0.027, ge=0, lt=0.25, description="Strongest blur: standard deviation, relative to the image's side."
    )
    colour: float = Field(0.4, ge=0, lt=1, description="Strongest change of contrast, brightness and colourfulness.")
    bf16: bool = Field(True, description="Products in bf16 while training; ranges and rounding stay fp32.")
    save_every: int = Field(50, ge=0, description="Steps between checkpoints; 0 keeps none before the end.")


class QuantizeVitConfig(FrozenConfig):
    """The configuration of `quantize-vit`: model, precision, calibration images, and options of each part."""

    model: str = Field(description="Vision model: directory, timm:NAME or sample:NAME.")
    bits: str = Field(description="wXaY with 2 to 8 bits each, wfp8afp8, or wnvfp4anvfp4.")
    preset: Literal["default", "mimiq-paper"] = Field(
        "default", description="mimiq-paper: the settings of MimiQ's tables; values given explicitly win."
    )
    calibration: str = Field(
        "synthetic", description="synthetic, patch-similarity, gaussian, images:DIR or artifact:DIR."
    )
    image_size: Annotated[str | None, BeforeValidator(_spelled), Flag(default="the preprocessing's")] = Field(
        None, description="Pixels of the model's images, 224 or HEIGHTxWIDTH, in place of the checkpoint's own."
    )
    images: int = Field(128, ge=1, description="Calibration images.")
    edges: Literal["8bit", "same"] = Field("8bit", description="Precision of patch embedding and head below 8 bits.")
    allocation: Literal["even", "sensitivity"] = Field(
        "even",
        description="Bits of activations below 8: even, or more where outputs depend on them, at the same cost.",
    )
    seed: int = Field(0, ge=0, description="Seed of images, order and augmentation.")
    device: DeviceName = Field("auto", description=DEVICE_HELP)
    synthesis: SynthesisConfig = Field(
        default_factory=lambda: build_config(SynthesisConfig, {}), description="How synthetic images are made."
    )
    conditioning: TransformsConfig = Field(
        default_factory=lambda: build_config(TransformsConfig, {}), description="Equivalent transforms before rounding."
    )
    rounding: Annotated[Literal["nearest", "compensated"], CONFIG_ONLY] = Field(
        "compensated", description="First rounding of weights; compensated: later columns make up for earlier ones."
    )
    head_activation: Literal["auto", "softmax", "sigmoid", "none"] = Field(
        "auto", description="How outputs become probabilities; auto: as the model's files say it was trained."
    )
    evaluate: str | None = Field(
        None, description="Folder of labelled pictures (one folder per class) to measure accuracy on."
    )
    distill: DistillConfig = Field(default_factory=lambda: build_config(DistillConfig, {}), description="Distillation.")
    report_to: ReportTo = ()

    @model_validator(mode="before")
    @classmethod
    def _fill_in_preset(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("preset") != "mimiq-paper":
            return values
        filled = _MIMIQ_PAPER | values
        for name, wanted in _MIMIQ_PAPER.items():
            if isinstance(wanted, dict) and isinstance(filled[name], dict):
                filled[name] = wanted | filled[name]
        return filled

    @field_validator("bits")
    @classmethod
    def _known_precision(cls, value: str) -> str:
        try:
            return str(Precision.parse(value))
        except ConfigurationError as error:
            raise ValueError(f"{error}") from error

    @model_validator(mode="after")
    def _ends_of_nvfp4(self) -> QuantizeVitConfig:
        if self.edges == "same" and self.precision.kind is Kind.NVFP4:
            raise ValueError("edges: NVFP4 keeps patch embedding and head in FP8; leave it at 8bit")
        return self

    @model_validator(mode="after")
    def _few_integer_bits(self) -> QuantizeVitConfig:
        few = self.precision.kind is Kind.INT and self.precision.activation_bits < 8
        if self.allocation == "sensitivity" and not few:
            raise ValueError("allocation: sensitivity needs activations in integers of fewer than 8 bits, such as w4a4")
        return self

    @property
    def activation(self) -> Literal["softmax", "sigmoid", "none"] | None:
        """The configured activation of the model's outputs; None to use the one in the model's files."""
        return None if self.head_activation == "auto" else self.head_activation

    @property
    def size(self) -> tuple[int, int] | None:
        """(height, width) in pixels given by `image_size`; None to use that of the checkpoint."""
        return None if self.image_size is None else parse_image_size(self.image_size)

    @property
    def gpu_need(self) -> GpuNeed:
        """The GPU features that synthesis and distillation require: bf16, unless it is turned off for both."""
        return VIT_NEED if self.synthesis.bf16 or self.distill.bf16 else GpuNeed(VIT_NEED.work)

    @property
    def precision(self) -> Precision:
        """The parsed `bits`."""
        return Precision.parse(self.bits)
