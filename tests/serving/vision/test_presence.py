"""Clients that leave: their queued images are not computed, and the others' are."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import threading
import time

import httpx
import numpy as np
import pytest
from running_server import running

from serving.vision.batcher import Batcher, VisionMetrics


def test_images_of_a_request_that_was_given_up_never_reach_the_engine():
    begun, go, seen = threading.Event(), threading.Event(), []

    def engine(pixels):
        seen.extend(pixels[:, 0].tolist())
        begun.set()
        assert go.wait(30)
        return pixels

    batcher = Batcher([engine], (1,), max_wait_s=0, capacity=100, metrics=VisionMetrics())

    async def scene():
        first = asyncio.create_task(batcher.submit(np.full((1, 1), 1, np.float32), 30))
        await asyncio.to_thread(begun.wait, 30)
        leaving = asyncio.create_task(batcher.submit(np.full((50, 1), 2, np.float32), 30))
        staying = asyncio.create_task(batcher.submit(np.full((2, 1), 3, np.float32), 30))
        await asyncio.sleep(0.05)
        leaving.cancel()
        await asyncio.wait([leaving])
        go.set()
        await asyncio.gather(first, staying)

    asyncio.run(scene())
    batcher.close()
    assert seen == [1, 3, 3]


def _metric(server, name):
    text = httpx.get(f"{server.url}/metrics").text
    found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.M)
    return float(found[1]) if found else 0.0


@pytest.mark.parametrize("linger_s", [0.0, 0.02])
def test_clients_that_leave_cost_no_inference(export, linger_s):
    """Eight requests of 32 images, left at once or a moment later: most are never computed."""
    with running(export, "--max-batch", "1", "--threads", "1") as server:
        model = httpx.get(f"{server.url}/v2/models/tiny").json()
        shape = [32, *model["inputs"][0]["shape"][1:]]
        data = np.zeros(shape, np.float32).tobytes()
        tensor = {"name": "pixels", "datatype": "FP32", "shape": shape, "parameters": {"binary_data_size": len(data)}}
        head = json.dumps({"inputs": [tensor]}).encode()
        request = (f"POST /v2/models/tiny/infer HTTP/1.1\r\nHost: x\r\nInference-Header-Content-Length: {len(head)}\r\n"
                   f"Content-Length: {len(head) + len(data)}\r\n\r\n").encode() + head + data  # fmt: skip
        clients = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(8)]
        for client in clients:
            client.sendall(request)
        time.sleep(linger_s)
        for client in clients:
            client.close()
        end = time.monotonic() + 120
        while time.monotonic() < end and _metric(server, 'fp8pipe_shed_total{reason="disconnected"}') < 4:
            time.sleep(0.1)
        time.sleep(0.5)
        # Of the four that were dropped at least, one may have been in the middle of its 32 images.
        assert _metric(server, "fp8pipe_images_total") < 128 + 32
        assert _metric(server, "fp8pipe_queue_depth") == 0
        assert _metric(server, "fp8pipe_held_body_bytes") == 0
        assert httpx.get(f"{server.url}/readyz").status_code == 200
