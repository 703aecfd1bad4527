"""The weighted losses of one synthesis step, from the attentions during the forward pass and from the model's output.

Optionally, tokens are pruned: after a given block, the patches that receive least attention are removed from the
forward pass. Patches that receive hardly any attention cost as much as the others, but have little effect on the image.
(Token pruning in model inversion: "Sparse Model Inversion", ICML 2024.) Patches are scored by that block's own
attention, see `received_attention`; the remaining patches are chosen for each image and keep their order.

Whether a model supports this is tested by running it: the blocks after the given one must not use positions (windows,
position biases, rotary embeddings), so permuting the patches there must not change the model's output, and the model
must run without some of them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Final

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
from fp8pipe.core.errors import ConfigurationError, first_line
from fp8pipe.models.vision.attention import explicit_attention, intercept_attention
from fp8pipe.models.vision.prepare import vision_outputs
from fp8pipe.models.vision.structure import AttentionSite, VitStructure


@dataclass(frozen=True, slots=True)
class Scene:
    """The input of one synthesis step."""

    pixels: Tensor  # the images themselves, `(N, 3, H, W)`
    view: Tensor  # the random views of the images that the model sees, same shape
    targets: Tensor  # `(N,)` int64 classes, or `(N, C)` fp32 soft targets
    progress: float  # from 0 at the first step to 1 after the last
    priors: dict[str, Tensor]  # target maps by attention, each `(N, H, P)`; empty without that term
    draws: Tensor | None  # `(N, P)` uniform random numbers for dropping patches from masks; None without that term


class Terms:
    """Computes losses through a frozen model.

    Args:
        model: the model; not changed.
        structure: the model's structure.
        config: which terms, with which weights.

    Raises:
        ConfigurationError: the model has no attention maps to compare, or does not support a configured option.
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
        if config.regions and structure.classes is None:
            raise ConfigurationError(
                "regions need a model with classes",
                why="each quarter of an image is made for a class, and this model has no classes",
                fix="leave regions at 0",
            )
        wishes = [name for name in ("masked", "priors") if getattr(config, name)]
        # For masks and priors: attentions over all patches, by name; empty without these terms.
        self.global_sites = global_sites(structure, " and ".join(wishes)) if wishes else {}
        # Loss weights of the attentions that have priors; empty without priors.
        self.depths = deeper_half(list(self.global_sites)) if config.priors else {}
        self.pruner = TokenPruner(model, structure, config.prune_after, config.keep) if config.keep < 1 else None

    def __call__(self, scene: Scene) -> dict[str, Tensor]:
        """Weighted loss terms by name, each `(N,)` fp32, differentiable with respect to the pixels."""
        config = self.config
        seen = _Seen(self, scene)
        with (
            torch.autocast(self._device.type, torch.bfloat16, enabled=config.bf16),
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


class _Seen:
    """Collects loss terms from the attentions during one forward pass."""

    def __init__(self, owner: Terms, scene: Scene) -> None:
        self._owner, self._config, self._scene = owner, owner.config, scene
        self._found: dict[str, list[Tensor]] = {name: [] for name in ("similarity", "entropy", "spread", "priors")}
        self._query_logits: list[tuple[Tensor, Tensor]] = []

    def attend(self, name: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        # Compute one attention for the model, and collect the loss terms that depend on it.
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
        """The collected loss terms: weighted means over layers."""
        config = self._config
        found = {name: torch.stack(parts).mean(0) for name, parts in self._found.items() if parts}
        terms = {name: getattr(config, name) * mean for name, mean in found.items()}
        if self._query_logits and self._scene.draws is not None:
            difference = masked_difference(self._query_logits, self._scene.progress, self._scene.draws)
            terms["masked"] = config.masked * difference
        return terms


# Largest change of the output relative to the largest output when patches are permuted. The different summation order
# in fp32 changes it by less, the use of positions by far more.
_TOLERANCE: Final = 1e-3


class TokenPruner:
    """Prunes tokens: drops the patches that receive least attention after one block of a model.

    Args:
        model: the float model; it is run as a test, but not changed.
        structure: the model's structure.
        after: number of blocks that get all patches.
        share: fraction of the patches that are kept.

    Raises:
        ConfigurationError: the model has windows, uses positions in later blocks, or has too few blocks.
    """

    def __init__(self, model: nn.Module, structure: VitStructure, after: int, share: float) -> None:
        sites = list(global_sites(structure, "fewer tokens (keep)").values())
        if after >= len(sites):
            raise _refused(f"prune_after is {after}, and the model has {len(sites)} blocks", "lower prune_after")
        self.site = sites[after - 1]
        self._block = _block_of(self.site.name)
        self._prefix, self._patches = self.site.prefix_tokens, structure.patch_grid[0] * structure.patch_grid[1]
        self._count = max(1, round(self._patches * share))
        self._scores: Tensor | None = None
        self._try(model, structure)

    def note(self, probabilities: Tensor) -> None:
        """Score the patches of this forward pass by the probabilities `(N, H, tokens, tokens)` of `self.site`."""
        self._scores = received_attention(probabilities.detach(), self.site).mean(1)

    def active(self, model: nn.Module) -> AbstractContextManager[None]:
        """A context in which forward passes of `model` are pruned; `note` must be called in each, at `self.site`."""
        return self._hooked(model, self._best)

    def _best(self) -> Tensor:
        if self._scores is None:
            raise RuntimeError("the attention before the pruning was not recorded")
        scores, self._scores = self._scores, None
        return scores.topk(self._count, dim=1).indices.sort(dim=1).values

    @contextmanager
    def _hooked(self, model: nn.Module, choose: Callable[[], Tensor]) -> Iterator[None]:
        """Reduce the block's output to prefix tokens and the patches whose indices `(N, kept)` `choose` returns."""

        def shorten(module: nn.Module, args: Any, output: Any) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            rows = (self._prefix + choose()).unsqueeze(-1).expand(-1, -1, hidden.shape[-1])
            shorter = torch.cat([hidden[:, : self._prefix], hidden.gather(1, rows)], 1)
            return (shorter, *output[1:]) if isinstance(output, tuple) else shorter

        with model.get_submodule(self._block).register_forward_hook(shorten):
            yield

    @torch.no_grad()
    def _try(self, model: nn.Module, structure: VitStructure) -> None:
        # Refuse a model whose later blocks depend on the order of the patches, or do not run with fewer.
        generator = torch.Generator().manual_seed(0)
        device = next(model.parameters()).device
        pixels = torch.randn(2, 3, *structure.image_size, generator=generator).to(device)
        order = torch.randperm(self._patches, generator=generator).to(device)
        whole = vision_outputs(model, pixels)
        try:
            with self._hooked(model, lambda: order.expand(2, -1)):
                moved = vision_outputs(model, pixels)
            with self._hooked(model, lambda: order[: self._count].expand(2, -1)):
                vision_outputs(model, pixels)
        except (RuntimeError, ValueError, IndexError) as error:
            reason = first_line(error)[:200]
            raise _refused(f"it does not run with fewer patches: {reason}", "leave keep at 1") from error
        if not bool((moved - whole).abs().max() <= _TOLERANCE * whole.abs().max()):
            raise _refused("its later blocks use the positions of patches", "leave keep at 1")


def _block_of(attention: str) -> str:
    """The numbered module (transformer block) that contains an attention."""
    parts = attention.split(".")
    for index, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: index + 1])
    raise _refused(f"its attention {attention} belongs to no numbered block", "leave keep at 1")


def _refused(why: str, fix: str) -> ConfigurationError:
    return ConfigurationError("this model does not support the pruning of patches", why=why, fix=fix)
