"""What tests let the processes of `ranks` do as if they were on several machines."""

from __future__ import annotations

import os
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from mixtures import method_of, mixture
from rank_work import joined_group, tuned

from fp8pipe.core import machine
from fp8pipe.core.errors import Fp8PipeError
from pipeline.falqon.layer import FalqonLinear
from pipeline.finetune.distributed.group import Group
from pipeline.finetune.distributed.machines import Layout, lay_out
from pipeline.finetune.distributed.method import ShardedFalqon
from pipeline.finetune.distributed.shard import shard


def _on_machines_of(local: int) -> None:
    """Let the launcher's variables say that there are `local` processes on each machine."""
    os.environ["LOCAL_WORLD_SIZE"], os.environ["LOCAL_RANK"] = str(local), str(int(os.environ["RANK"]) % local)


def tuned_on_machines(local: int, settings: dict[str, Any], output: str) -> None:
    """`rank_work.tuned` on machines of `local` processes."""
    _on_machines_of(local)
    tuned(settings, output)


def laid_out(cases: list[tuple[int, bool, bool]]) -> tuple[list[tuple[list[int], list[int], float]], str]:
    """For each case, the ranks that share this one's replica, those with its part of others, and its share of codes.

    Args:
        cases: processes on each machine; whether rank 0 is not where its rank would be; and whether the last rank's
            machine has too little memory for a replica.

    Returns:
        These, and the message about a last replica that has one other bit, in the layout of the first case.
    """
    prepared, method = mixture("llama"), method_of("live")
    method.prepare(prepared)
    found, told = [], ""
    with joined_group() as group:
        for local, odd, tight in cases:
            _on_machines_of(local)
            if odd and group.rank == 0:
                os.environ["LOCAL_RANK"] = "1"
            memory = machine.memory_bytes
            if tight and group.rank == group.size - 1:
                machine.memory_bytes = lambda: 1000
            model = deepcopy(prepared)
            layout = lay_out(model, group)
            machine.memory_bytes = memory
            shard(model, layout.mesh, layout.across)
            codes = [p for name, p in model.named_parameters() if name.endswith("code_bytes")]
            held = sum(p.to_local().numel() for p in codes) / sum(p.numel() for p in codes)  # type: ignore[attr-defined]
            across = [] if layout.across is None else dist.get_process_group_ranks(layout.across)
            found.append((dist.get_process_group_ranks(layout.mesh.get_group()), across, held))
            told = told or _refused(model, layout, group)
    return found, told


def _refused(model: torch.nn.Module, layout: Layout, group: Group) -> str:
    """The message of the final merge about the last process's B, in which one value is changed."""
    like = method_of("live")
    method = ShardedFalqon(
        like.rule, rank=like.rank, rows=None, initialisation=like.initialisation, seed=0, group=group, folder=Path(),
    )  # fmt: skip
    method._model, method.replicas = model, layout.replicas
    method.layers = {name: module for name, module in model.named_modules() if isinstance(module, FalqonLinear)}
    if group.rank == group.size - 1:
        next(iter(method.layers.values())).lora_B.to_local().detach()[0, 0] = 1e-30  # type: ignore[attr-defined]
    try:
        method.finish(model, list)
    except Fp8PipeError as error:
        return str(error)
    return ""
