"""Predicts, before a model is trained, which findings will refuse its export; reads only headers.

The trained artifact does not exist yet. But its tensors will be those of the base model, with codes and a scale in
place of each weight that training quantizes, so the linter's structural rules, which need no values, can be applied.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from exporters.target import kind_of_source
from exporters.vllm.lint import lint_structure
from exporters.vllm.options import ExportFormat, VllmExportOptions
from exporters.vllm.plan import ExportPlan, build_plan
from exporters.vllm.source import Source, open_source
from fp8pipe.artifact import Parent
from fp8pipe.artifact.finding import Finding
from fp8pipe.artifact.kinds import FALQON_KIND, TUNED_KINDS
from fp8pipe.models.checkpoint.quantized.base import read_base
from fp8pipe.models.checkpoint.tensors import SCALE_SUFFIX, TensorEntry
from fp8pipe.models.language.structure import read_structure


def foresee(root: Path, kind: str, trained: Collection[str]) -> dict[str, list[Finding]]:
    """Find what would refuse an export to vLLM in each of its formats; `nvfp4` stands for both with such weights.

    Args:
        root: an artifact, or the base model of an artifact that does not exist yet.
        kind: kind of the artifact.
        trained: names in the checkpoint (without `.weight`) of the linears that will be trained.

    Returns:
        The findings by the command-line options that select a format, for example `--target vllm --format w8a16`; the
        default format comes first.
    """
    usual = VllmExportOptions().format
    forms = [form for form in ExportFormat if not form.calibrated]  # the others refuse what these do
    words = {form: "--target vllm" + ("" if form is usual else f" --format {form}") for form in forms}
    return {words[form]: lint_structure(plan_ahead(root, kind, trained, form)) for form in forms}


def plan_ahead(root: Path, kind: str, trained: Collection[str], form: ExportFormat) -> ExportPlan:
    """The plan for exporting the artifact in `root`, or one to be trained from the model there, in format `form`.

    `kind` and `trained` are as in `foresee`.
    """
    options = VllmExportOptions(format=form)
    if kind_of_source(root) in TUNED_KINDS:  # an export with a manifest is used as a base like any plain model
        return build_plan(open_source(root, verify=False), read_structure(root), options)
    base = read_base(root)
    tensors = dict(base.entries)
    if kind == FALQON_KIND:
        for name in trained:
            weight = tensors[f"{name}.weight"]
            tensors[weight.name] = replace(weight, dtype="F8_E4M3")
            scale = weight.name + SCALE_SUFFIX
            tensors[scale] = TensorEntry(scale, "F32", (), weight.file, weight.start)
    unhashed = Parent(kind="model", digest="", path=str(root))
    source = Source(root=root, kind=kind, config=base.config, tensors=tensors, parent=unhashed, adapter="flushed")
    return build_plan(source, read_structure(root), options)
