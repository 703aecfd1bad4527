"""Running the parts one after another, each in a forked process that is ended when its time is up.

The parent imports the libraries once and never touches CUDA, so that a fork can; should a fork find no device all the
same, parts are begun as fresh processes instead. Shares are of the whole time and add up: what a part does not use, the
next one has.
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

from fp8pipe.core.errors import MissingCapabilityError
from fp8pipe.models.compat import import_transformers
from fp8pipe.numerics.bf16 import widen_bf16_products
from gpu_parts.context import Context
from gpu_parts.record import Record, Row

# Module of each part, in order of worth, and the share of all time by which it has ended.
PARTS: Final = {"environment": 0.08, "correctness": 0.30, "steps": 0.70, "kernels": 0.85, "vision": 0.99}
STARTS: Final = ("fork", "spawn")  # how processes begin; the next where one finds no device
# What several parts would import anyway, each for itself: an optimizer brings the first.
_SHARED: Final = ("torch._dynamo", "transformers.models.llama.modeling_llama")
_NO_DEVICE: Final = "no device"


def run_session(record: Record, parts: Sequence[str], device: str, *, tiny: bool, minutes: float, began: float) -> bool:
    """Run parts into a record; whether each of them ran to its end.

    Args:
        record: gets the rows.
        parts: names from `PARTS`; they run in the order of that table.
        device: cuda or cpu.
        tiny: small shapes and few rounds.
        minutes: wall time of all, imports too.
        began: `time.monotonic()` when that time began.

    Raises:
        MissingCapabilityError: there is no such device.
    """
    chosen = [name for name in PARTS if name in parts]
    _preload(chosen)  # on a disk that has not read them yet this takes a part's time: what is left is shared out
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
    """Import once for all processes; whoever needs what cannot be imported says so itself."""
    import_transformers()
    for name in (*_SHARED, *(f"gpu_parts.{part}" for part in parts)):
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    gc.freeze()  # forks share these objects, and need not look through them for garbage


def _run_part(record: Record, name: str, start: str, arguments: tuple[torch.device, bool, float]) -> None:
    began, ends = time.monotonic(), arguments[-1]
    record.data["parts"].pop(name, None)
    record.part(name, status="running")
    processes: Any = multiprocessing.get_context(start)
    ours, theirs = processes.Pipe(duplex=False)
    child = processes.Process(target=_in_child, args=(name, theirs, *arguments))
    child.start()  # no daemon: a compiler starts processes of its own
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
    """Take rows until the part says that it is done, and what it says; nothing if it never does."""
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
    """Measure one part, sending rows, and a last message without a name."""
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        pipe.send({"status": _NO_DEVICE, "error": f"torch {torch.__version__}: {error}".partition("\n")[0]})
        return
    try:
        torch.manual_seed(0)
        widen_bf16_products()
        importlib.import_module(f"gpu_parts.{name}").run(Context(device, tiny, ends, pipe.send))
    except Exception as error:  # outside all rows: the parts that follow are still to be run
        pipe.send({"status": "failed", "error": f"{type(error).__name__}: {error}"[:600]})
        return
    pipe.send({"status": "done"})


def _brief(row: Row) -> str:
    for kind in ("error", "left_out"):
        if kind in row:
            return f"{row['name']}: {kind.replace('_', ' ')}: {row[kind]}"
    seconds = row.get("seconds")
    return str(row["name"]) if seconds is None else f"{row['name']}: {1000 * seconds:.4g} ms"
