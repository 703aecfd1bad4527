"""What tests let the processes of `ranks` do."""

from __future__ import annotations

import atexit
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from tuning_config import config

from fp8pipe.cli import main
from fp8pipe.core.errors import Fp8PipeError
from fp8pipe.core.launch import launched
from fp8pipe.models.compat import import_transformers
from fp8pipe.models.language.text import IGNORED
from pipeline.finetune.batches import Batch, Batches
from pipeline.finetune.checkpoint import CheckpointStore
from pipeline.finetune.distributed.group import Group, joined
from pipeline.finetune.distributed.method import ShardedFalqon
from pipeline.finetune.distributed.processes import SeveralProcesses
from pipeline.finetune.distributed.shard import shard
from pipeline.finetune.distributed.tensors import assign, full_tensors, sharded_like
from pipeline.finetune.distributed.trainer import RankedTrainer
from pipeline.finetune.stage import finetune

_FROZEN = re.compile(r"code_bytes|base_layer.weight")
# Imported by the server of `ranks`, once for all processes.
_MODELS = [getattr(import_transformers(), name) for name in ("LlamaForCausalLM", "MixtralForCausalLM")]
_BASELINES = [import_module(name) for name in ("peft", "bitsandbytes") if find_spec(name)]


@contextmanager
def without_answers(blank: tuple[int, ...]) -> Iterator[None]:
    """A context in which these batches have no answers."""
    at = Batches.at

    def blanked(batches: Batches, step: int) -> Batch:
        batch = at(batches, step)
        return replace(batch, labels=torch.full_like(batch.labels, IGNORED)) if step in blank else batch

    Batches.at = blanked
    try:
        yield
    finally:
        Batches.at = at


def tuned(settings: dict[str, Any], output: str, resume: bool = False, blank: tuple[int, ...] = ()) -> None:
    """Fine-tune with these settings of `tuning_config.config`; batches `blank` have no answers."""
    with without_answers(blank):
        finetune(config(**settings), Path(output), resume=resume)


def command(settings: dict[str, Any], output: str, fault: str, rank: int, step: int) -> None:
    """The command `finetune`, in which one rank meets a fault before one step; ends with the command's exit code."""
    one_step = RankedTrainer.one_step

    def faulty(trainer: RankedTrainer) -> Any:
        if trainer.step == step and trainer.group.rank == rank:
            _FAULTS[fault]()
        return one_step(trainer)

    RankedTrainer.one_step = faulty
    file = Path(f"{output}-{os.environ['RANK']}.json")
    file.write_text(json.dumps(config(**settings).model_dump(mode="json", exclude_none=True)))
    log = f"{output}-{os.environ['RANK']}.log"
    if fault == "elsewhere" and os.environ["RANK"] == str(rank):
        output += "-elsewhere"
    command_line(["finetune", "--config", str(file), "--output", output, "--json"], log)


