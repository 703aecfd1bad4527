"""Runs a written decoder graph in ONNX Runtime one layer after the other.

The file is cut at the values between its layers (`Joints`). Each part is a session of its own, of nodes and tensors of
the file; what passes from part to part is kept. So only the weights of one layer are in memory, and all texts pass
through a layer, token by token where a cache is tried, before the next one is loaded.

In the wide form of a part, activations are not rounded, weights are dequantized, and FP16 is float32: the same
operators without rounding. Differences from torch then have the size of float32's own.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import onnx_ir as ir
import torch
from torch import Tensor

from exporters.graph.between import with_floats
from exporters.graph.parity import model_of, way_between
from exporters.graph.runtime import open_session, run
from exporters.tensorrt.half import dequantize_graph
from exporters.tensorrt.language.graph import LOGITS, Joints, cache_names
from exporters.tensorrt.language.target import CacheFacts

# A protobuf message is limited to 2 GB; larger parts are written to a temporary file.
_INLINE_BYTES: Final = 1_500_000_000


@dataclass(frozen=True, slots=True)
class Step:
    """Tokens that are run at once, after `start` earlier ones of the same sequences."""

    ids: Tensor  # `(batch, tokens)` int64
    start: int = 0

    @property
    def inputs(self) -> dict[str, Any]:
        """The graph's inputs, apart from its cache."""
        batch, count = self.ids.shape
        positions = np.arange(self.start, self.start + count, dtype=np.int64)[None].repeat(batch, 0)
        mask = np.ones((batch, self.start + count), np.int64)
        return {"input_ids": self.ids.numpy(), "attention_mask": mask, "position_ids": positions}


def in_steps(ids: Tensor, prompt: int) -> list[Step]:
    """The first `prompt` tokens of sequences at once, the others one by one."""
    edges = [(0, prompt), *((i, i + 1) for i in range(prompt, ids.shape[1]))]
    return [Step(ids[:, start:end], start) for start, end in edges]


@dataclass(frozen=True, slots=True)
class Chain:
    """A written graph that runs in parts."""

    graph: ir.Model  # as read from its file
    joints: Joints
    cache: CacheFacts | None  # None for a graph without a cache

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return len(self.joints.hidden) - 1

    def before(self, *, wide: bool) -> Any:
        """A session of all that is computed before the layers."""
        return self._session([], [self.joints.hidden[0], *self.joints.shared], wide=wide)

    def layer(self, index: int, *, wide: bool) -> Any:
        """A session of one layer."""
        present = cache_names([index], "present") if self.cache is not None else []
        return self._session([self.joints.hidden[index]], [self.joints.hidden[index + 1], *present], wide=wide)

    def head(self, *, wide: bool) -> Any:
        """A session of what follows the layers."""
        return self._session([self.joints.hidden[-1]], [LOGITS], wide=wide)

    def run(self, texts: Sequence[Tensor], *, wide: bool = False) -> Iterator[Tensor]:
        """Logits `(batch, tokens, vocabulary)` for each of `texts` `(batch, tokens)`, float32."""
        states = self.states([[Step(ids)] for ids in texts], wide=wide)
        for index in range(self.layers):
            states.advance(index, self.layer(index, wide=wide))
        yield from (torch.from_numpy(logits) for logits in states.logits(self.head(wide=wide)))

    def states(self, sequences: Sequence[Sequence[Step]], *, wide: bool) -> States:
        """Sequences on their way through the layers, before the first one."""
        before = self.before(wide=wide)
        kept = []
        for steps in sequences:
            rows = []
            for step in steps:
                given = step.inputs
                rows.append(given | run_part(before, given | self.empty(0, step, step.start, wide=wide)))
            kept.append(rows)
        return States(self, [list(steps) for steps in sequences], kept, wide)

    def empty(self, index: int, step: Step, length: int, *, wide: bool) -> dict[str, Any]:
        """A layer's cache of zeros, with the length that it has before a step."""
        if self.cache is None:
            return {}
        known = next(value for value in self.graph.graph.inputs if value.name == cache_names([0])[0])
        dtype = np.float16 if known.dtype == ir.DataType.FLOAT16 and not wide else np.float32
        zeros = np.zeros((len(step.ids), self.cache.heads, length, self.cache.size), dtype)
        return dict.fromkeys(cache_names([index]), zeros)

    def _session(self, reads: Sequence[str], makes: Sequence[str], *, wide: bool) -> Any:
        return open_part(self._part(reads, makes, wide=wide))

    def _part(self, reads: Sequence[str], makes: Sequence[str], *, wide: bool) -> Any:
        """The nodes from some values (and the graph's inputs, and what is shared by layers) to others, as a proto.

        Weights in NVFP4 are dequantized in any case, since ONNX Runtime has no kernels for them.
        """
        values = {str(value.name): value for value in self.graph.graph.inputs}
        for node in self.graph.graph:
            values |= {str(value.name): value for value in node.outputs}
        known = [values[name] for name in reads] + [values[name] for name in self.joints.shared if reads]
        outputs = [values[name] for name in dict.fromkeys(makes)]
        nodes, tensors, used = way_between([*known, *self.graph.graph.inputs], outputs)
        given = [ir.to_proto(value) for value in (*self.graph.graph.inputs, *dict.fromkeys(known)) if value in used]
        proto = model_of(
            self.graph, [ir.to_proto(node) for node in nodes], tensors, given, [ir.to_proto(value) for value in outputs]
        )
        blocks = any(value.dtype == ir.DataType.FLOAT4E2M1 for value in tensors)
        release(tensors)
        if not wide and not blocks:
            return proto
        part = ir.from_proto(proto)
        dequantize_graph(part)
        dequantized = ir.to_proto(part)
        return with_floats(dequantized, "float32") if wide else dequantized


