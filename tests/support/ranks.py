"""Runs fine-tuning as several processes under torch's own launcher, the one behind torchrun, with a fast start.

Processes are forked from a server that has imported everything once. What they run must be importable by name: it is in
`rank_work`.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
MEASURED = {"tokens_per_second", "flush_share"}
_HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
_PRELOADED = ["pipeline.finetune.stage", "pipeline.finetune.distributed.processes", "rank_work", "preloaded", "forked"]


def run_ranks(size: int, function: Callable[..., Any], *arguments: Any) -> dict[int, Any]:
    """The results of `function(*arguments)` in each of `size` processes, by rank; or the exit codes, if one fails."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    serve()
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=size, start_method="forkserver", monitor_interval=0.05, run_id="ranks",
        rdzv_backend="c10d", rdzv_endpoint="127.0.0.1:0", max_restarts=0,
    )  # fmt: skip
    handlers = {number: signal.getsignal(number) for number in _HANDLED}
    try:
        return elastic_launch(config, _one_thread)(function, *arguments)
    except ChildFailedError as error:
        return {rank: failure.exitcode for rank, failure in error.failures.items()}
    finally:  # the launcher leaves its own in this process
        for number, handler in handlers.items():
            signal.signal(number, handler)


def serve() -> None:
    """Start the server of processes, which finds modules by the environment alone."""
    multiprocessing.set_forkserver_preload(_PRELOADED)
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def _one_thread(function: Callable[..., Any], *arguments: Any) -> Any:
    torch.set_num_threads(1)
    return function(*arguments)


def assert_same(one: Path, other: Path) -> None:
    """Two runs have the same weights, adapter, metrics and manifest, but for what time and place decide."""
    files = [sorted(path.name for path in root.glob("*.safetensors")) for root in (one, other)]
    assert "model.safetensors" in files[0] == files[1]  # an adapter, if it is not merged before
    for name in files[0]:
        assert (one / name).read_bytes() == (other / name).read_bytes()
    curves = [
        [{key: value for key, value in json.loads(line).items() if key not in MEASURED}
         for line in (root / "metrics.jsonl").read_text().splitlines()]
        for root in (one, other)
    ]  # fmt: skip
    assert curves[0] == curves[1]
    mine, theirs = (json.loads((root / "manifest.json").read_text()) for root in (one, other))
    for key in ("config", "layers", "details", "gates", "parents", "kind", "number_format"):
        assert mine.get(key) == theirs.get(key)  # merged weights have no number format
