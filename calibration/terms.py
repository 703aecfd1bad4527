"""All losses of one step of synthesis, weighted: from the attentions while the model runs, and from its output."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from calibration.config import SynthesisConfig
from calibration.losses import (
    class_prior,
    deeper_half,
    global_sites,
    head_similarity,
    masked_difference,
    patch_entropy,
    prior_distance,
    query_logits,
    received_attention,
    similarity_spread,
    total_variation,
)
from calibration.pruning import TokenPruner
from fp8pipe.core.errors import ConfigurationError
from fp8pipe.models.vision.attention import explicit_attention, intercept_attention
from fp8pipe.models.vision.prepare import vision_outputs
from fp8pipe.models.vision.structure import AttentionSite, VitStructure


@dataclass(frozen=True, slots=True)
class Scene:
    """What one step looks at.

    Attributes:
        pixels: the images themselves, `(N, 3, H, W)`.
        view: what the model is shown of them, same shape.
        targets: `(N,)` int64 classes, or `(N, C)` fp32 soft ones.
        progress: from 0 at the first step to 1 after the last.
        priors: maps by attention, each `(N, H, P)`; empty without the term.
        draws: `(N, P)` uniform, for the random part of masks; None without the term.
    """

    pixels: Tensor
    view: Tensor
    targets: Tensor
    progress: float
    priors: dict[str, Tensor]
    draws: Tensor | None


class Terms:
    """Computes losses through a frozen model.

    Args:
        model: what runs; not changed.
        structure: of it.
        config: which terms, with which weights.

    Attributes:
        sites: attentions whose heads are compared, by name.
        global_sites: for masks and priors, attentions that see all patches, by name; empty without these terms.
        depths: weights of the attentions that have priors; empty without.
        pruner: of tokens, or None.

    Raises:
        ConfigurationError: a model whose attentions show no maps, or one that an option does not fit.
    """

    def __init__(self, model: nn.Module, structure: VitStructure, config: SynthesisConfig) -> None:
        self._model = _halved(model) if config.bf16 else model
        self._structure, self.config = structure, config
        self.sites = {site.name: site for site in structure.attentions if not site.pools and site.heads > 1}
        if not self.sites and config.similarity > 0:
            raise ConfigurationError(
                "this model has no attention with several heads",
                why="the synthesis compares the maps of different heads",
                fix="use --calibration gaussian or images:DIR",
            )
        if config.regions and structure.classes is None:
            raise ConfigurationError(
                "regions need a model with classes",
                why="each quarter of an image is made for a class, and this model is a backbone",
                fix="leave regions at 0",
            )
        wishes = [name for name in ("masked", "priors") if getattr(config, name)]
        self.global_sites = global_sites(structure, " and ".join(wishes)) if wishes else {}
        self.depths = deeper_half(list(self.global_sites)) if config.priors else {}
        self.pruner = TokenPruner(model, structure, config.prune_after, config.keep) if config.keep < 1 else None

    def __call__(self, scene: Scene) -> dict[str, Tensor]:
        """Weighted terms by name, each `(N,)` fp32, differentiable in the pixels."""
        config = self.config
        seen = _Seen(self, scene)
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=config.bf16),
            intercept_attention(self._model, self._structure.attention_names, seen.attend),
            self.pruner.active(self._model) if self.pruner else nullcontext(),
        ):
            outputs = vision_outputs(self._model, scene.view)
        terms = seen.terms()
        if self._structure.classes is not None and config.class_weight:
            terms["class"] = config.class_weight * class_prior(outputs, scene.targets)
        if config.variation:
            terms["variation"] = config.variation * total_variation(scene.pixels)
        return terms


def _halved(model: nn.Module) -> nn.Module:
    """A copy whose linears hold the bf16 weights that autocast would otherwise make anew at every step."""
    copied = copy.deepcopy(model)
    for module in copied.modules():
        if type(module) is nn.Linear:
            module.to(torch.bfloat16)
    return copied


class _Seen:
    """What the attentions of one forward show."""

    def __init__(self, owner: Terms, scene: Scene) -> None:
        self._owner, self._config, self._scene = owner, owner.config, scene
        self._found: dict[str, list[Tensor]] = {name: [] for name in ("similarity", "entropy", "spread", "priors")}
        self._query_logits: list[tuple[Tensor, Tensor]] = []

    def attend(self, name: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        owner, config, site = self._owner, self._config, self._owner.sites.get(name)

        def on_logits(logits: Tensor) -> Tensor:
            if config.maps == "logits":
                self._compare(logits, site)
            if site is not None and config.spread:
                self._found["spread"].append(similarity_spread(logits, site))
            return logits

        def on_probs(probs: Tensor) -> Tensor:
            if config.maps == "probabilities":
                self._compare(probs, site)
            if owner.pruner and name == owner.pruner.site.name:
                owner.pruner.note(probs)
            if name in self._scene.priors:
                shares = received_attention(probs, owner.global_sites[name])
                distance = prior_distance(shares, self._scene.priors[name])
                self._found["priors"].append(owner.depths[name] * distance)
            return probs

        output = explicit_attention(q, k, v, mask, scale, on_logits=on_logits, on_probs=on_probs)
        if site is not None and config.entropy:
            self._found["entropy"].append(patch_entropy(output, site))
        if config.masked and name in owner.global_sites:
            self._query_logits.append(query_logits(q, k, owner.global_sites[name], config.masked_bits))
        return output

    def _compare(self, maps: Tensor, site: AttentionSite | None) -> None:
        if site is not None and self._config.similarity:
            absolute = self._config.similarity_form == "absolute"
            self._found["similarity"].append(head_similarity(maps, site, absolute=absolute))

    def terms(self) -> dict[str, Tensor]:
        """Weighted means over layers."""
        config = self._config
        found = {name: torch.stack(parts).mean(0) for name, parts in self._found.items() if parts}
        terms = {name: getattr(config, name) * mean for name, mean in found.items()}
        if self._query_logits and self._scene.draws is not None:
            difference = masked_difference(self._query_logits, self._scene.progress, self._scene.draws)
            terms["masked"] = config.masked * difference
        return terms
