"""The vision server under load, against ONNX Runtime without a server and against LitServe."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from serve_vision import closed_loop, count, percentiles

from comparison.environments import Environment, peer
from comparison.harness import Comparison, Contender, Settings, worker
from comparison.processes import WORKERS, ContenderError
from comparison.results import Metric
from comparison.servers import OURS_ENVIRONMENT, Kind, Server, fp8pipe_server, litserve_server
from comparison.vision import prepare

OURS = "fp8pipe serve"
_METRICS = (
    Metric(name="requests_per_s", label="requests/s", better="higher"),
    Metric(name="p50_ms", label="p50, ms", better="lower"),
    Metric(name="p99_ms", label="p99, ms", better="lower"),
    Metric(name="alone_p50_ms", label="p50 of a single client, ms", better="lower"),
)
_ABOUT = """The INT8 export of the comparison `vision`, at {size} pixels. {clients} clients on keep-alive connections
send one preprocessed image each as soon as the last answer is there, for {seconds:g} s per round, then one client
does so for a third of that. The load generator shares the {threads} cores. fp8pipe gets the pixels as a binary tensor
(Open Inference Protocol), LitServe as base64 in JSON, which it parses for every request. All have {threads} streams
of one thread; fp8pipe and `LitServe, batches of 8` may form batches of up to eight. `ONNX Runtime alone` calls the
engine without a server, one image at a time in as many streams: its percentiles are those of a call, without the wait
in a queue that {clients} clients cause."""


@dataclass(frozen=True)
class _Load:
    """A server under load."""

    server: Server
    clients: int
    seconds: float

    def round(self) -> dict[str, float]:
        def make() -> object:
            return self.server.kind.client(self.server.port)

        found, rate = asyncio.run(closed_loop(make, self.clients, self.seconds))
        alone, _ = asyncio.run(closed_loop(make, 1, self.seconds / 3))
        statuses = count([*found, *alone])
        if set(statuses) != {200}:
            raise ContenderError(f"answers by status: {statuses}")
        at = percentiles(found)
        return {"requests_per_s": rate, "p50_ms": at["p50_ms"], "p99_ms": at["p99_ms"],
                "alone_p50_ms": percentiles(alone)["p50_ms"]}  # fmt: skip

    def close(self) -> None:
        self.server.close()


def build(settings: Settings) -> Comparison:
    """The comparison on the sample ViT-S."""
    folder, size = prepare(settings)
    clients, seconds = settings.choose((16, 15.0), (4, 1.0))
    export, pixels = folder / "ours", np.load(folder / "heldout.npy")[:1]
    litserve = peer("litserve", settings.environments)

    def contender(name: str, where: Environment, kind: Callable[[], Kind], *, ours: bool = False) -> Contender:
        return Contender(name, where, lambda: _Load(Server(kind()), clients, seconds), ours)

    fixed = ["--streams", str(settings.threads), "--threads", "1", "--max-batch", "8"]
    graph: Path = export / "model.onnx"
    raw = [graph, "--streams", str(settings.threads), "--seconds", str(seconds), "--images", folder / "heldout.npy"]
    return Comparison(
        title="Serving a vision transformer",
        about=_ABOUT.format(size=size, clients=clients, seconds=seconds, threads=settings.threads),
        metrics=_METRICS,
        contenders=(
            contender(OURS, OURS_ENVIRONMENT, lambda: fp8pipe_server(settings, export, pixels, fixed), ours=True),
            worker("ONNX Runtime alone", OURS_ENVIRONMENT, WORKERS / "raw_calls.py", raw, settings.work / "raw.log"),
            contender("LitServe", litserve, lambda: litserve_server(settings, graph, pixels, 1)),
            contender("LitServe, batches of 8", litserve, lambda: litserve_server(settings, graph, pixels, 8)),
        ),
        baseline=OURS,
        rounds=settings.choose(5, 1),
        warmup=settings.choose(1, 0),
    )
