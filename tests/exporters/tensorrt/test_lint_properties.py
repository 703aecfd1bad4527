"""The linter on random graphs: good ones pass and are built as they say; names play no part in what is found."""

from __future__ import annotations

import random

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lint_cases import BROKEN, products
from small_graphs import chain

from exporters.tensorrt.builder import build_rtx
from exporters.tensorrt.lint import lint_typed

FORMS = st.sampled_from(["int8", "fp8"])
BASES = st.sampled_from([np.float16, np.float32])
BLOCKS = st.lists(
    st.tuples(
        st.integers(1, 8).map(lambda count: 32 * count),
        st.sampled_from(["MatMul", "Gemm"]),
        st.sampled_from(["", "Relu", "Sigmoid", "Tanh"]),
    ),
    min_size=1,
    max_size=4,
)


def renamed(model: ir.Model, seed: int) -> ir.Model:
    """Other names for every value, and for nodes other names or none."""
    names = random.Random(seed)
    for node in model.graph:
        node.name = names.choice(["", f"n{names.getrandbits(40):x}"])
        for output in node.outputs:
            if output not in model.graph.outputs:
                output.name = f"v{names.getrandbits(40):x}"
    for value in list(model.graph.initializers.values()):
        value.name = f"i{names.getrandbits(40):x}"
    return model


@given(form=FORMS, base=BASES, tokens=st.integers(1, 100), blocks=BLOCKS, seed=st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_good_graphs_have_no_findings(form, base, tokens, blocks, seed):
    assert lint_typed(renamed(chain(form, base, tokens, blocks), seed), ["8.9", "12.0"]).findings == ()


@given(form=FORMS, base=BASES, tokens=st.integers(16, 100), blocks=BLOCKS)
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_good_graphs_are_built_in_their_precision(tmp_path, form, base, tokens, blocks):
    pytest.importorskip("tensorrt_rtx")
    model = chain(form, base, tokens, blocks)
    assert lint_typed(model, ["8.9"]).findings == ()
    ir.save(model, tmp_path / "model.onnx")
    built = build_rtx(tmp_path / "model.onnx", tmp_path / "model.engine", ["8.9"], {})
    assert set(products(model, built).values()) == {form}


@given(case=st.sampled_from(BROKEN), seed=st.integers(0, 1000))
@settings(max_examples=120, deadline=None)
def test_what_is_found_does_not_depend_on_names(case, seed):
    expected = [finding.rule for finding in lint_typed(case.broken(), [case.capability]).findings]
    assert case.rule in expected
    found = lint_typed(renamed(case.broken(), seed), [case.capability]).findings
    assert sorted(finding.rule for finding in found) == sorted(expected)
    assert all(finding.where and finding.why and finding.fix for finding in found)


@given(case=st.sampled_from(BROKEN))
@settings(max_examples=30, deadline=None)
def test_a_graph_is_not_changed_by_being_linted(case):
    model = case.broken()
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    lint_typed(model, [case.capability])
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before
