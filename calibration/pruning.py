"""Fewer tokens in the deeper layers: after some block, the patches that receive least attention leave the forward.

What an image is made of is decided where attention goes; patches that receive hardly any cost as much as the others
and change little. (Token pruning in model inversion: "Sparse Model Inversion", ICML 2024.) Scores are those of the
block's own attention, see `received_attention`, and every image keeps its own patches in their order.

Whether a model bears this is tried, not looked up in a list of names: positions must not be used after the block (no
windows, no biases on positions, no rotary ones), so permuting the patches there must not change what the model answers,
and the model must run without some of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn

from calibration.losses import global_sites, received_attention
from fp8pipe.core.errors import ConfigurationError
from fp8pipe.models.vision.prepare import vision_outputs
from fp8pipe.models.vision.structure import VitStructure

_TOLERANCE: Final = 1e-3  # of the largest output: sums in another order in fp32; positions that matter change far more
Choose = Callable[[Tensor], Tensor]


class TokenPruner:
    """Drops patches after one block of a model.

    Args:
        model: the float model; run to try it, not changed.
        structure: of it.
        after: number of whole blocks before.
        share: of the patches that stay.

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
        """Scores of this forward, from the probabilities `(N, H, tokens, tokens)` of `self.site`."""
        self._scores = received_attention(probabilities.detach(), self.site).mean(1)

    @contextmanager
    def active(self, model: nn.Module) -> Iterator[None]:
        """While the context lasts, forwards of `model` go on with the best patches; each needs a `note` on its way."""
        with self._hooked(model, self._best):
            yield

    def _best(self, hidden: Tensor) -> Tensor:
        if self._scores is None:
            raise RuntimeError("the attention before the pruning was not noted")
        scores, self._scores = self._scores, None
        return scores.topk(self._count, dim=1).indices.sort(dim=1).values

    @contextmanager
    def _hooked(self, model: nn.Module, choose: Choose) -> Iterator[None]:
        """Hand on, of the block's output, prefix tokens and the patches `choose` names, `(N, kept)` indices."""

        def shorten(module: nn.Module, args: Any, output: Any) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            rows = (self._prefix + choose(hidden)).unsqueeze(-1).expand(-1, -1, hidden.shape[-1])
            shorter = torch.cat([hidden[:, : self._prefix], hidden.gather(1, rows)], 1)
            return (shorter, *output[1:]) if isinstance(output, tuple) else shorter

        with model.get_submodule(self._block).register_forward_hook(shorten):
            yield

    @torch.no_grad()
    def _try(self, model: nn.Module, structure: VitStructure) -> None:
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randn(2, 3, *structure.image_size, generator=generator)
        order = torch.randperm(self._patches, generator=generator)
        whole = vision_outputs(model, pixels)
        try:
            with self._hooked(model, lambda hidden: order.expand(2, -1)):
                moved = vision_outputs(model, pixels)
            with self._hooked(model, lambda hidden: order[: self._count].expand(2, -1)):
                vision_outputs(model, pixels)
        except (RuntimeError, ValueError, IndexError) as error:
            reason = str(error).splitlines()[0][:200]
            raise _refused(f"it does not run with fewer of them: {reason}", "leave keep at 1") from error
        if not bool((moved - whole).abs().max() <= _TOLERANCE * whole.abs().max()):
            raise _refused("its later blocks use the positions of patches", "leave keep at 1")


def _block_of(attention: str) -> str:
    """The numbered module that an attention is part of."""
    parts = attention.split(".")
    for index, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: index + 1])
    raise _refused(f"its attention {attention} is in no numbered block", "leave keep at 1")


def _refused(why: str, fix: str) -> ConfigurationError:
    return ConfigurationError("this model cannot go on with fewer patches", why=why, fix=fix)
