"""The losses of one step: what the attentions show while the model runs, and what it answers in the end."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from calibration.config import SynthesisConfig
from calibration.losses import class_prior, head_similarity, patch_entropy, total_variation
from calibration.masked import asked_logits, masked_difference, similarity_spread
from calibration.priors import prior_distance
from calibration.pruning import TokenPruner
from calibration.received_attention import attended
from fp8pipe.models.vision.attention import explicit_attention, intercept_attention
from fp8pipe.models.vision.outputs import vision_outputs
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
        model: what runs.
        structure: of it.
        sites: attentions whose heads are compared, by name.
        plain: attentions of a plain transformer by name, for masks; empty without.
        depths: weights of the attentions that have priors; empty without.
        pruner: of tokens, or None.
        config: which terms, with which weights.
    """

    def __init__(
        self,
        model: nn.Module,
        structure: VitStructure,
        sites: dict[str, AttentionSite],
        plain: dict[str, AttentionSite],
        depths: dict[str, float],
        pruner: TokenPruner | None,
        config: SynthesisConfig,
    ) -> None:
        self._model, self._structure, self._config = model, structure, config
        self._sites, self._plain, self._depths, self._pruner = sites, plain, depths, pruner

    def __call__(self, scene: Scene) -> dict[str, Tensor]:
        """Weighted terms by name, each `(N,)` fp32, differentiable in the pixels."""
        config = self._config
        seen = _Seen(self, scene)
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=config.bf16),
            intercept_attention(self._model, self._structure.attention_names, seen.attend),
            self._pruner.active(self._model) if self._pruner else nullcontext(),
        ):
            outputs = vision_outputs(self._model, scene.view)
        terms = seen.terms()
        if self._structure.classes is not None and config.class_weight:
            terms["class"] = config.class_weight * class_prior(outputs, scene.targets)
        if config.variation:
            terms["variation"] = config.variation * total_variation(scene.pixels)
        return terms


class _Seen:
    """What the attentions of one forward show."""

    def __init__(self, owner: Terms, scene: Scene) -> None:
        self._owner, self._config, self._scene = owner, owner._config, scene
        self._found: dict[str, list[Tensor]] = {name: [] for name in ("similarity", "entropy", "spread", "priors")}
        self._asked: list[tuple[Tensor, Tensor]] = []

    def attend(self, name: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        owner, config, site = self._owner, self._config, self._owner._sites.get(name)

        def on_logits(logits: Tensor) -> Tensor:
            if config.maps == "logits":
                self._compare(logits, site)
            if site is not None and config.spread:
                self._found["spread"].append(similarity_spread(logits, site))
            return logits

        def on_probs(probs: Tensor) -> Tensor:
            if config.maps == "probabilities":
                self._compare(probs, site)
            if owner._pruner and name == owner._pruner.site.name:
                owner._pruner.note(probs)
            if name in self._scene.priors:
                distance = prior_distance(attended(probs, owner._plain[name]), self._scene.priors[name])
                self._found["priors"].append(owner._depths[name] * distance)
            return probs

        output = explicit_attention(q, k, v, mask, scale, on_logits=on_logits, on_probs=on_probs)
        if site is not None and config.entropy:
            self._found["entropy"].append(patch_entropy(output, site))
        if config.masked and name in owner._plain:
            self._asked.append(asked_logits(q, k, owner._plain[name], config.masked_bits))
        return output

    def _compare(self, maps: Tensor, site: AttentionSite | None) -> None:
        if site is not None and self._config.similarity:
            absolute = self._config.similarity_form == "absolute"
            self._found["similarity"].append(head_similarity(maps, site, absolute=absolute))

    def terms(self) -> dict[str, Tensor]:
        """Weighted means over layers."""
        config = self._config
        weights = {
            "similarity": config.similarity, "entropy": config.entropy, "spread": config.spread,
            "priors": config.priors,
        }  # fmt: skip
        terms = {name: weights[name] * torch.stack(found).mean(0) for name, found in self._found.items() if found}
        if self._asked and self._scene.draws is not None:
            difference = masked_difference(self._asked, self._scene.progress, self._scene.draws)
            terms["masked"] = config.masked * difference
        return terms
