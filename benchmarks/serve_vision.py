"""Measure the vision server under load: relative to ONNX Runtime alone, open-loop, in overload, and INT8 versus float.

    python benchmarks/serve_vision.py all EXPORT [--clients 50] [--rounds 4] [--seconds 15] [--load 0.7]
    python benchmarks/serve_vision.py closed|open|overload|float EXPORT ...

`closed`: clients repeatedly send one preprocessed image (binary tensor) on keep-alive connections. In turn with that,
ONNX Runtime alone runs batches of the size that the server ran most often, in as many streams. `open`: requests are
sent at given times, at a fraction (--load) of the throughput just measured, so that slow responses do not delay later
requests. They come from clients with a steady pace, or independently (Poisson), and are compared with an ideal queue.
`overload`: twice the load that the server can handle, then half of it: how many requests are refused, how long the
others wait, and how soon the server recovers. `float`: in turn with the INT8 model, the same model without quantizers.
`all` runs the four one after the other; a round lasts --seconds, so the whole takes about (4 rounds + 4) times that.
The last line is JSON.

EXPORT may be `vit-s`: then an INT8 ViT-S with random weights is exported first, which is as fast as a trained one.
Options after --serve are passed to `fp8pipe serve`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))

from running_server import running

from exporters.graph.runtime import open_session
from fp8pipe.artifact import ArtifactWriter, open_artifact
from fp8pipe.core.machine import cpu_model, distribution_version


def vit_s(folder):
    """Write an INT8 export of a ViT-S with random weights, with the full INT8 range, as `quantize-vit` uses it."""
    import dataclasses

    import onnx_ir as ir
    import quantized_families
    import vit_families

    from exporters.graph.formats import GraphInput, GraphOutput, OnnxFormat
    from exporters.graph.produce import quantize_graph, write_description
    from exporters.onnx.target import OnnxDetails

    large = {"embed_dim": 384, "depth": 12, "num_heads": 6}
    family = vit_families.Family(
        **vit_families._timm("vit-s", "vit_small_patch16_224", (224, 224), **large),
        first=(197, 1, (14, 14), 1, 1), last=(197, 1, (14, 14), 1, 1), heads=("head",), linears=50,
    )  # fmt: skip
    quantized_families.family = lambda name: family
    quantized = quantized_families.quantized_family("vit-s", bits=8)
    for site, grid in quantized.activations.items():
        quantized.activations[site] = dataclasses.replace(grid, low=-128 if grid.low else 0)
    graph = quantize_graph(quantized, OnnxFormat.QDQ, "vit-s")
    with ArtifactWriter(folder / "vit-s", kind="onnx-export", stage="benchmark") as writer:
        ir.save(graph.model, writer.root / "model.onnx")
        write_description(writer.root, quantized)
        details = OnnxDetails(
            format=OnnxFormat.QDQ.value, input=GraphInput(name="pixels", shape=("batch", 3, 224, 224)),
            output=GraphOutput(name="logits", what="logits"),
        )  # fmt: skip
        return writer.commit(details=details, seed=0).root


def float_twin(export, folder):
    """Write a copy of an export without quantizers, with dequantized weights."""
    import onnx_ir as ir

    from exporters.tensorrt.half import dequantize_graph

    old = open_artifact(export)
    with ArtifactWriter(folder / "float", kind=old.kind, stage="benchmark") as writer:
        for entry in old.manifest.files:
            shutil.copy(export / entry.path, writer.root / entry.path)
        model = ir.load(export / "model.onnx")
        dequantize_graph(model)
        ir.save(model, writer.root / "model.onnx")
        return writer.commit(config={}, seed=None, details=old.manifest.details).root


def body(name, pixels):
    """The path, the headers and the body of a binary request for a model, with the pixels `(1, 3, H, W)`."""
    data = pixels.tobytes()
    tensor = {"name": "pixels", "datatype": "FP32", "shape": list(pixels.shape),
              "parameters": {"binary_data_size": len(data)}}  # fmt: skip
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    return f"/v2/models/{name}/infer", f"Inference-Header-Content-Length: {len(head)}", head + data


class Client:
    """A minimal client with one keep-alive connection, as a client library would use more CPU than the server."""

    def __init__(self, port, path, header, content):
        self.port = port
        self.sent = (f"POST {path} HTTP/1.1\r\nHost: x\r\n{header}\r\n"
                     f"Content-Length: {len(content)}\r\n\r\n").encode() + content  # fmt: skip
        self.streams = None

    async def call(self):
        """Send the request, read the whole response, and return its status."""
        if self.streams is None:
            self.streams = await asyncio.open_connection("127.0.0.1", self.port)
        reader, writer = self.streams
        writer.write(self.sent)
        head = await reader.readuntil(b"\r\n\r\n")
        lines = head.lower().split(b"\r\n")
        length = next(line for line in lines if line.startswith(b"content-length:"))
        await reader.readexactly(int(length.split(b":")[1]))
        if b"connection: close" in lines:
            writer.close()
            self.streams = None
        return int(head[9:12])


async def closed_loop(make, clients, seconds):
    """Let each client send a request when its last one is answered; returns (requests, requests per second).

    A request is (status, time when it was sent, latency), in seconds from the beginning.
    """
    found, started = [], time.monotonic()

    async def work():
        client = make()
        while (sent := time.monotonic() - started) < seconds:
            status = await client.call()
            found.append((status, sent, time.monotonic() - started - sent))

    await asyncio.gather(*(work() for _ in range(clients)))
    return found, len(found) / (time.monotonic() - started)


def independent(rate, seconds):
    """Times, in seconds, of independent requests (a Poisson process) with `rate` requests per second on average."""
    chance, due, found = random.Random(0), 0.0, []
    while due < seconds:
        found.append(due)
        due += chance.expovariate(rate)
    return found


def paced(rate, seconds, clients):
    """Times, in seconds, of requests from clients that each send at a steady pace, up to a tenth early or late."""
    chance, period, found = random.Random(0), clients / rate, []
    for _ in range(clients):
        due = chance.uniform(0, period)
        while due < seconds:
            found.append(due)
            due += period * chance.uniform(0.9, 1.1)
    return sorted(found)


def ideal(dues, streams, service_s):
    """Simulate an ideal first-come-first-served queue without overhead; returns the same tuples as `open_loop`."""
    free, found = [0.0] * streams, []
    for due in dues:
        first = min(range(streams), key=free.__getitem__)
        free[first] = max(due, free[first]) + service_s
        found.append((200, due, free[first] - due))
    return found


async def open_loop(make, dues):
    """Send each request when it is due; returns (status, due time, latency since then) of each, in seconds."""
    found, idle, tasks = [], [], []
    started = time.monotonic()

    async def call(due):
        client = idle.pop() if idle else make()
        status = await client.call()
        found.append((status, due, time.monotonic() - started - due))
        idle.append(client)

    for due in dues:
        await asyncio.sleep(max(0, started + due - time.monotonic()))
        tasks.append(asyncio.create_task(call(due)))
    await asyncio.gather(*tasks)
    return found


def percentiles(found):
    """Latency percentiles of the requests with status 200, in milliseconds."""
    times = sorted(latency for status, _, latency in found if status == 200)
    return {f"p{p}_ms": round(1000 * times[min(len(times) - 1, int(len(times) * p / 100))], 1) for p in (50, 90, 99)}


def count(found):
    """The number of responses by status."""
    return dict(sorted(Counter(status for status, _, _ in found).items()))


def inference(server):
    """The server's total (number of batches, seconds of inference) so far."""
    text = httpx.get(f"{server.url}/metrics").text
    found = {line.split(" ")[0]: float(line.split(" ")[1]) for line in text.splitlines() if line[0] != "#"}
    return tuple(found.get(f'fp8pipe_stage_seconds_{what}{{stage="inference"}}', 0.0) for what in ("count", "sum"))


