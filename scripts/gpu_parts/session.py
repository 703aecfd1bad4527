"""Runs the parts one after another, each in a forked process that is killed when its time is up.

The parent imports the libraries once and never initializes CUDA, because a forked process could not use CUDA then. If a
forked process still finds no device, the parts are started as new processes instead. Each part has a deadline, given as
a share of the total time, so time that a part does not use is available to the next one.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import multiprocessing
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any, Final

import torch

from fp8pipe.core.errors import MissingCapabilityError, first_line
from fp8pipe.models.compat import import_transformers
from fp8pipe.numerics.bf16 import widen_bf16_products
from gpu_parts.context import Context
from gpu_parts.record import Record, Row

# The module of each part, most important first, and the share of the total time after which it must have ended.
PARTS: Final = {"environment": 0.08, "correctness": 0.30, "steps": 0.70, "kernels": 0.85, "vision": 0.99}
STARTS: Final = ("fork", "spawn")  # start methods; the second is used if forked processes find no device
# Modules that several parts import; an optimizer imports the first.
_SHARED: Final = ("torch._dynamo", "transformers.models.llama.modeling_llama")
_NO_DEVICE: Final = "no device"


def run_session(record: Record, parts: Sequence[str], device: str, *, tiny: bool, minutes: float, began: float) -> bool:
    """Run parts and write their rows to a record.

    Args:
        record: receives the rows.
        parts: names from `PARTS`; they run in the order of that table.
        device: cuda or cpu.
        tiny: whether to use small shapes and few rounds.
        minutes: total wall time, including imports.
        began: `time.monotonic()` at the start of that time.

    Returns:
        Whether every part finished.

    Raises:
        MissingCapabilityError: no process can use the device.
    """
    chosen = [name for name in PARTS if name in parts]
    _preload(chosen)  # slow if the files are not in the disk cache, so only the remaining time is divided among parts
    ready = time.monotonic()
    starts, done = list(STARTS), record.data["parts"]
    for name in chosen:
        ends = ready + (began + 60 * minutes - ready) * PARTS[name] / PARTS[chosen[-1]]
        _run_part(record, name, starts[0], (torch.device(device), tiny, ends))
        while done[name]["status"] == _NO_DEVICE and len(starts) > 1:
            del starts[0]
            _run_part(record, name, starts[0], (torch.device(device), tiny, ends))
        if done[name]["status"] == _NO_DEVICE:
            raise MissingCapabilityError(
                "no CUDA device can be used", why=done[name]["error"], fix="use --device cpu --tiny to try the script"
            )
    record.data["seconds"] = round(time.monotonic() - began, 1)
    record.write()
    return all(done[name]["status"] == "done" for name in chosen)


def _preload(parts: Sequence[str]) -> None:
    """Import modules once for all forked processes; a part that needs a missing module reports the failure itself."""
    import_transformers()
    for name in (*_SHARED, *(f"gpu_parts.{part}" for part in parts)):
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    gc.freeze()  # forked processes share these objects, and their garbage collector can skip them


def _run_part(record: Record, name: str, start: str, arguments: tuple[torch.device, bool, float]) -> None:
    began, ends = time.monotonic(), arguments[-1]
    record.data["parts"].pop(name, None)
    record.part(name, status="running")
    processes: Any = multiprocessing.get_context(start)
    ours, theirs = processes.Pipe(duplex=False)
    child = processes.Process(target=_in_child, args=(name, theirs, *arguments))
    child.start()  # not a daemon, since those cannot start processes, as torch.compile does
    theirs.close()
    try:
        told = _receive(record, name, ours, ends)
        child.join(max(0.0, min(5.0, ends - time.monotonic())))
        late = child.is_alive()
    finally:
        child.kill()
        child.join()
    if not told:
        why = "its time was up" if late else f"its process ended with exit code {child.exitcode}"
        told = {"status": "ended", "error": why}
    record.part(name, **told, seconds=round(time.monotonic() - began, 1))
    print(f"{name}: {told['status']} {told.get('error', '')}", file=sys.stderr, flush=True)


def _receive(record: Record, name: str, pipe: Connection, ends: float) -> dict[str, Any]:
    """Record the rows that a part sends, and return its last message, with its status; empty if there is none."""
    while pipe.poll(max(0.0, ends - time.monotonic())):
        try:
            message: dict[str, Any] = pipe.recv()
        except EOFError:
            break
        if "name" not in message:
            return message
        record.row(name, message)
        print(f"{name}: {_brief(message)}", file=sys.stderr, flush=True)
    return {}


def _in_child(name: str, pipe: Connection, device: torch.device, tiny: bool, ends: float) -> None:
    """Run one part in this process; sends each row, then a message with its status instead of a row's name."""
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        pipe.send({"status": _NO_DEVICE, "error": f"torch {torch.__version__}: {first_line(error)}"})
        return
    try:
        torch.manual_seed(0)
        widen_bf16_products()
        importlib.import_module(f"gpu_parts.{name}").run(Context(device, tiny, ends, pipe.send))
    except Exception as error:  # an error outside any row ends this part only; the following parts still run
        pipe.send({"status": "failed", "error": f"{type(error).__name__}: {error}"[:600]})
        return
    pipe.send({"status": "done"})


def _brief(row: Row) -> str:
    for kind in ("error", "left_out"):
        if kind in row:
            return f"{row['name']}: {kind.replace('_', ' ')}: {row[kind]}"
    seconds = row.get("seconds")
    return str(row["name"]) if seconds is None else f"{row['name']}: {1000 * seconds:.4g} ms"