def command_line(words: list[str], log: str) -> None:
    """A command of fp8pipe, whose output is added to a file; ends with the command's exit code."""
    opened = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(opened, 1)
    os.dup2(opened, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    try:
        main(words)
    except SystemExit as end:
        if end.code:  # with 0 the launcher would wait for ever for what this process returns
            atexit._run_exitfuncs()  # multiprocessing does not
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(int(end.code))


def commanded(arguments: list[str], folder: str) -> int:
    """Run the command line; its standard output goes to a file of this rank in `folder`. Returns the exit code."""
    with (Path(folder) / os.environ["RANK"]).open("w") as out, redirect_stdout(out):
        try:
            main(arguments)
        except SystemExit as end:
            return int(end.code or 0)
    return 0


def _interrupt() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    os.kill(os.getpid(), signal.SIGINT)


def _no_memory() -> None:
    raise MemoryError


_FAULTS: dict[str, Callable[[], None]] = {
    "memory": _no_memory,
    "interrupt": _interrupt,
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "none": lambda: None,
    "elsewhere": lambda: None,  # another directory is this rank's output
}


@contextmanager
def joined_group() -> Iterator[Group]:
    """The processes of this run."""
    place = launched()
    assert place is not None
    with joined(place, "cpu") as processes:
        yield processes.group


def compared() -> list[str]:
    """The messages about values and tensors that differ in rank 1, each named, and about those that do not."""
    found = []
    with joined_group() as group:
        same, other = torch.arange(6.0), torch.arange(6.0) + (group.rank == 1) * 1e-6
        checks = [
            lambda: group.require_same({"seed": 1}, "the configuration"),
            lambda: group.require_same({"seed": group.rank}, "the configuration"),
            lambda: group.require_equal({"layer.codes": same, "layer.lora_B": same}),
            lambda: group.require_equal({"layer.codes": same, "layer.lora_B": other}),
        ]
        for check in checks:
            try:
                check()
            except Fp8PipeError as error:
                found.append(f"{error.exit_code}: {error}")
            else:
                found.append("")
    return found


def turns(log: str) -> None:
    """Appends this process's rank to a file, in turn, in each of two runs."""
    with joined_group() as group:

        def write() -> None:
            if group.rank == 0:
                time.sleep(0.5)  # the others would come first if they did not wait
            with Path(log).open("a") as handle:
                handle.write(str(group.rank))

        group.in_turn(write)
    with joined_group() as group:  # another run of the same processes
        group.in_turn(write)


def given_up() -> list[str]:
    """What each rank gets when rank 0 fails in its turn, for which the others wait, and when it starts another run."""
    found: list[str] = []
    for _ in range(2):
        try:
            with joined_group() as group:
                group.in_turn(lambda: found.append(found[1]))  # an IndexError
        except (IndexError, Fp8PipeError) as error:
            found.append(f"{type(error).__name__}: {error}".splitlines()[0])
    return found


def sharded_and_back(shapes: list[tuple[tuple[int, ...], str]]) -> list[tuple[int, bool, bool]]:
    """For each shape and dtype: rows held here, whether the whole is what was sharded, and whether assigning works."""
    found = []
    with joined_group() as group:
        torch.manual_seed(0)
        origins = [torch.randint(0, 200, shape).to(getattr(torch, dtype)) for shape, dtype in shapes]
        like = [distribute_tensor(torch.zeros_like(origin), group.mesh, [Shard(0)]) for origin in origins]
        shards = [sharded_like(origin, one) for origin, one in zip(origins, like, strict=True)]
        for one, origin in zip(like, origins, strict=True):
            assign(one, origin)
        for origin, shard, one, assigned in zip(origins, shards, full_tensors(shards), full_tensors(like), strict=True):
            found.append((len(shard.to_local()), torch.equal(one, origin), torch.equal(assigned, origin)))
    return found


def shares(family: str, how: dict[str, Any], folder: str) -> dict[str, tuple[int, int]]:
    """Bytes that this process holds of a sharded model, and bytes of the whole: trained, the layers' others, others."""
    from mixtures import mixture

    model = mixture(family)
    found: dict[str, list[int]] = {"trained": [0, 0], "layers": [0, 0], "rest": [0, 0]}
    with joined_group() as group:
        SeveralProcesses(group).method(config("", "", **how), CheckpointStore(Path(folder), 1)).prepare(model)
        shard(model, group.mesh)
        for name, parameter in model.named_parameters():
            assert isinstance(parameter, DTensor)
            kind = "trained" if parameter.requires_grad else "layers" if _FROZEN.search(name) else "rest"
            found[kind][0] += parameter.to_local().untyped_storage().nbytes()
            found[kind][1] += parameter.numel() * parameter.element_size()
    return {kind: (mine, whole) for kind, (mine, whole) in found.items()}


def spilled(folder: str) -> tuple[int, int, int]:
    """Bytes of deployed codes that are expected to be written, that were, and that are then expected to be."""
    from mixtures import method_of, mixture

    model, like = mixture("llama"), method_of("live")
    with joined_group() as group:
        method = ShardedFalqon(
            like.rule, rank=like.rank, rows=None, initialisation=like.initialisation, seed=0, group=group,
            folder=Path(folder),
        )  # fmt: skip
        method.prepare(model)
        shard(model, group.mesh)
        before = method.spill_bytes()
        method.collect()
        group.total(torch.zeros(1))  # the main process has written
        written = sum(t.nbytes for file in Path(folder).glob("*.safetensors") for t in load_file(file).values())
        return before, written, method.spill_bytes()