def sizes_run(server):
    """The number of batches that the server has run so far, by size (upper bounds of histogram buckets)."""
    found, before = {}, 0
    for line in httpx.get(f"{server.url}/metrics").text.splitlines():
        if line.startswith("fp8pipe_batch_size_bucket") and "Inf" not in line:
            bound = int(float(line.split('"')[1]))
            total = int(float(line.split()[-1]))
            found[bound], before = total - before, total
    return found


def raw(sessions, pixels, size, seconds):
    """Images per second of ONNX Runtime alone, with batches of `size` images and one parallel stream per session."""
    batch, started = np.repeat(pixels, size, 0), time.monotonic()

    def stream(session):
        count = 0
        while time.monotonic() - started < seconds:
            session.run(None, {"pixels": batch})
            count += size
        return count

    with ThreadPoolExecutor(len(sessions)) as pool:
        return sum(pool.map(stream, sessions)) / (time.monotonic() - started)


def maker(server):
    about = httpx.get(f"{server.url}/v1/artifact").json()
    height, width = about["preprocessing"]["crop"]
    pixels = np.random.default_rng(0).standard_normal((1, 3, height, width), dtype=np.float32)
    request = body(about["name"], pixels)
    return (lambda: Client(server.port, *request)), pixels


def closed(export, arguments):
    """Compare the throughput of the server with that of ONNX Runtime alone, in turn."""
    with running(export, "--no-access-log", *arguments.serve) as server:
        make, pixels = maker(server)
        engine = httpx.get(f"{server.url}/v1/artifact").json()["engine"]
        sessions = [open_session(export / "model.onnx", threads=engine["threads"]) for _ in range(engine["streams"])]
        asyncio.run(closed_loop(make, arguments.clients, 3))
        served, bare, statuses = [], [], Counter()
        for _ in range(arguments.rounds):
            before = sizes_run(server)
            found, rate = asyncio.run(closed_loop(make, arguments.clients, arguments.seconds))
            counts = {size: count - before.get(size, 0) for size, count in sizes_run(server).items()}
            size = max(counts, key=lambda s: counts[s] * s)
            served.append(rate)
            statuses += Counter(count(found))
            bare.append(raw(sessions, pixels, size, arguments.seconds))
        return {"served_per_s": served, "raw_per_s": bare, "share": sum(served) / sum(bare), "batch": size,
                "threads": engine["threads"], "streams": engine["streams"], "statuses": dict(statuses)}  # fmt: skip


