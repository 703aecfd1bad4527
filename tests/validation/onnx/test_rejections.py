"""Each comparison of a validation can reject: one thing at a time is shown as wrong, and the record names its gate."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from quantized_families import quantized_family, write_vit_artifact

import validation.onnx.validate as validate
from exporters.graph.formats import OnnxFormat
from exporters.onnx.export import export_onnx
from exporters.onnx.target import OnnxExportOptions
from fp8pipe.artifact import none_of, open_artifact
from fp8pipe.artifact.record import ExportRejectedError, record_path
from fp8pipe.core.errors import Fp8PipeError
from validation.onnx.validate import validate_onnx


@pytest.fixture(scope="module")
def artifact(tmp_path_factory) -> Path:
    return write_vit_artifact(tmp_path_factory.mktemp("vit") / "v", quantized_family("timm-vit"), images=4).root


@pytest.fixture(scope="module")
def exports(artifact, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("exports")
    return {
        form.value: export_onnx(artifact, root / form.value, OnnxExportOptions(format=form)).root
        for form in (OnnxFormat.QDQ, OnnxFormat.QDQ_EXACT)
    }


def spoiled(monkeypatch, name, change):
    """A comparison's result becomes what `change` makes of it."""
    real = getattr(validate, name)
    monkeypatch.setattr(validate, name, lambda *given, **named: change(real(*given, **named)))


def first(**changes):
    """The first of some figures says something else."""
    return lambda report: [report[0].model_copy(update=changes), *report[1:]]


def no_class_agrees(classes):
    return classes.model_copy(update={"agreeing": 0})


REJECTIONS = [
    ("qdq", "compare_layers", first(error=1.0), "layer error"),
    ("qdq", "compare_layers", first(differing_codes=1), "activation codes differing"),
    ("qdq", "compare_layers", first(torch_error=1.0), "torch layer error"),
    ("qdq", "compare_classes", no_class_agrees, "top-1 agreement"),
    ("qdq", "check_kernels", lambda found: found.model_copy(update={"float_layers": ["x"]}), "layers run in float"),
    ("qdq", "reopen_gates", lambda gates: [*gates, none_of("a stored number", 1)], "a stored number"),
    ("qdq-exact", "reopen_gates", lambda gates: [*gates, none_of("a stored number", 1)], "a stored number"),
    ("qdq-exact", "codes_gate", lambda gate: none_of(gate.name, 1), "codes differing end to end"),
    ("qdq-exact", "outputs_gate", lambda gate: none_of(gate.name, 1), "outputs differing end to end"),
    ("qdq-exact", "check_kernels", lambda found: found.model_copy(update={"float_layers": ["x"]}), "run in float"),
]


@pytest.mark.parametrize(("form", "name", "change", "gate"), REJECTIONS)
def test_one_wrong_comparison_is_enough_to_reject(exports, artifact, monkeypatch, form, name, change, gate):
    spoiled(monkeypatch, name, change)
    with pytest.raises(ExportRejectedError) as rejected:
        validate_onnx(exports[form], against=artifact)
    assert gate in rejected.value.why
    record = json.loads(record_path(exports[form]).read_text())
    assert record["verdict"] == "REJECT"
    assert any(gate in reason for reason in record["reasons"])


@pytest.mark.parametrize("form", ["qdq", "qdq-exact"])
def test_other_numbers_of_the_engine_are_rejected_without_the_artifact_too(exports, monkeypatch, form):
    real_open, real_run, served = validate.open_session, validate.run, []

    def opened(path, **settings):
        session = real_open(path, **settings)
        if settings in ({}, {"optimize": True}):  # as in service, and not the plain graph that it is compared with
            served.append(session)
        return session

    def other(session, inputs):
        sign = -1 if any(session is each for each in served) else 1
        return {name: sign * value for name, value in real_run(session, inputs).items()}

    monkeypatch.setattr(validate, "open_session", opened)
    monkeypatch.setattr(validate, "run", other)
    with pytest.raises(ExportRejectedError):
        validate_onnx(exports[form])


def test_the_record_is_of_this_export_and_an_old_verdict_does_not_outlive_a_failure(exports, artifact, monkeypatch):
    export = exports["qdq"]
    record = validate_onnx(export, against=artifact)
    assert record.manifest_digest == open_artifact(export).digest
    assert record.reasons == []
    assert [gate.name for gate in record.gates if not gate.passed] == []
    assert {
        "weight codes differing", "weight scales differing", "activation quantizers differing",
        "float tensors differing", "float copies of quantized weights", "activation codes differing",
        "integer layer error", "torch layer error", "integer layers run in float", "top-1 agreement",
        "difference of outputs",
    } <= {gate.name for gate in record.gates}  # fmt: skip
    assert record_path(export).is_file()

    def broken(*given):
        raise Fp8PipeError("the engine fell over")

    monkeypatch.setattr(validate, "check_kernels", broken)
    with pytest.raises(Fp8PipeError, match="fell over"):
        validate_onnx(export, against=artifact)
    assert not record_path(export).exists()
