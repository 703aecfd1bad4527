"""Gates of the export whose results have one value: codes and outputs of the whole net, compared bit for bit.

In the ordinary graph engine and torch differ in last bits between the products, so only layers can be compared that
were fed the same input. Here a float64 graph stands around integer products (`passes/islands.py`) and nothing is left
to the engine's choice (see `fp8pipe/models/vision/exact.py`), so the whole
network is compared: all codes on the way from the pixels to the answer, and the answer itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from exporters.graph.layers import ExportedLayer
from exporters.graph.reopen import operand_at_sites
from exporters.graph.runtime import open_session, run
from exporters.graph.trace import INPUT_NAME
from fp8pipe.artifact import Gate, none_of
from fp8pipe.models.vision.exact import ExactVit
from fp8pipe.models.vision.quantized import QuantizedVit

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["codes_gate", "outputs_gate"]

_CODE_IMAGES: Final = 16
_BATCH: Final = 8  # the codes of a whole net are kept for so many images at a time


def codes_gate(model: ir.Model, layers: Sequence[ExportedLayer], quantized: QuantizedVit, pixels: Tensor) -> Gate:
    """All activation codes on the way through the net, ONNX Runtime against torch.

    ONNX Runtime shows what each quantizer reads; the codes of that are made here, by the formula that the comparison of
    layers holds against its own.

    Args:
        model: the graph, as read from its file.
        layers: its layers.
        quantized: the artifact's model.
        pixels: images `(N, 3, H, W)`, normalized, fp32; only the first of them are compared.
    """
    exact, sites = ExactVit(quantized), operand_at_sites(layers, quantized)
    names = {site: str(operand.source.name) for site, operand in sites if operand is not None and operand.source}
    session = open_session(_with_sources(model, list(names.values())))
    compared = differing = 0
    pixels = pixels[:_CODE_IMAGES]
    for batch in torch.split(pixels, _BATCH):
        ours: dict[str, Tensor] = {}
        exact(batch, on_codes=ours.__setitem__)
        theirs = run(session, {INPUT_NAME: batch.numpy()})
        for site, name in names.items():
            mine = _in_layout(ours[site], site, quantized)
            compared += mine.numel()
            differing += _count(mine, quantized.activations[site].codes(torch.from_numpy(theirs[name])))
    detail = f"of {compared} in {len(names)} sites, {len(pixels)} images, each net on its own"
    return none_of("codes differing end to end", differing, detail)


def outputs_gate(expected: Tensor, found: Tensor) -> Gate:
    """Outputs of the net `(N, C)` fp32, bit for bit."""
    differing = int((expected.view(torch.int32) != found.view(torch.int32)).sum()) if _alike(expected, found) else -1
    detail = f"of {expected.numel()} for {len(expected)} images, bit for bit"
    return none_of("outputs differing end to end", expected.numel() if differing < 0 else differing, detail)


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype == torch.float32


def _count(a: Tensor, b: Tensor) -> int:
    return a.numel() if a.numel() != b.numel() else int((a.flatten() != b.flatten()).sum())


def _in_layout(codes: Tensor, site: str, quantized: QuantizedVit) -> Tensor:
    """The graph's order: keys transposed, pixels as rows of patches."""
    if site.endswith(".k"):
        return codes.transpose(-2, -1).contiguous()
    layer = quantized.model.get_submodule(site.removesuffix(".input")) if site.endswith(".input") else None
    if isinstance(layer, nn.Conv2d):
        return functional.unfold(codes.float(), layer.kernel_size, stride=layer.stride).transpose(1, 2).to(torch.int8)
    return codes


def _with_sources(model: ir.Model, names: Sequence[str]) -> bytes:
    """The graph with what its quantizers read as further outputs.

    Not the codes themselves: where QuantizeLinear is an output of the graph, ONNX Runtime multiplies in float.
    """
    import onnx
    import onnx_ir as ir

    proto: Any = ir.to_proto(model)
    proto.graph.output.extend(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names)
    return bytes(proto.SerializeToString())
