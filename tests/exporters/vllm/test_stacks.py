"""Exports of a model whose checkpoints hold stacked experts: what is split, its shapes, and what readers are told."""

from __future__ import annotations

from pathlib import Path

import pytest
from language_models import ARCHITECTURES, write

from exporters.vllm.foresee import plan_ahead
from exporters.vllm.lint import lint_structure
from exporters.vllm.options import ExportFormat
from exporters.vllm.warnings import plan_warnings
from fp8pipe.artifact.kinds import FALQON_KIND, LORA_KIND
from fp8pipe.models.language.base import check_base

STACK = "model.layers.1.mlp.experts"


@pytest.mark.parametrize(
    ("kind", "form", "single", "told"),
    [(FALQON_KIND, ExportFormat.FP8, True, "does not load FP8 experts with biases on GPUs"),
     (FALQON_KIND, ExportFormat.BF16, True, "transformers would replace them by random ones"),
     (LORA_KIND, ExportFormat.FP8, True, "does not load FP8 experts with biases on GPUs"),
     (LORA_KIND, ExportFormat.BF16, False, "")],
)  # fmt: skip
def test_experts_lie_as_the_format_needs(
    kind: str, form: ExportFormat, single: bool, told: str, tmp_path: Path
) -> None:
    base = write(ARCHITECTURES["gpt_oss"], tmp_path)
    plan = plan_ahead(base, kind, check_base(base, "mine").trainable, form)
    assert lint_structure(plan) == []
    shapes = {output.name: output.shape for unit in plan.units for output in unit.outputs}
    assert (f"{STACK}.gate_up_proj" in shapes) is not single
    assert (f"{STACK}.3.gate_up_proj.bias" in shapes) is single
    scale = shapes.get(f"{STACK}.3.gate_up_proj.weight_scale")
    assert scale == ((1, 192) if form.quantized else None)  # vLLM transposes it together with the weight
    warnings = [said for said in plan_warnings(plan) if "experts" in said and "stay unquantized" not in said]
    assert [told in said for said in warnings] == ([True] if told else [])
