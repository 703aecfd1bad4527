"""An ONNX graph as a LitServe application: the peer of the vision server.

    python serve_litserve.py GRAPH PORT --max-batch 8 --threads 1 --workers 2

A request is JSON with the pixels of one image in base64 (float32); the answer holds the class with the largest output.
Batches are formed as LitServe does it. Runs in LitServe's environment.
"""

from __future__ import annotations

import argparse
import base64

import litserve
import numpy as np
import onnxruntime


class Classifier(litserve.LitAPI):
    """Runs batches of images in ONNX Runtime."""

    def __init__(self, graph: str, threads: int, **options: object) -> None:
        super().__init__(**options)
        self.graph, self.threads = graph, threads

    def setup(self, device: str) -> None:
        """Open the graph, in a worker process."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = self.threads, 3
        self.session = onnxruntime.InferenceSession(self.graph, options, providers=["CPUExecutionProvider"])
        self.input = self.session.get_inputs()[0]

    def decode_request(self, request):  # LitServe reads a type here, and parses JSON if there is none
        """The pixels (3, H, W) of a request."""
        return np.frombuffer(base64.b64decode(request["pixels"]), np.float32).reshape(self.input.shape[1:])

    def batch(self, inputs: list[np.ndarray]) -> np.ndarray:
        """(N, 3, H, W) of the images of N requests."""
        return np.stack(inputs)

    def predict(self, pixels: np.ndarray) -> np.ndarray:
        """Outputs (N, C)."""
        pixels = pixels if pixels.ndim == 4 else pixels[None]
        return self.session.run(None, {self.input.name: pixels})[0]

    def unbatch(self, output: np.ndarray) -> list[np.ndarray]:
        """One row of outputs per request."""
        return list(output)

    def encode_response(self, output: np.ndarray) -> dict:
        """The answer to one request."""
        return {"class": int(np.asarray(output).reshape(-1).argmax())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("graph")
    parser.add_argument("port", type=int)
    parser.add_argument("--max-batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    api = Classifier(options.graph, options.threads, max_batch_size=options.max_batch, batch_timeout=0.002)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=options.workers, timeout=120)
    server.run(host="127.0.0.1", port=options.port, log_level="warning", generate_client_file=False)


if __name__ == "__main__":
    main()