def opened(export, arguments):
    """Latency percentiles at a fraction of the throughput, for two kinds of arrivals, and those of an ideal queue."""
    with running(export, "--no-access-log", *arguments.serve) as server:
        make, _ = maker(server)
        engine = httpx.get(f"{server.url}/v1/artifact").json()["engine"]
        _, most = asyncio.run(closed_loop(make, arguments.clients, arguments.seconds))
        rate, shown = arguments.load * most, {}
        arrivals = {
            "paced": paced(rate, arguments.seconds, arguments.clients),
            "independent": independent(rate, arguments.seconds),
        }
        for name, dues in arrivals.items():
            before = inference(server)
            found = asyncio.run(open_loop(make, dues))
            batches, seconds = (after - old for after, old in zip(inference(server), before, strict=True))
            at = percentiles(found)
            shown[name] = {"requests": len(found), "statuses": count(found), **at,
                           "p99_over_p50": at["p99_ms"] / at["p50_ms"], "batches": int(batches)}  # fmt: skip
            if batches == len(found):  # each batch had one image, so the ideal queue can be simulated
                best = percentiles(ideal(dues, engine["streams"], seconds / batches))
                shown[name]["ideal"] = best | {"p99_over_p50": best["p99_ms"] / best["p50_ms"]}
        return {"capacity_per_s": most, "rate": rate, "streams": engine["streams"], **shown}


def overload(export, arguments):
    """Send twice the throughput, then half of it. The queue is short, as a long one would absorb a short overload."""
    queue = str(arguments.clients)
    with running(export, "--no-access-log", "--queue", queue, *arguments.serve) as server:
        make, _ = maker(server)
        _, most = asyncio.run(closed_loop(make, arguments.clients, arguments.seconds))
        flood = asyncio.run(open_loop(make, independent(2 * most, arguments.seconds)))
        after = asyncio.run(open_loop(make, independent(most / 2, arguments.seconds)))
        refused = [sent for status, sent, _ in after if status != 200]
        refusals = sorted(latency for status, _, latency in flood if status != 200)
        return {
            "capacity_per_s": most, "flood": count(flood), "flood_answered": percentiles(flood),
            "flood_answered_per_s": count(flood).get(200, 0) / arguments.seconds,
            "refusal_p50_ms": round(1000 * refusals[len(refusals) // 2], 1) if refusals else None,
            "after": count(after), "after_answered": percentiles(after),
            "last_refusal_after_s": round(max(refused), 3) if refused else 0.0,
        }  # fmt: skip


def floats(export, arguments):
    """Compare the throughput of the INT8 model with that of the float model, in turn."""
    with tempfile.TemporaryDirectory() as scratch:
        twin = float_twin(export, Path(scratch))
        with running(export, "--no-access-log", *arguments.serve) as a, running(twin, "--no-access-log",
                                                                                *arguments.serve) as b:  # fmt: skip
            makers = [maker(server)[0] for server in (a, b)]
            rates = [[], []]
            for _ in range(arguments.rounds):
                for index, make in enumerate(makers):
                    _, rate = asyncio.run(closed_loop(make, arguments.clients, arguments.seconds))
                    rates[index].append(rate)
    return {"int8_per_s": rates[0], "float_per_s": rates[1], "ratio": sum(rates[0]) / sum(rates[1])}


PARTS = {"closed": closed, "open": opened, "overload": overload, "float": floats}


def main():
    """Run the chosen measurements and print the results as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["all", *PARTS])
    parser.add_argument("export")
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=15)
    parser.add_argument("--load", type=float, default=0.7)
    parser.add_argument("--serve", nargs=argparse.REMAINDER, default=[], help="options of fp8pipe serve")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        export = vit_s(Path(scratch)) if arguments.export == "vit-s" else Path(arguments.export)
        parts = list(PARTS) if arguments.what == "all" else [arguments.what]
        result = {part: PARTS[part](export, arguments) for part in parts}
    result |= {"seconds": arguments.seconds, "clients": arguments.clients}
    result |= {"cpu": cpu_model(), "python": platform.python_version(),
               "onnxruntime": distribution_version("onnxruntime"), "export": arguments.export}  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
