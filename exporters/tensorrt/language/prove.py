"""Gates on a written decoder graph that runs layer by layer, each layer on the input that it has in torch.

One pass of a held-out text through the model in torch gives every decoder layer its true input. With the weights of the
layer in memory, three comparisons are made: its linears with exact sums of their codes, the whole layer (without
rounding of activations) with the output in torch, and decoding with its cache with whole sequences, up to the head. So
every operator of the file is compared with torch, those before and behind the layers, too, and an error is named with
its layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import onnx_ir as ir
import torch
from torch import Tensor

from exporters.graph.layers import read_layers
from exporters.graph.parity import LayerParity, layer_error
from exporters.tensorrt.language.calibrate import pre_hooks
from exporters.tensorrt.language.chain import Chain, States, Step, in_steps, release, run_part
from exporters.tensorrt.language.graph import LOGITS
from exporters.tensorrt.language.predict import PROMPT, decode_gate, decoded, unrounded_session
from exporters.tensorrt.language.reopen import compare_part, keepers, part_gates
from exporters.tensorrt.language.stream import LayerStream
from exporters.tensorrt.language.target import WHOLE_BYTES
from exporters.tensorrt.target import Base
from fp8pipe.artifact import Gate, at_most
from fp8pipe.core.errors import BadArtifactError, one_line
from fp8pipe.models.language.text import Encoded

# Largest error of a decoder layer relative to its largest output. Sums in float32 differ by some 1e-6. Constants of the
# graph (the factor of attention, biases) are rounded to the base type: in FP16 by up to 2^-11.
LAYER_LIMITS: Final = {Base.FP32: 1e-4, Base.FP16: 5e-3}
WHOLE_LIMIT: Final = 1 / 30


def layered_gates(
    path: Path, chain: Chain, stream: LayerStream, example: Encoded, text: Sequence[Encoded], base: Base
) -> list[Gate]:
    """Compare every layer of a written graph with torch on the input that it has there, and its cache with none.

    `stream` must be in float32, without hooks; `example` is the text that runs in torch, `text` begins with those that
    are decoded.
    """
    proof = _Proof(ir.load(path), chain, stream, torch.tensor([example.input_ids]))
    sequences = decoded(text) if chain.cache is not None else []
    proof.states = chain.states([*([Step(ids)] for ids in sequences), *(in_steps(ids, PROMPT) for ids in sequences)],
                                wide=True)  # fmt: skip
    stream.after.append(proof.compare)
    names = list(stream.source.weights)
    try:
        with pre_hooks(stream.model, keepers(names, proof.seen)):
            (logits,) = stream.run([proof.ids])
    finally:
        stream.after.remove(proof.compare)
    head = chain.head(wide=True)
    found = run_part(head, proof.shared | {chain.joints.hidden[-1]: proof.last.numpy()})[LOGITS]
    proof.errors["the head"] = layer_error(torch.from_numpy(found), logits)
    gates = [*part_gates(proof.report), _errors_gate(proof.errors, LAYER_LIMITS[base])]
    if not sequences:
        return gates
    made = list(proof.states.logits(head))
    return [*gates, decode_gate(list(zip(made[: len(sequences)], made[len(sequences) :], strict=True)))]


def _errors_gate(errors: Mapping[str, float], limit: float) -> Gate:
    """The gate on whole decoder layers; NaN is the worst."""
    worst = max(errors, key=lambda name: math.inf if math.isnan(errors[name]) else errors[name])
    detail = f"of {len(errors)} parts of the graph from torch, over the largest output; the worst: {worst}"
    return at_most("decoder layer error", errors[worst], limit, f"{detail}; activations not quantized")


@dataclass(slots=True)
class _Proof:
    """What is compared while the model runs in torch."""

    linears: ir.Model  # the written graph; the tensors that linears store become float32
    chain: Chain
    stream: LayerStream
    ids: Tensor
    states: States = field(init=False)
    seen: dict[str, Tensor] = field(default_factory=dict)  # inputs of linears, by name
    shared: dict[str, Any] = field(default_factory=dict)  # values computed before the layers
    errors: dict[str, float] = field(default_factory=dict)
    report: list[LayerParity] = field(default_factory=list)
    last: Tensor = field(init=False)  # what the last layer returned

    def compare(self, index: int, read: list[Tensor], made: list[Tensor]) -> None:
        """Compare one layer, which has just run."""
        names = self.chain.joints.hidden
        if index == 0:
            (rows,) = self.chain.states([[Step(self.ids)]], wide=True).values
            self.shared = rows[0]
            before = torch.from_numpy(self.shared[names[0]])
            self.errors["what precedes the layers"] = layer_error(before, read[0])
        session, place = self.chain.layer(index, wide=True), f"{self.stream.prefix}.{index}"
        given = self.shared | self.chain.empty(index, Step(self.ids), 0, wide=True) | {names[index]: read[0].numpy()}
        found = run_part(session, given)[names[index + 1]]
        self.errors[place] = layer_error(torch.from_numpy(found), made[0])
        self.states.advance(index, session)
        del session
        layers = read_layers(self.linears, [name for name in self.seen if name.startswith(f"{place}.")])
        self.report += compare_part(layers, self.linears, self.seen)
        release(self.linears.graph.initializers.values())
        self.seen.clear()
        self.last = made[0]


def check_structure(path: Path) -> None:
    """Check the whole file with ONNX's own checker and shape inference; tensors beside it are not read into memory.

    Raises:
        BadArtifactError: it finds an error.
    """
    import onnx

    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:  # the checker and the inference raise errors of no common type
        raise BadArtifactError(
            "ONNX's checker refuses the written graph", why=one_line(error, 600),
            fix="use versions of torch, onnxscript and transformers that this project was tested with",
        ) from error  # fmt: skip


def whole_gate(path: Path, chain: Chain, text: Sequence[Encoded], base: Base) -> Gate | None:
    """Compare the file run at once with its layers run one after the other; None for a file that is too large.

    Activations are not rounded: a rounded model amplifies a difference in the last bit. FP16 is rounded at other places
    in the two runs, which stays far below the limit.
    """
    files = [path, *path.parent.glob(f"{path.name}.data")]
    if sum(file.stat().st_size for file in files) > WHOLE_BYTES:
        return None
    ids = torch.tensor([text[0].input_ids])
    (layered,) = chain.run([ids], wide=True)
    whole = torch.from_numpy(unrounded_session(path, chain.cache, base).logits(ids))
    error = layer_error(whole, layered)
    return at_most("logits of the whole graph against its layers", error, WHOLE_LIMIT, "over the largest logit")
