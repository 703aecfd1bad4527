"""How synthetic images are made: a frozen configuration, and the published settings as a preset."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fp8pipe.config import FrozenConfig, build_config


class SynthesisConfig(FrozenConfig):
    """Optimisation of pixels through the frozen model."""

    steps: int = Field(100, ge=0, description="Optimizer steps an image; 0 keeps what it starts from.")
    batch_size: int = Field(16, ge=1, description="Images optimised together; does not change them.")
    start: Literal["noise", "leaves"] = Field("leaves", description="White noise, or procedural dead leaves.")
    learning_rate: float = Field(0.05, gt=0, description="Peak rate of the pixels (normalized units); cosine after.")
    final_rate: float = Field(1e-3, ge=0, description="Rate at the end of the cosine.")
    similarity: float = Field(1.0, ge=0, description="Weight of the inter-head similarity.")
    similarity_form: Literal["squared", "absolute"] = Field("squared", description="SSIM squared, or its magnitude.")
    maps: Literal["logits", "probabilities"] = Field("logits", description="Attention maps that are compared.")
    class_weight: float = Field(1.0, ge=0, description="Weight of the cross-entropy with the image's class.")
    entropy: float = Field(0.0, ge=0, description="Weight of PSAQ-ViT's patch-similarity entropy.")
    variation: float = Field(2.5e-5, ge=0, description="Weight of the total variation.")
    jitter: int = Field(8, ge=0, description="Largest circular shift in the first half, pixels; twice that later.")
    mirror: bool = Field(True, description="Mirror half of the views.")
    colour: bool = Field(False, description="MimiQ's decaying colour offset and random contrast of each view.")
    clamp: bool = Field(True, description="Keep pixels those of a valid image.")
    bf16: bool = Field(True, description="Run the model in bf16; losses and pixels stay fp32.")


def mimiq_published() -> SynthesisConfig:
    """The settings of the published method (arXiv 2407.20021): 2,000 steps from white noise."""
    return build_config(
        SynthesisConfig,
        {"steps": 2000, "start": "noise", "learning_rate": 0.1, "mirror": False, "colour": True, "bf16": False},
    )
