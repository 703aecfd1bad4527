"""What tests let the processes of `ranks` do in the final merge."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from mixtures import method_of, mixture, never_to
from rank_work import joined_group

from pipeline.falqon import final_merge
from pipeline.falqon.final_merge import merge_all, merge_group, second_moments
from pipeline.falqon.rules import FinalMerge
from pipeline.finetune.distributed.merge import shared_merge
from pipeline.finetune.distributed.moments import shared_moments
from pipeline.finetune.distributed.shard import shard
from pipeline.finetune.distributed.tensors import full_tensors

BATCHES = 3  # of two processes one has none in the second round


def _batches() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(3, 200, (2, 24), generator=generator)} for _ in range(BATCHES)]


def moments() -> dict[str, tuple[bool, bool]]:
    """For each layer of this process: whether its moments are those of one process, and of batches in another order."""
    model, batches = mixture("llama"), _batches()
    method = method_of("live")
    method.prepare(model)
    with torch.no_grad():
        alone = second_moments(model, method.layers, lambda: batches)
        other = second_moments(model, method.layers, lambda: batches[::-1])
        with joined_group() as group:
            shard(model, group.mesh)
            owners = {name: place % group.size for place, name in enumerate(method.layers)}
            shared = shared_moments(model, method.layers, lambda: batches, group, owners)
    return {name: (torch.equal(found, alone[name]), torch.equal(found, other[name])) for name, found in shared.items()}


def merged(family: str, how: str, budget: int) -> dict[str, Any]:
    """Merges a model's layers in one process, and then in all.

    Args:
        family: of `mixtures.mixture`; no token reaches its second expert, if it has experts.
        how: the rounding.
        budget: bytes of moments at the same time, which decides on the groups of layers that are merged together.

    Returns:
        `same`: whether codes and reports are those of one process, and B is zero; `rounded`: names of the layers that
        this process has rounded; `layers`: of all; `unseen`: in one process and in all.
    """
    final_merge._MOMENT_BYTES = budget
    unseen: list[list[str]] = [[], []]
    model, batches = mixture(family), _batches()
    never_to(model, 1)
    method = method_of("live")
    method.prepare(model)
    for layer in method.layers.values():
        layer.lora_B.data.normal_(0, 0.02)
    alone = deepcopy(model)
    layers = {name: alone.get_submodule(path) for name, path in _paths(model, method.layers).items()}
    final_merge._warn_unseen = unseen[0].extend
    reports = merge_all(alone, layers, FinalMerge(how), lambda: batches, merge_group)
    rounded: list[str] = []
    final_merge._warn_unseen = unseen[1].extend
    with joined_group() as group:
        shard(model, group.mesh)
        _note_rounded(method.layers, rounded)
        shared = merge_all(model, method.layers, FinalMerge(how), lambda: batches,
                           lambda *arguments: shared_merge(*arguments, group))  # fmt: skip
        codes = list(full_tensors([layer.code_bytes for layer in method.layers.values()]))
        zero = not any(bool(layer.lora_B.to_local().any()) for layer in method.layers.values())
    same = all(torch.equal(one, layer.code_bytes) for one, layer in zip(codes, layers.values(), strict=True))
    return {
        "same": same and zero and shared == reports and list(shared) == list(reports),
        "changed": sum(report.changed for report in reports.values()),
        "rounded": rounded, "layers": list(method.layers), "unseen": unseen,
    }  # fmt: skip


def _paths(model: torch.nn.Module, layers: dict[str, Any]) -> dict[str, str]:
    """Paths of FALQON layers, which differ from the names of those that are stacked."""
    found = {id(module): path for path, module in model.named_modules()}
    return {name: found[id(layer)] for name, layer in layers.items()}


def _note_rounded(layers: dict[str, Any], rounded: list[str]) -> None:
    names = {id(layer): name for name, layer in layers.items()}
    merge_layer = final_merge.merge_layer

    def noted(layer: Any, moments: torch.Tensor | None) -> Any:
        rounded.append(names[id(layer)])
        return merge_layer(layer, moments)

    from pipeline.finetune.distributed import merge

    merge.merge_layer = noted  # type: ignore[assignment]
