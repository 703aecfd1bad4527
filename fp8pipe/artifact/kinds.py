"""The kinds of artifact: what each manifest holds beyond the common fields, and how older manifests of it are read.

A kind is registered once, by whoever writes it. The kinds of this module are what training and quantization leave;
exports are registered by the room that owns export targets, which is imported by name when a kind is first asked for
that is not known here, so that nothing below it depends on it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from pydantic import Field

from fp8pipe.core.config import FrozenConfig
from fp8pipe.core.errors import BadArtifactError, ConfigurationError

__all__ = [
    "FALQON_KIND", "LORA_KIND", "TUNED_KINDS", "VIT_KIND", "ArtifactKind", "Details", "TunedDetails", "VitDetails",
    "kind_named", "register_kind", "targets_of", "unregister_kind",
]  # fmt: skip

# The module whose `load()` registers the kinds of a room above.
_REGISTRY: Final = "exporters.target"
FALQON_KIND: Final = "falqon"
LORA_KIND: Final = "lora-merged"
TUNED_KINDS: Final = (FALQON_KIND, LORA_KIND)
VIT_KIND: Final = "vit"


class Details(FrozenConfig):
    """Facts particular to a kind."""


Migration = Callable[[dict[str, Any]], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class ArtifactKind:
    """One kind of artifact.

    `migrate` turns a manifest of schema 1 or 2, whose common fields are converted already and whose `details` are the
    free dictionary of then, into one of today; it may name another kind. What follows it is said of exports.
    """

    name: str  # as in manifests
    details: type[Details]  # the model of its own facts
    migrate: Migration = lambda data: data
    made_from: tuple[str, ...] = ()  # kinds of artifact
    target: str = ""  # the `--target` that writes it
    engines: tuple[str, ...] = ()  # those that can prove it
    measured_by: tuple[str, ...] = ()  # commands that measure or ask it


_kinds: dict[str, ArtifactKind] = {}


def register_kind(kind: ArtifactKind) -> None:
    """Make a kind known.

    Raises:
        ConfigurationError: another one of that name is registered.
    """
    if _kinds.setdefault(kind.name, kind) is not kind:
        raise ConfigurationError(
            f"the artifact kind {kind.name!r} is registered twice", why="names of kinds are unique",
            fix="choose another name",
        )  # fmt: skip


def unregister_kind(name: str) -> None:
    """Forget a kind."""
    _kinds.pop(name, None)


def _all_kinds() -> Mapping[str, ArtifactKind]:
    importlib.import_module(_REGISTRY).load()
    return _kinds


def kind_named(name: str, where: str = "") -> ArtifactKind:
    """The kind of that name.

    Raises:
        BadArtifactError: there is none.
    """
    kind = _kinds.get(name) or _all_kinds().get(name)
    if kind is None:
        raise BadArtifactError(
            f"{where or 'the manifest'} is of the unknown kind {name!r}",
            why=f"known kinds: {', '.join(sorted(_kinds))}",
            fix="use the version of fp8pipe, or install the package, that wrote it",
        )  # fmt: skip
    return kind


def targets_of(kind: str) -> list[str]:
    """What `--target` may be for an artifact of a kind, the usual one first."""
    return list(dict.fromkeys(found.target for found in _all_kinds().values() if kind in found.made_from))


class HeldoutLoss(FrozenConfig):
    """Mean loss on held-out text, nats per answer token."""

    untuned: float = Field(description="of the model before tuning")
    deployed: float = Field(description="of the weights that are stored")


class MergeHealth(FrozenConfig):
    """What merging the update into FP8 codes did."""

    changed: float = Field(description="share of codes that changed")
    saturated: float = Field(description="share of targets beyond the grid's largest value")
    norm_ratio: float = Field(description="norm of the change applied over that of the change intended")
    cosine: float = Field(description="between the two")


class TextFacts(FrozenConfig):
    """Records of the training text."""

    records: int = Field(ge=0, description="all of them")
    train: int = Field(ge=0, description="trained on")
    heldout: int = Field(ge=0, description="kept for evaluation")


class PackingFacts(FrozenConfig):
    """How several examples shared a row of training and evaluation, and what a probe of the loaded model said."""

    how: Literal["positions", "mask", "off"] = Field(
        description="what keeps examples apart: restarting positions, a mask per example, or that none share a row"
    )
    moved: float | None = Field(
        default=None,
        description="how far, with restarting positions alone, another neighbour moved an example's logits; "
        "part of what its own first token does",
    )
    apart: float | None = Field(default=None, description="and how far they were from those of the example alone")
    reason: str = Field(default="", description="why examples share no row although packing was asked for")


class TunedDetails(Details):
    """Of a fine-tuned language model."""

    adapter: str = Field(description="what became of the adapter: flushed into FP8 codes, or merged into bf16 weights")
    rule: str | None = Field(default=None, description="FALQON's update rule")
    rank: int | None = Field(default=None, description="of the adapter")
    base_dtype: str | None = Field(default=None, description="of activations and unconverted weights")
    transposed: list[str] = Field(default_factory=list, description="weights stored as (in, out)")
    data: TextFacts | None = Field(default=None, description="the training text")
    packing: PackingFacts | None = Field(default=None, description="examples that share a row")
    stop_token_added: int | None = Field(
        default=None,
        description="end-of-turn token of the chat template that eos_token_id of generation_config.json names here and "
        "did not name in the base model",
    )
    final_merge: MergeHealth | None = Field(default=None, description="what the final merge did, over all layers")
    final_merge_layers: dict[str, MergeHealth] = Field(default_factory=dict, description="the same, by layer")
    heldout_loss: HeldoutLoss | None = Field(default=None, description="before and after")


class TopK(FrozenConfig):
    """Accuracy of one model."""

    top1: float = Field(description="share of pictures whose class is the first answer")
    top5: float = Field(description="share of pictures whose class is among the first five answers")


class Accuracy(FrozenConfig):
    """Accuracy on labelled pictures."""

    images: int = Field(ge=0, description="pictures")
    teacher: TopK = Field(description="of the original model")
    quantized: TopK = Field(description="of the quantized one")


class TransformFacts(FrozenConfig):
    """Equivalent transforms of the float model before quantization."""

    done: list[str] = Field(default_factory=list, description="what was done, in words")
    left_out: list[str] = Field(default_factory=list, description="what could not be done, and why")


class FirstLast(FrozenConfig):
    """A loss at both ends of training."""

    first: float = Field(description="at the first step")
    last: float = Field(description="at the last step")


class VitDetails(Details):
    """Of a quantized vision transformer."""

    precision: str = Field(description="as given: wXaY, wfp8afp8 or wnvfp4anvfp4")
    edges: str = Field(default="8bit", description="precision of the first and the last layer")
    images: int = Field(ge=0, description="calibration images")
    image_method: str = Field(description="what made them")
    image_losses: dict[str, float] = Field(default_factory=dict, description="mean last value of each synthesis loss")
    seconds: dict[str, float] = Field(default_factory=dict, description="wall time by step")
    seconds_per_image: float | None = Field(default=None, description="wall time of synthesis per image")
    transforms: TransformFacts = Field(default_factory=TransformFacts, description="equivalent transforms")
    loss: FirstLast | None = Field(default=None, description="of distillation; none where nothing was trained")
    accuracy: Accuracy | None = Field(default=None, description="on held-out labelled pictures, where they were given")


def renamed(details: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Details of an older schema under the names of today."""
    return {names.get(key, key): value for key, value in details.items()}


def _migrate_tuned(data: dict[str, Any]) -> dict[str, Any]:
    details = renamed(data["details"], {"last_flush": "final_merge", "last_flush_layers": "final_merge_layers"})
    details.setdefault("adapter", "flushed" if data["kind"] == FALQON_KIND else "merged")
    tensorwise = details.get("rule") == "released"
    rule = "amax" if tensorwise else "power-of-two"
    per = "per-tensor" if tensorwise else "per-token"
    for layer in data["layers"]:
        if layer.get("weight") is not None:
            layer["weight"] |= {"scale_rule": rule}
            layer["activation"] = {"format": "e4m3", "bits": 8, "granularity": per, "scale_rule": rule, "dynamic": True}
    return data | {"details": details}


def _migrate_vit(data: dict[str, Any]) -> dict[str, Any]:
    return data | {"details": renamed(data["details"], {"conditioning": "transforms"})}


for _name in TUNED_KINDS:
    register_kind(ArtifactKind(_name, TunedDetails, _migrate_tuned))
register_kind(ArtifactKind(VIT_KIND, VitDetails, _migrate_vit))
