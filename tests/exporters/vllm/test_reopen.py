"""Each comparison of a written export with its source fails at the smallest difference of its kind, and alone."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from artifact_tree import rehash
from safetensors.torch import load_file, save_file
from torch import Tensor

from exporters.vllm.export import export_vllm, plan_export
from exporters.vllm.options import VllmExportOptions
from exporters.vllm.plan import Action, Unit
from exporters.vllm.reopen import (
    BF16_ERROR_BOUND,
    E4M3_ERROR_BOUND,
    _larger,
    expected_blocks,
    iter_weights,
    reopen,
)
from exporters.vllm.reopen_files import none_differing
from fp8pipe.models.checkpoint.tensors import weight_entries

Q, NORM = "model.layers.0.self_attn.q_proj.weight", "model.norm.weight"
Edit = Callable[[dict[str, Tensor]], None]


@pytest.fixture(scope="module")
def sources(make_model: Callable[..., Path], language_artifact: Callable[..., Path]) -> dict[str, Path]:
    """A model of codes, a plain one, and one in fp32."""
    codes = language_artifact("llama", granularity="per-channel")
    return {"codes": codes, "plain": make_model("llama"), "fp32": make_model("llama", dtype=torch.float32)}


@pytest.fixture(scope="module")
def exported(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    made: dict[tuple[str, str], Path] = {}

    def once(source: str, form: str) -> Path:
        if (source, form) not in made:
            place = tmp_path_factory.mktemp("exports") / "x"
            made[source, form] = export_vllm(sources[source], place, VllmExportOptions(format=form)).root
        return made[source, form]

    return once


def next_bit(name: str, place: int = 7) -> Edit:
    """One element's last bit is another."""

    def edit(tensors: dict[str, Tensor]) -> None:
        tensor = tensors[name]
        tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()]).view(-1)[place] ^= 1

    return edit


def put(name: str, make: Callable[[Tensor], Tensor]) -> Edit:
    return lambda tensors: tensors.__setitem__(name, make(tensors[name]))


CASES = [
    ("codes", "fp8", next_bit(Q), {"weights-bit-exact": 1}),
    ("codes", "fp8", next_bit(Q + "_scale"), {"weights-bit-exact": 1}),
    ("codes", "w8a16", put(Q, lambda t: t.view(torch.uint8).T.contiguous().view(t.dtype)), {"weights-bit-exact": 1}),
    ("codes", "fp8", next_bit(NORM), {"copied-tensors-identical": 1}),
    ("codes", "fp8", next_bit("lm_head.weight"), {"copied-tensors-identical": 1}),
    ("codes", "bf16", next_bit(Q), {"weights-bit-exact": 1}),
    ("codes", "bf16", put(Q, lambda t: t * 1.0625),
     {"weights-bit-exact": 1, "bf16-rounding-error": pytest.approx(0.0625, rel=0.1)}),
    ("codes", "bf16", next_bit(NORM), {"copied-tensors-identical": 1}),
    ("plain", "fp8", next_bit(Q), {"weights-bit-exact": 1}),
    ("plain", "fp8", next_bit(Q + "_scale"), {"weights-bit-exact": 1}),
    ("plain", "fp8", put(Q + "_scale", lambda t: t * 1.25),
     {"weights-bit-exact": 1, "e4m3-rounding-error": pytest.approx(0.25, rel=0.2)}),
    ("fp32", "bf16", next_bit(Q), {"weights-bit-exact": 1}),
    ("fp32", "bf16", next_bit(NORM), {"weights-bit-exact": 1}),
    ("codes", "fp8", lambda tensors: tensors.__delitem__(NORM), {"tensors-as-planned": 1}),
    ("codes", "fp8", put(NORM, lambda t: t.float()), {"tensors-as-planned": 1}),
    ("codes", "fp8", put(NORM, lambda t: t[:-1]), {"tensors-as-planned": 1}),
    ("codes", "fp8", lambda tensors: tensors.update(extra=torch.zeros(2), other=torch.zeros(2)),
     {"tensors-as-planned": 2}),
]  # fmt: skip


@pytest.mark.parametrize(("source", "form", "edit", "expected"), CASES)
def test_the_smallest_difference_fails_its_gate_alone(sources, exported, tmp_path, source, form, edit, expected):
    root = shutil.copytree(exported(source, form), tmp_path / "x")
    plan = plan_export(sources[source], VllmExportOptions(format=form))
    counted = []
    whole = reopen(plan, root, lambda: counted.append(1))
    assert [gate.name for gate in whole if not gate.passed] == []
    assert len(counted) == len(plan.units)
    names = {gate.name for gate in whole}
    assert {"tensors-as-planned", "weights-bit-exact", "copied-tensors-identical", "payload-bytes",
            "auxiliary-files-identical", "config-preserved"} <= names  # fmt: skip
    assert ("e4m3-rounding-error" in names) == (source == "plain" and form != "bf16")
    assert ("bf16-rounding-error" in names) == (form == "bf16")
    tensors = load_file(root / "model.safetensors")
    edit(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, root / "model.safetensors")
    assert {gate.name: gate.value for gate in reopen(plan, root) if not gate.passed} == expected


def test_the_bounds_are_half_a_unit_in_the_last_place():
    assert (E4M3_ERROR_BOUND, BF16_ERROR_BOUND) == (0.0625 * 1.001, 0.00390625 * 1.001)


