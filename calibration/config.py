"""The options of the synthesis of calibration images, with the settings of the published method as a preset."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import Field, model_validator

from fp8pipe.core.config import Flag, FrozenConfig

# MimiQ (arXiv 2407.20021): 2,000 steps from white noise.
_PUBLISHED: Final = {
    "steps": 2000, "start": "noise", "canvas": "pixels", "views": "shifts", "learning_rate": 0.1, "variation": 2.5e-5,
    "bf16": False,
}  # fmt: skip


class SynthesisConfig(FrozenConfig):
    """Options of the synthesis: how images are optimised through the frozen model."""

    preset: Literal["default", "published"] = Field(
        "default", description="published: the settings of MimiQ, arXiv 2407.20021; values given explicitly win."
    )
    steps: Annotated[int, Flag("synthesis-steps")] = Field(
        60, ge=0, description="Optimizer steps per synthetic image; 0 keeps the initial image."
    )
    batch_size: int = Field(16, ge=1, description="Images optimised at the same time; each is optimised independently.")
    start: Literal["noise", "leaves"] = Field(
        "leaves", description="Initial image: white noise, or procedural dead leaves."
    )
    canvas: Literal["pyramid", "pixels"] = Field(
        "pyramid", description="What is optimised: an image pyramid, or pixels."
    )
    learning_rate: float = Field(0.08, gt=0, description="Peak rate (normalized units); cosine after.")
    final_rate: float = Field(1e-3, ge=0, description="Rate at the end of the cosine.")
    similarity: float = Field(1.0, ge=0, description="Weight of the inter-head similarity.")
    similarity_form: Literal["squared", "absolute"] = Field("squared", description="SSIM squared, or its magnitude.")
    maps: Literal["logits", "probabilities"] = Field("logits", description="Attention maps that are compared.")
    class_weight: float = Field(1.0, ge=0, description="Weight of the cross-entropy with the image's class.")
    entropy: float = Field(0.0, ge=0, description="Weight of PSAQ-ViT's patch-similarity entropy.")
    variation: float = Field(0.01, ge=0, description="Weight of the total variation.")
    views: Literal["camera", "shifts"] = Field(
        "camera", description="camera: zoomed, rotated, relit; shifts: circular shifts."
    )
    nearest: float = Field(0.6, gt=0, le=1, description="camera: smallest part of the image's side that is shown.")
    jitter: int = Field(
        8, ge=0, description="shifts: largest shift, in pixels, in the first half of the steps; later twice that."
    )
    mirror: bool = Field(False, description="shifts: mirror half of the views.")
    colour: bool = Field(True, description="shifts: MimiQ's decaying colour offset and random contrast.")
    plateau: float = Field(
        0.0, ge=0, lt=1, description="An image stops when its loss falls by less, relatively. 0: off."
    )
    plateau_window: int = Field(10, ge=1, description="plateau: steps averaged and compared with as many before.")
    clamp: bool = Field(True, description="Clamp pixels to the range of a valid image.")
    bf16: bool = Field(True, description="Run the model in bf16; losses and pixels stay fp32.")

    @model_validator(mode="before")
    @classmethod
    def _fill_in_preset(cls, values: Any) -> Any:
        published = isinstance(values, dict) and values.get("preset") == "published"
        return _PUBLISHED | values if published else values
