"""The registry of artifact kinds, with the type of `details` in their manifests and the migration of older manifests.

The kinds written by training and quantization are defined and registered here, those of exports in `exporters.target`.
This package must not import exporters. The registry therefore loads that module by its name, when a kind is looked up
that is not registered yet.
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
    "FALQON_KIND", "LORA_KIND", "TUNED_KINDS", "VIT_KIND", "ArtifactKind", "Details", "KvAmax", "KvCacheFacts",
    "TunedDetails", "VitDetails", "kind_named", "register_kind", "targets_of", "unregister_kind",
]  # fmt: skip

# The module whose function `load()` registers the kinds of exports.
_REGISTRY: Final = "exporters.target"
FALQON_KIND: Final = "falqon"
LORA_KIND: Final = "lora-merged"
TUNED_KINDS: Final = (FALQON_KIND, LORA_KIND)
VIT_KIND: Final = "vit"


class Details(FrozenConfig):
    """Base class of `details`, the fields of a manifest that depend on the artifact's kind."""


Migration = Callable[[dict[str, Any]], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class ArtifactKind:
    """One kind of artifact. The fields after `migrate` are set only for exports.

    The function `migrate` converts a manifest of schema 1 or 2, given as plain data, to the current schema. The fields
    that are common to all kinds have been converted before; `details` is still an untyped dictionary. The function may
    also change the kind.
    """

    name: str  # value of `kind` in manifests
    details: type[Details]  # type of `details` in manifests
    migrate: Migration = lambda data: data
    made_from: tuple[str, ...] = ()  # kinds of artifacts from which it can be exported
    target: str = ""  # value of `--target` with which it is exported
    engines: tuple[str, ...] = ()  # engines with which it can be validated
    measured_by: tuple[str, ...] = ()  # commands that measure it (benchmarks and queries)


_kinds: dict[str, ArtifactKind] = {}


def register_kind(kind: ArtifactKind) -> None:
    """Register a kind.

    Raises:
        ConfigurationError: another kind with the same name is registered.
    """
    if _kinds.setdefault(kind.name, kind) is not kind:
        raise ConfigurationError(
            f"the artifact kind {kind.name!r} is registered twice", why="names of kinds are unique",
            fix="choose another name",
        )  # fmt: skip


def unregister_kind(name: str) -> None:
    """Remove a kind from the registry."""
    _kinds.pop(name, None)


def _all_kinds() -> Mapping[str, ArtifactKind]:
    importlib.import_module(_REGISTRY).load()
    return _kinds


def kind_named(name: str, where: str = "") -> ArtifactKind:
    """Look up a kind by name.

    Args:
        name: value of `kind` in a manifest.
        where: description of the manifest in the error message.

    Raises:
        BadArtifactError: no such kind is registered.
    """
    kind = _kinds.get(name) or _all_kinds().get(name)
    if kind is None:
        raise BadArtifactError(
            f"{where or 'the manifest'} is of unknown kind {name!r}",
            why=f"known kinds: {', '.join(sorted(_kinds))}",
            fix="use the version of fp8pipe, or install the package, that wrote it",
        )  # fmt: skip
    return kind


def targets_of(kind: str) -> list[str]:
    """Values of `--target` for exporting an artifact of this kind, the default first."""
    return list(dict.fromkeys(found.target for found in _all_kinds().values() if kind in found.made_from))


class HeldoutLoss(FrozenConfig):
    """Mean loss on held-out text, in nats per answer token."""

    untuned: float = Field(description="loss of the model before fine-tuning")
    deployed: float = Field(description="loss of the weights that are stored")


class MergeHealth(FrozenConfig):
    """How closely the change of the weights by the final merge matches the intended update of the weights."""

    changed: float = Field(description="share of codes that changed")
    saturated: float = Field(description="share of target values beyond the largest value of the grid")
    norm_ratio: float = Field(description="norm of the applied change divided by the norm of the intended change")
    cosine: float = Field(description="cosine similarity of the applied and the intended change")


class TextFacts(FrozenConfig):
    """Number of records in the training text."""

    records: int = Field(ge=0, description="all records")
    train: int = Field(ge=0, description="records that were trained on")
    heldout: int = Field(ge=0, description="records held out for evaluation")


class PackingFacts(FrozenConfig):
    """How several examples are packed into one sequence, and the test with which this was checked on the model."""

    how: Literal["positions", "mask", "off"] = Field(
        description="what isolates packed examples: restarting positions, or a mask per example; off: no packing"
    )
    moved: float | None = Field(
        default=None,
        description="with restarting positions alone: largest change of an example's logits when a neighbour changes, "
        "relative to the change that its own first token causes",
    )
    apart: float | None = Field(
        default=None,
        description="likewise: largest difference between an example's logits in a packed row and when it is run alone",
    )
    reason: str = Field(default="", description="why packing is off although it was requested")


class KvAmax(FrozenConfig):
    """Largest magnitudes of one layer's keys and values, as they enter the key/value cache."""

    layer: int = Field(ge=0, description="index of the layer in the cache")
    k: float = Field(ge=0, allow_inf_nan=False, description="amax of the keys, after the rotary embedding")
    v: float = Field(ge=0, allow_inf_nan=False, description="amax of the values")


class KvCacheFacts(FrozenConfig):
    """What an FP8 key/value cache needs and costs, measured on the weights that are stored."""

    records: int = Field(ge=1, description="training records that the ranges were measured on")
    tokens: int = Field(ge=1, description="tokens of these records")
    amax: dict[str, KvAmax] = Field(description="ranges by attention layer, as the checkpoint names it")
    heldout_tokens: int = Field(ge=0, description="answer tokens of the held-out records behind both losses")
    loss: float = Field(description="their mean loss, nats per answer token")
    fp8_loss: float = Field(description="the same with keys and values rounded to E4M3, scale = amax / 448")
    error: float | None = Field(
        default=None, description="standard error of the difference of both, nats; none for a single batch"
    )


class TunedDetails(Details):
    """Details of a fine-tuned language model."""

    adapter: str = Field(description="what became of it: flushed into FP8 or NVFP4 codes, or merged into bf16 weights")
    rule: str | None = Field(default=None, description="FALQON's update rule")
    rank: int | None = Field(default=None, description="rank of the adapter")
    base_dtype: str | None = Field(default=None, description="dtype of activations and unconverted weights")
    transposed: list[str] = Field(default_factory=list, description="weights stored as (in, out)")
    data: TextFacts | None = Field(default=None, description="the training text")
    packing: PackingFacts | None = Field(default=None, description="packing of examples into sequences")
    stop_token_added: int | None = Field(
        default=None,
        description="end-of-turn token of the chat template that eos_token_id of generation_config.json names here and "
        "did not name in the base model",
    )
    final_merge: MergeHealth | None = Field(default=None, description="the final merge, over all layers")
    final_merge_layers: dict[str, MergeHealth] = Field(default_factory=dict, description="the same, by layer")
    heldout_loss: HeldoutLoss | None = Field(default=None, description="before and after fine-tuning")
    kv_cache: KvCacheFacts | None = Field(default=None, description="ranges for, and cost of, an FP8 key/value cache")


class TopK(FrozenConfig):
    """Top-1 and top-5 accuracy of one model."""

    top1: float = Field(description="share of images whose label is the top prediction")
    top5: float = Field(description="share of images whose label is among the top five predictions")


class Accuracy(FrozenConfig):
    """Accuracy on labelled images."""

    images: int = Field(ge=0, description="number of images")
    teacher: TopK = Field(description="accuracy of the original model")
    quantized: TopK = Field(description="accuracy of the quantized model")


class TransformFacts(FrozenConfig):
    """Transforms of the model before quantization that do not change the function it computes."""

    done: list[str] = Field(default_factory=list, description="transforms that were applied")
    left_out: list[str] = Field(default_factory=list, description="transforms that could not be applied, and why")


class FirstLast(FrozenConfig):
    """A loss at the first and at the last step of training."""

    first: float = Field(description="at the first step")
    last: float = Field(description="at the last step")


class VitDetails(Details):
    """Details of a quantized vision transformer."""

    precision: str = Field(description="as given: wXaY, wfp8afp8 or wnvfp4anvfp4")
    edges: str = Field(default="8bit", description="precision of the first and the last layer")
    allocation: str = Field(default="even", description="how bits of activations are shared out: even or sensitivity")
    images: int = Field(ge=0, description="calibration images")
    image_method: str = Field(description="how the calibration images were made")
    image_losses: dict[str, float] = Field(
        default_factory=dict, description="final value of each synthesis loss, mean over images"
    )
    seconds: dict[str, float] = Field(default_factory=dict, description="wall time by step")
    seconds_per_image: float | None = Field(default=None, description="wall time of synthesis per image")
    transforms: TransformFacts = Field(default_factory=TransformFacts, description="equivalent transforms")
    loss: FirstLast | None = Field(default=None, description="distillation loss; none where nothing was distilled")
    accuracy: Accuracy | None = Field(default=None, description="on held-out labelled images, where they were given")


def renamed(details: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """`details` of an older schema, with keys renamed according to `names` (old name to new name)."""
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
