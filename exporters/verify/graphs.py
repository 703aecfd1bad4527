"""Two ONNX graphs, part by part: inputs, operators, attributes, wiring, and every stored number.

A graph is a function of the artifact it was made from, so it can be made again and compared. That finds what no look at
the file alone can find, and what an equal class on a few pictures hides: a factor applied twice, an epsilon, an axis.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from fp8pipe.artifact.finding import Check, Finding

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["compare_graphs", "compare_stored"]


def compare_graphs(found: ir.Model, expected: ir.Model) -> Iterator[Finding]:
    """Everything but stored numbers in which a file's graph differs from the one made again.

    Args:
        found: as read from the file.
        expected: as an export makes it.
    """
    for domain in sorted(found.opset_imports.keys() | expected.opset_imports.keys()):
        pair = found.opset_imports.get(domain), expected.opset_imports.get(domain)
        if pair[0] != pair[1]:
            yield _parity(f"opset {domain or 'ai.onnx'}", f"version {pair[0]}; expected {pair[1]}")
    for what, ours, theirs in (
        ("input", found.graph.inputs, expected.graph.inputs), ("output", found.graph.outputs, expected.graph.outputs),
    ):  # fmt: skip
        names = [_signature(value) for value in ours], [_signature(value) for value in theirs]
        for mine, wanted in zip(*names, strict=False):
            if mine != wanted:
                yield _parity(f"graph {what} {wanted[0]}", f"it is {mine}; expected {wanted}")
        if len(names[0]) != len(names[1]):
            yield _parity(f"graph {what}s", f"{len(names[0])} of them; expected {len(names[1])}")
    yield from _compare_nodes(list(found.graph), list(expected.graph))


def _signature(value: ir.Value) -> tuple[str, str, str]:
    return str(value.name), str(value.dtype), str(value.shape)


def _compare_nodes(found: list[ir.Node], expected: list[ir.Node]) -> Iterator[Finding]:
    """By the name of the first output, which every node has and no two share."""
    ours, theirs = ({str(n.outputs[0].name): n for n in nodes} for nodes in (found, expected))
    for name in theirs:
        if name not in ours:
            yield _parity(_label(theirs[name]), f"there is no such {theirs[name].op_type}")
    for name, node in ours.items():
        other = theirs.get(name)
        if other is None:
            yield _parity(_label(node), f"a {node.op_type} that no export writes")
            continue
        for what, mine, wanted in (
            ("operator", (node.domain, node.op_type), (other.domain, other.op_type)),
            ("name", node.name or "", other.name or ""),
            ("inputs", _names(node.inputs), _names(other.inputs)),
            ("outputs", _names(node.outputs), _names(other.outputs)),
        ):
            if mine != wanted:
                yield _parity(_label(other), f"{what}: {mine}; expected {wanted}")
        for key in sorted(node.attributes.keys() | other.attributes.keys()):
            pair = tuple(_attribute(n.attributes.get(key)) for n in (node, other))
            if pair[0] != pair[1]:
                yield _parity(_label(other), f"attribute {key}: {pair[0]}; expected {pair[1]}")


def compare_stored(found: ir.Model, expected: ir.Model) -> Iterator[Finding]:
    """Every stored tensor, by name: type, shape and bytes."""
    ours, theirs = found.graph.initializers, expected.graph.initializers
    for name in sorted(ours.keys() | theirs.keys()):
        if name not in ours:
            yield _parity(name, "this stored tensor is missing")
        elif name not in theirs:
            yield _parity(name, "a stored tensor that no export writes")
        else:
            yield from _compare_tensors(name, ours[name].const_value, theirs[name].const_value)


def _compare_tensors(name: str, found: Any, expected: Any) -> Iterator[Finding]:
    kinds = tuple((str(t.dtype), tuple(t.shape)) for t in (found, expected))
    if kinds[0] != kinds[1]:
        yield _parity(name, f"it is {kinds[0]}; expected {kinds[1]}")
        return
    mine, wanted = found.numpy(), expected.numpy()
    if mine.tobytes() != wanted.tobytes():
        width = mine.dtype.itemsize
        bits = [np.frombuffer(array.tobytes(), np.uint8).reshape(-1, width) for array in (mine, wanted)]
        differing = np.flatnonzero((bits[0] != bits[1]).any(1))
        first = int(differing[0])
        pair = tuple(str(array.reshape(-1)[first]) for array in (mine, wanted))
        why = f"{len(differing)} of {mine.size} numbers differ; number {first} is {pair[0]}, expected {pair[1]}"
        yield _parity(name, why)


def _names(values: Any) -> list[str]:
    return ["" if value is None else str(value.name) for value in values]


def _attribute(attribute: Any) -> Any:
    if attribute is None:
        return None
    value = attribute.value
    if hasattr(value, "numpy"):
        return str(value.dtype), tuple(value.shape), value.numpy().tolist()
    return list(value) if isinstance(value, list | tuple) else value


def _label(node: ir.Node) -> str:
    return str(node.name or f"{node.op_type} -> {node.outputs[0].name}")


def _parity(where: str, why: str) -> Finding:
    return Finding(Check.PARITY, where, why if len(why) <= 400 else why[:397] + "...")
