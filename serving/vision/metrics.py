"""What the vision server counts beside requests."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

from serving.http.metrics import LATENCY_BUCKETS_S, HttpMetrics

__all__ = ["VisionMetrics"]

_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)


class VisionMetrics(HttpMetrics):
    """Stages are decode, preprocess, queue and inference (of a whole batch)."""

    def __init__(self) -> None:
        super().__init__()
        at = self.registry
        stage = Histogram("fp8pipe_stage_seconds", "Time by stage.", ("stage",), buckets=LATENCY_BUCKETS_S, registry=at)
        self.decode, self.preprocess, self.queue, self.inference = (
            stage.labels(name) for name in ("decode", "preprocess", "queue", "inference")
        )
        self.queue_depth = Gauge("fp8pipe_queue_depth", "Images that wait for the engine.", registry=at)
        self.batch_size = Histogram("fp8pipe_batch_size", "Images at once.", buckets=_BATCHES, registry=at)
        self.images = Counter("fp8pipe_images", "Images answered.", registry=at)
        self.decode_errors = Counter("fp8pipe_decode_errors", "Images refused.", ("code",), registry=at)
        self.shed = Counter("fp8pipe_shed", "Requests refused or given up for load.", ("reason",), registry=at)
