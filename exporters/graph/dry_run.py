"""What an export to ONNX takes in memory: packages and forward passes are measured here, copies of weights counted.

Tracing the model itself would take as long as exporting it. So a net of two layers is traced, which loads all that an
export loads; the artifact's model is run on as many images as the export compares; and the copies of its weights that
live at the same time are added.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, nn

from exporters.graph.images import PROBE_IMAGES
from exporters.graph.packages import import_onnx_package
from exporters.graph.runtime import open_session
from exporters.graph.trace import export_program
from fp8pipe.core.plan import PhaseMeter, can_measure
from fp8pipe.models.vision.quantized import QuantizedVit

__all__ = ["export_peak", "run_model"]

# fp32 copies of all weights at the worst moment, beside the artifact's own model: the models that are traced and
# compared, the graph, its serialized float form, the written file and ONNX Runtime's sessions. See docs/planning.md.
COPIES: Final = 6.0
_LAYER_IMAGES: Final = 4


def export_peak(quantized: QuantizedVit) -> int | None:
    """Peak resident memory of an export by this process, bytes; None where packages or the system do not allow it."""
    if not can_measure():
        return None
    with PhaseMeter() as meter:
        meter.enter("packages")
        _trace_two_layers()
        meter.enter("forward")
        run_model(quantized)
    floats = sum(4 * tensor.numel() for tensor in quantized.model.state_dict().values())
    return max(phase.peak_bytes for phase in meter.phases.values()) + int(COPIES * floats)


def _trace_two_layers() -> None:
    import_onnx_package("onnxruntime")
    net = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)).eval()
    dynamic = ({0: torch.export.Dim("batch")},)
    model = export_program(net, (torch.zeros(2, 8),), dynamic, "a net of two layers", "install torch and onnx again")
    import onnx_ir as ir

    open_session(ir.to_proto(model).SerializeToString())


@torch.no_grad()
def run_model(quantized: QuantizedVit) -> None:
    """The passes of an export, or of its validation, on empty images."""
    height, width = quantized.structure.image_size
    pixels = torch.zeros(PROBE_IMAGES, 3, height, width)
    passes: tuple[Callable[[Tensor], Any], ...] = (lambda x: quantized.taps(x[:_LAYER_IMAGES]), quantized)
    for run in passes:
        run(pixels)
