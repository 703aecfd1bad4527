"""The weighted losses of one synthesis step, from the attentions during the forward pass and from the output."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from calibration.config import SynthesisConfig
from calibration.losses import class_prior, head_similarity, patch_entropy, total_variation
from fp8pipe.core.errors import ConfigurationError
from fp8pipe.models.vision.attention import explicit_attention, intercept_attention
from fp8pipe.models.vision.prepare import vision_outputs
from fp8pipe.models.vision.structure import AttentionSite, VitStructure


@dataclass(frozen=True, slots=True)
class Scene:
    """The input of one synthesis step."""

    pixels: Tensor  # the images themselves, `(N, 3, H, W)`
    view: Tensor  # the random views of the images that the model sees, same shape
    targets: Tensor  # `(N,)` int64 classes


class Terms:
    """Computes losses through a frozen model.

    Args:
        model: the model; not changed.
        structure: the model's structure.
        config: which terms, with which weights.

    Raises:
        ConfigurationError: the model has no attention maps to compare.
    """

    def __init__(self, model: nn.Module, structure: VitStructure, config: SynthesisConfig) -> None:
        self._model = copy.deepcopy(model) if config.bf16 else model
        for module in self._model.modules() if config.bf16 else ():
            if type(module) is nn.Linear:  # converted once, because autocast would convert the weights in every step
                module.to(torch.bfloat16)
        self._structure, self.config = structure, config
        self._device = next(model.parameters()).device
        # The attentions whose heads are compared, by name.
        self.sites = {site.name: site for site in structure.attentions if not site.pools and site.heads > 1}
        if not self.sites and config.similarity > 0:
            raise ConfigurationError(
                "this model has no attention with several heads",
                why="the synthesis compares the maps of different heads",
                fix="use --calibration gaussian or images:DIR",
            )

    def __call__(self, scene: Scene) -> dict[str, Tensor]:
        """Weighted loss terms by name, each `(N,)` fp32, differentiable with respect to the pixels."""
        config = self.config
        seen = _Seen(self)
        with (
            torch.autocast(self._device.type, torch.bfloat16, enabled=config.bf16),
            intercept_attention(self._model, self._structure.attention_names, seen.attend),
        ):
            outputs = vision_outputs(self._model, scene.view)
        terms = seen.terms()
        if self._structure.classes is not None and config.class_weight:
            terms["class"] = config.class_weight * class_prior(outputs, scene.targets)
        if config.variation:
            terms["variation"] = config.variation * total_variation(scene.pixels)
        return terms


class _Seen:
    """Collects loss terms from the attentions during one forward pass."""

    def __init__(self, owner: Terms) -> None:
        self._owner, self._config = owner, owner.config
        self._found: dict[str, list[Tensor]] = {name: [] for name in ("similarity", "entropy")}

    def attend(self, name: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        # Compute one attention for the model, and collect the loss terms that depend on it.
        config, site = self._config, self._owner.sites.get(name)

        def on_logits(logits: Tensor) -> Tensor:
            if config.maps == "logits":
                self._compare(logits, site)
            return logits

        def on_probs(probs: Tensor) -> Tensor:
            if config.maps == "probabilities":
                self._compare(probs, site)
            return probs

        output = explicit_attention(q, k, v, mask, scale, on_logits=on_logits, on_probs=on_probs)
        if site is not None and config.entropy:
            self._found["entropy"].append(patch_entropy(output, site))
        return output

    def _compare(self, maps: Tensor, site: AttentionSite | None) -> None:
        if site is not None and self._config.similarity:
            absolute = self._config.similarity_form == "absolute"
            self._found["similarity"].append(head_similarity(maps, site, absolute=absolute))

    def terms(self) -> dict[str, Tensor]:
        """The collected loss terms: weighted means over layers."""
        found = {name: torch.stack(parts).mean(0) for name, parts in self._found.items() if parts}
        return {name: getattr(self._config, name) * mean for name, mean in found.items()}
