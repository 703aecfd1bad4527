"""The linter against the real builder: what it refuses is refused or built worse, and what it accepts is built well."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from breadth import only_long
from lint_cases import BROKEN, GOOD, HARMLESS, Case, products
from quantized_families import storable_graph

from exporters.tensorrt.builder import Built, build_rtx
from exporters.tensorrt.half import halve
from exporters.tensorrt.lint import RULES, Effect, lint_file, lint_typed
from fp8pipe.core.errors import BadArtifactError, GateFailedError
from fp8pipe.numerics.kinds import Kind

LOW = {"int8": "int8", "fp8": "fp8", "nvfp4": "fp4"}


@pytest.fixture
def build(tmp_path):
    pytest.importorskip("tensorrt_rtx")

    def run(model: ir.Model, capability: str) -> Built:
        ir.save(model, tmp_path / "model.onnx")
        return build_rtx(tmp_path / "model.onnx", tmp_path / "model.engine", [capability], {})

    return run


def test_every_rule_has_a_case():
    assert {case.rule for case in BROKEN} == set(RULES)


@pytest.mark.parametrize("name", GOOD)
def test_good_graphs_pass_and_are_built_as_they_say(name, build):
    model = GOOD[name]()
    capability = "12.0" if name == "nvfp4" else "8.9"
    assert lint_typed(model, [capability]).findings == ()
    found = products(model, build(model, capability))
    low = LOW.get(name.partition("-")[0])
    if low and "weights" not in name:
        assert {text.rstrip("*") for text in found.values()} == {low}
    if "attention" in name or "separate" in name:
        assert found["qk"] == found["av"] == f"{low}*"


@pytest.mark.parametrize("case", BROKEN, ids=str)
def test_a_broken_graph_is_found_and_the_builder_refuses_or_degrades_it(case: Case, build):
    model = case.broken()
    report = lint_typed(model, [case.capability])
    found = [finding for finding in report.findings if finding.rule == case.rule]
    assert found, report
    assert not case.node or case.node in {finding.where for finding in found}, found
    effect = RULES[case.rule].effect
    assert (found[0] in report.errors()) == (effect is not Effect.WARNING)
    assert (found[0] in report.errors(require=False)) == (effect in (Effect.REFUSED, Effect.WRONG))
    if isinstance(case.seen, str):
        assert Effect.REFUSED in {RULES[finding.rule].effect for finding in report.findings}
        with pytest.raises(GateFailedError, match=case.seen):
            build(model, case.capability)
    else:
        assert effect is not Effect.REFUSED
        assert case.seen(model, build(model, case.capability)) == ""


@pytest.mark.parametrize("case", BROKEN, ids=str)
def test_the_graph_before_the_edit_has_no_such_finding(case: Case):
    capability = "12.0" if case.rule.endswith("-capability") else case.capability
    assert case.rule not in {finding.rule for finding in lint_typed(GOOD[case.good](), [capability]).findings}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_changes_nothing_is_accepted(name, build):
    good, edit, seen = HARMLESS[name]
    model = GOOD[good]()
    edit(model)
    assert lint_typed(model, ["8.9"]).findings == ()
    assert seen(model, build(model, "8.9")) == ""


def outputs(case: Case) -> np.ndarray:
    """Of ONNX's own reference evaluator."""
    from onnx.reference import ReferenceEvaluator

    proto = ir.to_proto(case.broken())
    pixels = np.random.default_rng(2).normal(size=(64, 128)).astype(np.float16)
    return ReferenceEvaluator(proto).run(None, {"x": pixels})[0]


@pytest.mark.parametrize("rule", ["scale-infinite", "nan-code"])
def test_numbers_that_no_builder_refuses_make_every_output_nan(rule):
    """The builder says nothing; so what the graph computes is the reason to refuse it."""
    case = next(case for case in BROKEN if case.rule == rule)
    with np.errstate(all="ignore"):
        assert np.isnan(outputs(case)).all()


def test_all_findings_come_at_once():
    model = GOOD["int8"]()
    names = ("zero-point-int8-weight", "between-int8-relu", "scale-value-int8-negative")
    chosen = [case for case in BROKEN if str(case) in names]
    for case in chosen:
        case.edit(model)
    found = {finding.rule for finding in lint_typed(model).errors()}
    assert {case.rule for case in chosen} == found
    assert len(chosen) == len(names)


# Tracing takes seconds a graph. Both libraries' plain transformer in every kind; the others differ in what lies between
# quantized layers, which no kind changes: one kind each, and for swin the one whose blocks do not fit every layer.
PLAIN, OTHERS = ("timm-vit", "hf-vit"), ("hf-clip", "hf-swin", "timm-swin")
USUAL = {("hf-clip", Kind.INT), ("hf-swin", Kind.NVFP4)}


def _cost(name, kind):
    return () if name in PLAIN or (name, kind) in USUAL else only_long


@pytest.mark.parametrize(
    ("name", "kind"), [pytest.param(n, k, marks=_cost(n, k)) for n in PLAIN + OTHERS for k in Kind]
)
def test_graphs_of_this_project_have_no_errors(name, kind):
    """Four bits need a Clip behind the softmax, which costs the fusion and nothing else: a warning."""
    model = storable_graph(name, kind)
    halve(model)
    report = lint_typed(model, ["12.0"] if kind is Kind.NVFP4 else ["8.9", "12.0"])
    assert report.errors() == ()
    assert {finding.rule for finding in report.findings} == ({"clipped-probabilities"} if kind is Kind.INT else set())


def test_a_file_is_read_and_no_file_is_said_so(tmp_path):
    model = GOOD["int8"]()
    ir.save(model, tmp_path / "model.onnx", external_data="model.data")
    assert lint_file(tmp_path / "model.onnx", ["8.9"]).findings == ()
    (tmp_path / "bad.onnx").write_bytes(b"no graph")
    with pytest.raises(BadArtifactError, match="cannot be read"):
        lint_file(tmp_path / "bad.onnx")