def test_the_measured_rounding_is_that_of_the_worst_row(sources, exported):
    gates = {g.name: g for g in reopen(plan_export(sources["plain"], VllmExportOptions()), exported("plain", "fp8"))}
    worst, original = 0.0, load_file(sources["plain"] / "model.safetensors")
    stored = load_file(exported("plain", "fp8") / "model.safetensors")
    for name in [name for name in stored if name + "_scale" in stored]:
        error = (stored[name].float() * stored[name + "_scale"] - original[name].float()).norm(dim=1)
        worst = max(worst, float((error / original[name].float().norm(dim=1)).max()))
    assert gates["e4m3-rounding-error"].value == pytest.approx(worst, rel=1e-5)


def changed_config(key, value):
    def change(root):
        data = json.loads((root / "config.json").read_text())
        data[key] = value
        (root / "config.json").write_text(json.dumps(data))

    return change


@pytest.mark.parametrize(
    ("form", "change", "gate", "named"),
    [
        ("fp8", changed_config("rms_norm_eps", 1e-5), "config-preserved", "rms_norm_eps"),
        ("fp8", changed_config("dtype", "float32"), "config-preserved", "dtype"),
        ("fp8", changed_config("new_key", 1), "config-preserved", "new_key"),
        ("bf16", changed_config("quantization_config", {}), "config-preserved", "quantization_config"),
        ("fp8", lambda root: (root / "tokenizer.json").unlink(), "auxiliary-files-identical", "tokenizer.json"),
        ("fp8", lambda root: (root / "chat_template.jinja").write_text("x"), "auxiliary-files-identical", "chat_t"),
    ],
)  # fmt: skip
def test_another_file_or_key_is_named(sources, exported, tmp_path, form, change, gate, named):
    root = shutil.copytree(exported("codes", form), tmp_path / "x")
    change(root)
    gates = reopen(plan_export(sources["codes"], VllmExportOptions(format=form)), root)
    (found,) = [g for g in gates if not g.passed]
    assert (found.name, found.value) == (gate, 1)
    assert named in found.detail


def test_every_weight_is_read_by_its_name(sources, exported):
    """Codes times scale, and every other tensor as it is stored: by the plain reading of the source's own file."""
    stored = load_file(sources["codes"] / "model.safetensors")
    found = dict(iter_weights(exported("codes", "fp8")))
    assert set(found) == {name for name in stored if not name.endswith("_scale")}
    for name, weight in found.items():
        scale = stored.get(f"{name}_scale")
        expected = stored[name].float() if scale is None else stored[name].float() * scale.reshape(-1, 1)
        assert torch.equal(weight, expected), name


@pytest.mark.parametrize("tensor", [torch.tensor([1.0, 1 + 2**-20]), torch.tensor([2**40 + 1])])
def test_what_is_copied_is_expected_as_it_is(tmp_path, tensor):
    save_file({"x": tensor}, tmp_path / "model.safetensors")
    entry = weight_entries(tmp_path)["x"]
    (found,) = expected_blocks(Unit(entry, None, Action.COPY, (), None, transposed=False))
    assert (found.dtype, found.tolist()) == (tensor.dtype, tensor.tolist())


def of_tensors(edit: Edit) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        tensors = load_file(root / "model.safetensors")
        edit(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, root / "model.safetensors")

    return change


# Of gates with two sides the other one: CASES and the test above change the export. `payload-bytes` counts what
# `tensors-as-planned` names, which ends the comparison.
PARENTS = [
    ("codes", "fp8", of_tensors(next_bit(Q)), "weights-bit-exact"),
    ("codes", "fp8", of_tensors(next_bit(Q + "_scale")), "weights-bit-exact"),
    ("codes", "bf16", of_tensors(put(Q + "_scale", lambda t: t * 1.25)), "bf16-rounding-error"),
    ("plain", "fp8", of_tensors(put(Q, lambda t: t * 1.25)), "e4m3-rounding-error"),
    ("codes", "fp8", of_tensors(next_bit(NORM)), "copied-tensors-identical"),
    ("codes", "fp8", of_tensors(put(NORM, lambda t: t.float())), "tensors-as-planned"),
    ("codes", "fp8", changed_config("rms_norm_eps", 1e-5), "config-preserved"),
    ("codes", "fp8", lambda root: (root / "chat_template.jinja").write_text("x"), "auxiliary-files-identical"),
]


@pytest.mark.parametrize(("source", "form", "change", "gate"), PARENTS)
def test_a_gate_fails_where_the_parent_alone_is_another(sources, exported, tmp_path, source, form, change, gate):
    parent = shutil.copytree(sources[source], tmp_path / "parent")
    change(parent)
    if source == "codes":
        rehash(parent)
    gates = reopen(plan_export(parent, VllmExportOptions(format=form)), exported(source, form))
    assert gate in [found.name for found in gates if not found.passed]


def test_an_error_that_is_no_number_is_the_largest() -> None:
    nan = float("nan")
    assert math.isnan(_larger(1.0, nan))
    assert [_larger(1.0, 2.0), _larger(2.0, 1.0)] == [2.0, 2.0]


def test_a_gate_shows_the_first_five_names():
    assert none_differing("x", list("abcde"), "all").detail == "all; differing: a, b, c, d, e"
    assert none_differing("x", list("abcdef"), "all").detail == "all; differing: a, b, c, d, e ..."