@dataclass(frozen=True, slots=True)
class States:
    """Sequences on their way through the layers of a chain."""

    chain: Chain
    sequences: list[list[Step]]
    values: list[list[dict[str, Any]]]  # for each step, all values that were computed so far and are still needed
    wide: bool

    def advance(self, index: int, session: Any) -> None:
        """Pass through a layer; the steps of a sequence extend its cache one after the other."""
        read, made = self.chain.joints.hidden[index : index + 2]
        for steps, rows in zip(self.sequences, self.values, strict=True):
            past = self.chain.empty(index, steps[0], 0, wide=self.wide)
            for row in rows:
                found = run_part(session, row | past)
                past = {a: found[b] for a, b in zip(past, cache_names([index], "present"), strict=bool(past))}
                row[made] = found[made]
                if read not in self.chain.joints.shared:
                    del row[read]

    def logits(self, session: Any) -> Iterator[Any]:
        """Logits `(batch, tokens, vocabulary)` of one sequence after the other: those of all would be large."""
        for rows in self.values:
            yield np.concatenate([run_part(session, row)[LOGITS] for row in rows], 1)


def run_part(session: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """All outputs by name, given at least the inputs."""
    return run(session, {value.name: values[value.name] for value in session.get_inputs()})


def open_part(proto: Any) -> Any:
    """A session of a model in memory."""
    if sum(len(tensor.raw_data) for tensor in proto.graph.initializer) < _INLINE_BYTES:
        return open_session(proto.SerializeToString())
    with tempfile.TemporaryDirectory(prefix="fp8pipe-graph-") as folder:
        path = Path(folder) / "part.onnx"
        onnx.save(proto, path, save_as_external_data=True, location=f"{path.name}.data")
        return open_session(path)


def release(tensors: Iterable[ir.Value]) -> None:
    """Unmap tensors that lie in a file of their own."""
    for value in tensors:
        if isinstance(value.const_value, ir.ExternalTensor):
            with suppress(BufferError):  # an array that is still in use keeps its mapping
                value.const_value.release()
