"""The rules, each with what the builder does with a graph that breaks it, and how to fix the graph.

Every effect was observed in a real builder (TensorRT for RTX 1.7.1.116), and the tests reproduce it there. Some rules
are often recommended but made no difference there, so breaking them is not an error here: a Cast or a Transpose after
DequantizeLinear, scaling attention after its first matrix multiplication, and scales along the rows of an activation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import onnx_ir as ir

from fp8pipe.artifact.finding import Finding


class Effect(StrEnum):
    """What a builder does with a graph that breaks the rule.

    `refused`: the build fails. `wrong`: it builds without an error, but the engine computes something other than the
    graph says, or NaN. `degraded`: it builds, but multiplies in another precision or uses more kernels. `warning`:
    codes are multiplied as the graph says, or the graph cannot be written in a better way; this is reported, but the
    graph is not refused.
    """

    REFUSED = "refused"
    WRONG = "wrong"
    DEGRADED = "degraded"
    WARNING = "warning"


@dataclass(frozen=True, slots=True)
class Rule:
    """Something that a graph must not contain."""

    effect: Effect  # the effect on the builder
    fix: str  # what the author of the graph can do


_R, _W, _D, _N = Effect.REFUSED, Effect.WRONG, Effect.DEGRADED, Effect.WARNING
RULES: Final[Mapping[str, Rule]] = {
    "zero-point": Rule(_R, "quantize symmetrically: zero point 0, and a Clip where the range is not symmetric"),
    "empty-zero-point": Rule(_R, "leave the operand out, or store zeros"),
    "unsigned": Rule(_W, "quantize to INT8 with a stored zero point of INT8"),
    "unsigned-weight": Rule(_R, "store the weight as INT8 codes with zero point 0"),
    "element-type": Rule(_R, "store codes as INT8, INT4, E4M3 or E2M1"),
    "scale-value": Rule(_R, "store positive, finite scales, also for channels that are all zero"),
    "scale-infinite": Rule(_W, "store finite scales"),
    "nan-code": Rule(_W, "quantize the weight again, with saturation"),
    "scale-shape": Rule(_R, "store one scale per tensor, one for each channel of the axis, or one per block"),
    "block-size": Rule(_W, "set block_size to the length of the axis divided by the number of scales along it"),
    "operand-types": Rule(_R, "give DequantizeLinear scales of the dtype of the other operand"),
    "weight-axis": Rule(_D, "give a weight one scale for each output channel"),
    "activation-axis": Rule(_D, "give an activation one scale per tensor"),
    "dynamic-scale": Rule(_D, "calibrate the scale on data and store it, or quantize only weights"),
    "scaled-blocks": Rule(_W, "use one scale for each output channel; blocks need float activations"),
    "one-block": Rule(_D, "use blocks of 32, at least two along the inputs"),
    "eight-bit-blocks": Rule(_D, "use one scale for each output channel, or 4-bit codes in blocks"),
    "mixed-codes": Rule(_R, "quantize both operands to the same type"),
    "int4-beside-int8": Rule(_N, "store the same codes as INT8"),
    "int4-activation": Rule(_N, "quantize activations to INT8, with a Clip to the 4-bit range"),
    "half-quantized": Rule(_D, "quantize both operands, or neither"),
    "between": Rule(_D, "move the operator before QuantizeLinear, or after the matrix multiplication"),
    "codes-undecoded": Rule(
        _R, "let only DequantizeLinear read stored codes, in the layout of the matrix multiplication"
    ),
    "cast-fp8": Rule(_R, "replace Div, Cast, Cast and Mul by QuantizeLinear and DequantizeLinear"),
    "cast-int8": Rule(_D, "replace Div, Round, Cast, Cast and Mul by QuantizeLinear and DequantizeLinear"),
    "fp8-convolution": Rule(_D, "write a convolution without overlapping patches as a MatMul, or keep it in float"),
    "moved-quantizers": Rule(
        _D, "insert a Clip to the value's range before one of the QuantizeLinear: it is not moved"
    ),
    "attention-part": Rule(_D, "quantize all four operands of an attention, or none"),
    "clipped-probabilities": Rule(_N, "quantize probabilities to 8 bits, which need no Clip"),
    "clipped-fixed-probabilities": Rule(_R, "remove the Clip after Softmax, or make the batch dimension dynamic"),
    "several-quantizers": Rule(_N, "quantize a value once, with one scale, for all of its consumers"),
    "float-weight": Rule(_N, "store codes, and only a DequantizeLinear"),
    "opset": Rule(_N, "declare opset 21, or 23 for E2M1"),
    "fp8-capability": Rule(_R, "compile for 8.9 or later, or use INT8"),
    "fp4-capability": Rule(_R, "compile for 12.0 or later, or use INT4 weights"),
    "int4-capability": Rule(_R, "compile for 8.0 or later, or use INT8"),
}


@dataclass(frozen=True, slots=True)
class Report:
    """Everything found in one graph."""

    # in the order of the rules' modules; `RULES[finding.rule].effect` gives the effect of each
    findings: tuple[Finding, ...]

    def errors(self, *, require: bool = True) -> tuple[Finding, ...]:
        """Findings that forbid a build; without `require`, findings that only change the precision are not errors."""
        accepted = {Effect.WARNING} if require else {Effect.WARNING, Effect.DEGRADED}
        return tuple(found for found in self.findings if RULES[found.rule].effect not in accepted)

    def warnings(self, *, require: bool = True) -> tuple[Finding, ...]:
        """All findings that are not errors with the same `require`."""
        errors = self.errors(require=require)
        return tuple(found for found in self.findings if found not in errors)

    def waivable(self, *, require: bool = True) -> str:
        """A hint that --no-require accepts the errors that only change the precision; empty if there are none."""
        rules = {found.rule for found in self.errors(require=require) if RULES[found.rule].effect is Effect.DEGRADED}
        if not rules:
            return ""
        shown = ", ".join(sorted(rules))
        return f"or give --no-require, which accepts findings that only change the precision: {shown}"

    def summary(self, *, require: bool = True) -> tuple[str, ...]:
        """The warnings, one sentence per rule: how many, and where the first one is."""
        by_rule: dict[str, list[Finding]] = {}
        for found in self.warnings(require=require):
            by_rule.setdefault(found.rule, []).append(found)
        return tuple(
            f"{rule}: {first.why} ({f'{1 + len(rest)} times, first at ' if rest else ''}{first.where})"
            for rule, (first, *rest) in by_rule.items()
        )


def finding(rule: str, where: ir.Node | ir.Value | str, why: str) -> Finding:
    """A finding together with its rule's fix."""
    return Finding(rule, where if isinstance(where, str) else label(where), why, RULES[rule].fix)


def label(thing: ir.Node | ir.Value) -> str:
    """A name for messages: that of a node or value; for an unnamed node, its type and the unique name of its output."""
    if thing.name or isinstance(thing, ir.Value):
        return str(thing.name)
    return f"{thing.op_type} -> {thing.outputs[0].name}"
