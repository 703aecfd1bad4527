"""ONNX Runtime without a server: calls with one image in several streams, for some seconds per round.

    python raw_calls.py GRAPH --images heldout.npy --streams 2 --seconds 15

Sessions have the settings of this project and one thread. Figures: calls per second, and percentiles of their time.
"""

from __future__ import annotations

import argparse
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

import numpy as np
from protocol import serve

from exporters.graph.runtime import open_session


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("graph", type=Path)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--streams", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=15.0)
    options = parser.parse_args()
    sessions = [open_session(options.graph, threads=1) for _ in range(options.streams)]
    pixels = np.load(options.images)[:1]

    def stream(session, seconds):
        times, started = [], time.perf_counter()
        while (now := time.perf_counter()) - started < seconds:
            session.run(None, {"pixels": pixels})
            times.append(1000 * (time.perf_counter() - now))
        return times

    def work():
        with ThreadPoolExecutor(len(sessions)) as pool:
            began = time.perf_counter()
            found = list(pool.map(lambda one: stream(one, options.seconds), sessions))
            times = sorted(chain.from_iterable(found))
            rate = len(times) / (time.perf_counter() - began)
        alone = sorted(stream(sessions[0], options.seconds / 3))
        return {"requests_per_s": rate, "p50_ms": times[len(times) // 2], "p99_ms": times[int(0.99 * len(times))],
                "alone_p50_ms": alone[len(alone) // 2]}  # fmt: skip

    serve(work, streams=options.streams)


if __name__ == "__main__":
    main()
