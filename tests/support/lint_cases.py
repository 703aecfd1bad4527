"""Graphs that TensorRT refuses, computes wrongly or builds slowly: each a good one with one edit, and what is seen.

`seen` is what the real builder has to show: a pattern of its words where it refuses, else checks of what it built.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import ml_dtypes
import numpy as np
import onnx_ir as ir
from graph_edits import Edit, behind, both, drop, opset, replace, set_attributes, store
from lint_edits import (
    Seen,
    all_of,
    cast_activation,
    cast_multiply,
    constant,
    dynamic,
    empty_zero_point,
    float_operand,
    float_weight,
    launches,
    like,
    nan,
    no_zero_points,
    number,
    products,
    runs_in,
    second_quantizer,
    small,
    transposed_codes,
    transposed_weight,
    warned,
    weights_of,
)
from small_graphs import attention, convolution, gemm, mlp, nvfp4

__all__ = ["BROKEN", "GOOD", "HARMLESS", "Case", "Seen", "products", "small"]


@dataclass(frozen=True, slots=True)
class Case:
    """One broken graph.

    Attributes:
        rule: that has to find it.
        good: key of `GOOD`.
        edit: what breaks it.
        seen: the builder's words, as a pattern, or a check of what it built.
        capability: to compile for.
        node: the finding's node or tensor; any when empty.
        what: to tell cases of one rule apart.
    """

    rule: str
    good: str
    edit: Edit
    seen: str | Seen
    capability: str = "8.9"
    node: str = ""
    what: str = ""

    def __str__(self) -> str:
        return "-".join(filter(None, (self.rule, self.good, self.what)))

    def broken(self) -> ir.Model:
        """The graph."""
        model = GOOD[self.good]()
        self.edit(model)
        return model


GOOD: Final[dict[str, Callable[[], ir.Model]]] = {
    "int8": lambda: mlp("int8", "int8"),
    "fp8": lambda: mlp("fp8", "fp8"),
    "int8-fp32": lambda: mlp("int8", "int8", np.float32),
    "int4": lambda: mlp("int4", None),
    "int4-wide": lambda: mlp("int4", None, hidden=512),
    "int8-weights": lambda: mlp("int8", None),
    "fp8-weights": lambda: mlp("fp8", None),
    "int8-gemm": lambda: gemm("int8"),
    "fp8-gemm": lambda: gemm("fp8"),
    "fp8-convolution": lambda: convolution("fp8", 4),
    "int8-convolution": lambda: convolution("int8", 14),
    "int8-attention": lambda: attention("int8"),
    "fp8-attention": lambda: attention("fp8"),
    "fp8-separate": lambda: attention("fp8", joint=False),
    "fp8-separate-not-held": lambda: attention("fp8", joint=False, held=False),
    "nvfp4": nvfp4,
}


_ZERO = r"Non-zero zero point is not supported"
_POSITIVE = r"Scale coefficients must all be positive"
_TYPES = r"must have same input types"
_INITIALIZER = r"Failed to import initializer"
_BLOCKED = r"only the quantization axis may be blocked"
_CONSTANT = r"Quantized constant .* is only allowed before DQ"
_OLD = r"because the model contains HW-specific datatypes: .*{}"
_SAME = r"CHECK\(opndA->type\(\) == opndB->type\(\)\) failed"
_UNIT = np.array(0.0, np.float16), np.array(1.0, np.float16)
_BLOCKS = both(set_attributes("up_w_dq", axis=0, block_size=32), store("up_w_s", small((4, 256))))

BROKEN: Final = (
    Case("zero-point", "int8", store("up_x_z", number(3)), _ZERO, node="up_x_q", what="activation"),
    Case("zero-point", "int8", replace("up_w_dq", 2, np.full(256, 5, np.int8)), _ZERO, node="up_w_dq", what="weight"),
    Case("zero-point", "int8", store("up_x_z", lambda a: np.uint8(128)), _ZERO, node="up_x_q", what="uint8"),
    Case("empty-zero-point", "int8", empty_zero_point, r"Invalid Node - up_w_dq", node="up_w_dq"),
    Case("unsigned", "int8", store("up_x_z", lambda a: np.uint8(0)),
         all_of(warned("Defaulting to INT8 instead"), runs_in(up="int8")), node="up_x_q"),
    Case("unsigned", "int8", no_zero_points, runs_in(up="int8"), node="up_x_q", what="by-default"),
    Case("unsigned-weight", "int8", store("up_w", lambda a: a.view(np.uint8)), "unsupported input type of UINT8",
         node="up_w_dq"),
    Case("element-type", "fp8", store("up_w", lambda a: a.astype(np.float32).astype(ml_dtypes.float8_e5m2)),
         _INITIALIZER, node="up_w", what="e5m2"),
    Case("element-type", "fp8", store("up_w", lambda a: a.astype(np.float32).astype(ml_dtypes.float8_e4m3fnuz)),
         _INITIALIZER, node="up_w", what="fnuz"),
    Case("element-type", "fp8", store("up_x_z", lambda a: a.astype(ml_dtypes.float8_e5m2)), _INITIALIZER,
         node="up_x_z", what="e5m2-activation"),
    Case("element-type", "int4", store("up_w", lambda a: abs(a.astype(np.int8)).astype(ml_dtypes.uint4)),
         _INITIALIZER, node="up_w", what="uint4"),
    Case("scale-value", "int8", store("up_w_s", lambda a: np.where(np.arange(256) == 9, 0, a).astype(a.dtype)),
         _POSITIVE, node="up_w_dq", what="zero"),
    Case("scale-value", "int8", store("up_x_s", np.negative), _POSITIVE, node="up_x_q", what="negative"),
    Case("scale-value", "fp8", store("up_x_s", number(np.nan)), _POSITIVE, node="up_x_q", what="nan"),
    Case("scale-infinite", "int8", store("down_w_s", number(np.inf)), runs_in(down="int8"), node="down_w_dq"),
    Case("nan-code", "fp8", store("up_w", nan), runs_in(up="fp8"), node="up_w"),
    Case("scale-shape", "int8", store("up_w_s", lambda a: a[:255]), "K == scaleSize", node="up_w_dq", what="short"),
    Case("scale-shape", "int8", set_attributes("up_w_dq", axis=0), "K == scaleSize", node="up_w_dq", what="axis"),
    Case("scale-shape", "int8", store("up_w_s", lambda a: a[None]), _BLOCKED, node="up_w_dq", what="rank"),
    Case("scale-shape", "int4", store("up_w_s", np.transpose), _BLOCKED, node="up_w_dq", what="transposed-blocks"),
    Case("scale-shape", "int4", set_attributes("up_w_dq", axis=1), _BLOCKED, node="up_w_dq", what="block-axis"),
    Case("block-size", "int4", store("up_w_s", lambda a: a[:2]), constant((2, 256), "Half"), node="up_w_dq"),
    Case("operand-types", "int8", store("up_w_s", lambda a: a.astype(np.float32)), _TYPES, node="up", what="weight"),
    Case("operand-types", "int8", store("up_x_s", lambda a: a.astype(np.float32)), _TYPES, node="up",
         what="activation"),
    Case("operand-types", "int8-fp32", store("up_w_s", lambda a: a.astype(np.float16)), _TYPES, node="up"),
    Case("weight-axis", "int8", both(set_attributes("up_w_dq", axis=0), store("up_w_s", lambda a: a[:128])),
         runs_in(up="int8xfp16"), node="up_w_dq"),
    Case("weight-axis", "fp8", both(set_attributes("up_w_dq", axis=0), store("up_w_s", lambda a: a[:128])),
         runs_in(up="fp8xfp16"), node="up_w_dq"),
    Case("weight-axis", "int8-gemm", both(set_attributes("up_w_dq", axis=1), store("up_w_s", lambda a: a[:128])),
         runs_in(up="int8xfp16"), node="up_w_dq"),
    Case("activation-axis", "int8", both(store("up_x_s", like(128)), store("up_x_z", like(128))),
         runs_in(up="int8xfp16"), node="up_x_dq"),
    Case("activation-axis", "fp8", both(store("up_x_s", like(128)), store("up_x_z", like(128))),
         runs_in(up="fp8xfp16"), node="up_x_dq"),
    Case("dynamic-scale", "int8", dynamic, runs_in(up="fp16"), node="up_x_q"),
    Case("dynamic-scale", "fp8", dynamic, runs_in(up="fp16"), node="up_x_q"),
    Case("scaled-blocks", "int8", _BLOCKS,
         all_of(runs_in(up="int8"), constant((1, 1024), "Half")), node="up_w_dq"),
    Case("scaled-blocks", "fp8", _BLOCKS,
         all_of(runs_in(up="fp8"), constant((1, 1024), "Half")), node="up_w_dq"),
    Case("one-block", "int4", both(set_attributes("down_w_dq", block_size=256), store("down_w_s", small((1, 128)))),
         all_of(runs_in(down="fp16"), constant((256, 128), "Int4", "kgen", "Half")), node="down_w_dq", what="256"),
    Case("one-block", "int4", both(set_attributes("up_w_dq", axis=1, block_size=None), store("up_w_s", small((256,)))),
         all_of(runs_in(up="fp16"), constant((128, 256), "Int4", "kgen", "Half")), node="up_w_dq", what="channel"),
    Case("eight-bit-blocks", "int8-weights", _BLOCKS, constant((128, 256), "Int8", "kgen", "Half"), node="up_w_dq"),
    Case("eight-bit-blocks", "fp8-weights", _BLOCKS, constant((128, 256), "FP8", "kgen", "Half"), node="up_w_dq"),
    Case("mixed-codes", "fp8", store("up_w", weights_of("int8", (128, 256))), _SAME, node="up", what="int8-weight"),
    Case("mixed-codes", "int8", store("up_w", weights_of("fp8", (128, 256))), "has_sf_opnd_type", node="up",
         what="fp8-weight"),
    Case("mixed-codes", "fp8", store("up_w", weights_of("int4", (128, 256))), _SAME, node="up", what="int4-weight"),
    Case("int4-beside-int8", "int8", store("up_w", weights_of("int4", (128, 256))),
         all_of(runs_in(up="int8"), constant((128, 256), "Int4", "kgen", "Int8")), node="up"),
    Case("int4-activation", "int8", store("up_x_z", lambda a: a.astype(ml_dtypes.int4)), runs_in(up="int8"),
         node="up_x_q"),
    Case("half-quantized", "int8", float_operand, runs_in(up="int8xfp16"), node="up", what="activation"),
    Case("half-quantized", "fp8", float_operand, runs_in(up="fp8xfp16"), node="up", what="activation"),
    Case("half-quantized", "int8", drop("up_x_dq", "up_x_q"), runs_in(up="fp16", down="int8"), node="up",
         what="weight"),
    Case("half-quantized", "fp8-attention", drop("v_x_dq", "v_x_q"), runs_in(qk="fp8", av="fp16"), node="av",
         what="values"),
    Case("between", "int8", behind("up_x_dq", "Relu"), runs_in(up="fp16"), node="up", what="relu"),
    Case("between", "fp8", behind("up_x_dq", "Mul", np.full(128, 0.5, np.float16)), runs_in(up="fp16"), node="up",
         what="mul"),
    Case("between", "fp8", behind("up_w_dq", "Mul", np.full((128, 1), 0.5, np.float16)), runs_in(up="fp8xfp16"),
         node="up", what="weight"),
    Case("codes-undecoded", "int8", cast_multiply, _CONSTANT, node="up_w", what="cast"),
    Case("codes-undecoded", "fp8", cast_multiply, "has datatype FP8 but is not consumed by", node="up_w", what="cast"),
    Case("codes-undecoded", "int8", transposed_codes, _CONSTANT, node="up_w", what="transpose"),
    Case("cast-fp8", "fp8", cast_activation(17), "has datatype FP8 but is not produced by", node="chain_1"),
    Case("cast-int8", "int8", cast_activation(3), runs_in(up="fp16"), node="chain_1"),
    Case("fp8-convolution", "fp8-convolution",
         both(store("up_w", lambda a: np.resize(a, (64, 16, 5, 7))), set_attributes("up", kernel_shape=[5, 7])),
         runs_in(up="fp16"), node="up"),
    Case("moved-quantizers", "int8-attention", drop("q_clip"), runs_in(qkv="int8xfp16", qk="int8*"), node="qkv"),
    Case("moved-quantizers", "fp8-attention", drop("q_clip"), runs_in(qkv="fp8xfp16", qk="fp8*"), node="qkv"),
    Case("attention-part", "fp8-attention", drop("v_x_dq", "v_x_q", "probs_dq", "probs_q"),
         runs_in(qk="fp8", av="fp16"), node="softmax", what="second"),
    Case("attention-part", "int8-attention", drop("q_x_dq", "q_x_q", "k_x_dq", "k_x_q"),
         runs_in(qk="fp16", av="int8"), node="softmax", what="first"),
    Case("attention-part", "fp8-attention", drop("probs_dq", "probs_q"), runs_in(qk="fp8", av="fp8xfp16"),
         node="softmax", what="probabilities"),
    Case("clipped-fixed-probabilities", "int8-attention", behind("softmax", "Clip", *_UNIT), "mha_fusion.cpp",
         node="new"),
    Case("clipped-probabilities", "fp8-attention", behind("softmax", "Clip", *_UNIT), runs_in(qk="fp8", av="fp8"),
         node="new"),
    Case("several-quantizers", "fp8-separate", second_quantizer, all_of(runs_in(k="fp8"), launches("gemm", 3)),
         node="x"),
    Case("float-weight", "int8", float_weight, runs_in(up="int8"), node="up_w_q"),
    Case("opset", "fp8", opset(18), runs_in(up="fp8")),
    Case("opset", "nvfp4", opset(21), runs_in(up="fp4"), "12.0"),
    Case("fp8-capability", "fp8", both(), _OLD.format("fp8_e4m3"), "8.6"),
    Case("fp4-capability", "nvfp4", both(), _OLD.format("fp4_e2m1"), "8.9"),
    Case("int4-capability", "int4", both(), _OLD.format("int4"), "7.5"),
)  # fmt: skip

# Edits that are said to matter and did not: what the graph becomes, and what is built.
HARMLESS: Final[dict[str, tuple[str, Edit, Seen]]] = {
    "scale a tensor": ("int8", store("up_w_s", lambda a: a[0]), runs_in(up="int8")),
    "scale of one number": ("int8", store("up_x_s", np.atleast_1d), runs_in(up="int8")),
    "stored zero point": ("int8", replace("up_w_dq", 2, np.zeros(256, np.int8)), runs_in(up="int8")),
    "fp32 scale of QuantizeLinear": ("int8", replace("up_x_q", 1, np.array(0.02, np.float32)), runs_in(up="int8")),
    "scales along rows": (
        "fp8",
        both(store("up_x_s", like(64)), store("up_x_z", like(64)), set_attributes("up_x_q", axis=0),
             set_attributes("up_x_dq", axis=0)),
        runs_in(up="fp8"),
    ),
    "Cast behind a weight": (
        "fp8", both(store("up_w_s", lambda a: a.astype(np.float32)), behind("up_w_dq", "Cast", to=10)),
        runs_in(up="fp8"),
    ),
    "Transpose behind a weight": ("int8", transposed_weight, runs_in(up="int8")),
    "one factor behind a weight": ("int8", behind("up_w_dq", "Mul", np.array(0.5, np.float16)), runs_in(up="int8")),
    "one factor behind an activation": ("fp8", behind("up_x_dq", "Mul", np.array(0.5, np.float16)), runs_in(up="fp8")),
    "Reshape behind an activation": ("fp8", behind("up_x_dq", "Reshape", np.array([2, 32, 128])), runs_in(up="fp8")),
    "blocks along outputs": (
        "int4", both(set_attributes("up_w_dq", axis=1), store("up_w_s", small((128, 8)))), runs_in(up="fp16xint4")
    ),
    "two blocks of 256": (
        "int4-wide", both(set_attributes("down_w_dq", block_size=256), store("down_w_s", small((2, 128)))),
        runs_in(down="fp16xint4"),
    ),
    "a filter of 32 places": (
        "fp8-convolution",
        both(store("up_w", lambda a: np.resize(a, (64, 16, 4, 8))), set_attributes("up", kernel_shape=[4, 8])),
        runs_in(up="fp8"),
    ),
    "one block of 128 beside an activation": (
        "fp8", both(set_attributes("up_w_dq", axis=0, block_size=128), store("up_w_s", small((1, 256)))),
        runs_in(up="fp8"),
    ),
    "attention's factor behind its first product": (
        "fp8-attention", both(drop("times"), behind("qk", "Mul", np.array(0.125, np.float16))),
        runs_in(qkv="fp8", qk="fp8*"),
    ),
    "keys transposed behind their quantizer": (
        "int8-attention", both(drop("k_t"), behind("k_x_dq", "Transpose", perm=[0, 1, 3, 2])), runs_in(qk="int8*")
    ),
    "a mask": ("fp8-attention", behind("qk", "Add", np.zeros((1, 1, 64, 64), np.float16)), runs_in(av="fp8*")),
    "keys held in place of queries": (
        "fp8-attention",
        both(drop("q_clip"), behind("k_t", "Clip", np.array(-9, np.float16), np.array(9, np.float16))),
        runs_in(qkv="fp8", qk="fp8*"),
    ),
}  # fmt: skip
