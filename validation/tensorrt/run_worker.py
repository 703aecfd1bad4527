"""Runs and times an engine on a GPU, in a separate process: `python -P run_worker.py JOB`.

A separate process is needed because TensorRT keeps using the first logger of a process, and because a crashing kernel
must not crash the caller. JOB is a JSON file (see `run.run_engine`). TensorRT and TensorRT for RTX have the same
runtime classes; torch manages memory and streams.
"""

from __future__ import annotations

import importlib
import json
import statistics
import sys
from pathlib import Path
from typing import Any

_KEPT = ("INTERNAL_ERROR", "ERROR", "WARNING")


def main() -> int:
    """Run the job; returns exit code 0 if outputs and timings were written, 3 if the engine cannot be loaded."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    import numpy as np
    import torch

    trt = importlib.import_module(job["module"])
    logger = _logger(trt)
    engine = trt.Runtime(logger).deserialize_cuda_engine(Path(job["engine"]).read_bytes())
    answer: dict[str, Any] = {"version": trt.__version__, "loaded": engine is not None, "messages": logger.messages}
    if engine is not None:
        net = _Net(trt, torch, engine, job["input"], job["output"])
        pixels = torch.from_numpy(np.load(job["pixels"])).cuda()
        size = job["batch"]
        found = [net(pixels[start : start + size]).float().cpu() for start in range(0, len(pixels), size)]
        np.save(job["outputs"], torch.cat(found).numpy())
        answer["timings"] = {str(batch): net.time(pixels, batch, job["rounds"]) for batch in job["time_batches"]}
        answer["device"] = torch.cuda.get_device_name()
    Path(job["answer"]).write_text(json.dumps(answer), encoding="utf-8")
    return 0 if engine is not None else 3


class _Net:
    """An engine with one input and one output, on a CUDA stream of its own."""

    def __init__(self, trt: Any, torch: Any, engine: Any, source: str, result: str) -> None:
        self._torch, self._context = torch, engine.create_execution_context()
        self._source, self._result = source, result
        types = {trt.DataType.FLOAT: torch.float32, trt.DataType.HALF: torch.float16}
        self._input, self._output = (types[engine.get_tensor_dtype(name)] for name in (source, result))
        self._stream = torch.cuda.Stream()

    def __call__(self, pixels: Any) -> Any:
        with self._torch.cuda.stream(self._stream):
            output = self._bind(pixels)
            self._execute()
        self._stream.synchronize()
        return output

    def time(self, pixels: Any, batch: int, rounds: int) -> float:
        """Median time of `rounds` runs with batch size `batch` in milliseconds, measured with CUDA events."""
        torch, times = self._torch, []
        repeated = pixels[torch.arange(batch, device=pixels.device) % len(pixels)]
        with torch.cuda.stream(self._stream):
            self._output_kept = self._bind(repeated)
            for _ in range(max(rounds // 5, 3)):
                self._execute()
            for _ in range(rounds):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record(self._stream)
                self._execute()
                end.record(self._stream)
                end.synchronize()
                times.append(start.elapsed_time(end))
        return float(statistics.median(times))

    def _bind(self, pixels: Any) -> Any:
        self._input_kept = pixels.to(self._input).contiguous()
        self._context.set_input_shape(self._source, tuple(pixels.shape))
        shape = tuple(self._context.get_tensor_shape(self._result))
        output = self._torch.empty(shape, dtype=self._output, device=pixels.device)
        self._context.set_tensor_address(self._source, self._input_kept.data_ptr())
        self._context.set_tensor_address(self._result, output.data_ptr())
        return output

    def _execute(self) -> None:
        if not self._context.execute_async_v3(self._stream.cuda_stream):
            raise RuntimeError("execute_async_v3 failed")


def _logger(trt: Any) -> Any:
    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.messages: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity.name in _KEPT:
                self.messages.append(message)

    return Logger()


if __name__ == "__main__":
    sys.exit(main())
