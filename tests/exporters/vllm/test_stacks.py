"""Exports of a model whose checkpoints hold stacked experts: what is split, its shapes, and what readers are told."""

from __future__ import annotations

from pathlib import Path

import pytest
from language_models import ARCHITECTURES, write

from exporters.vllm.foresee import foresee, plan_ahead
from exporters.vllm.lint import lint_structure
from exporters.vllm.options import ExportFormat
from exporters.vllm.warnings import plan_warnings
from fp8pipe.artifact.kinds import FALQON_KIND, LORA_KIND
from fp8pipe.core.errors import ConfigurationError
from fp8pipe.models.language.base import check_base
from pipeline.finetune.method import export_warnings

# Families -> name of a stack, of the same weights of one expert, and the shape of their scales: vLLM transposes those
# of gpt-oss together with the weights.
FAMILIES = {
    "gpt_oss": ("model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.3.gate_up_proj", (1, 192)),
    "granitemoe": ("model.layers.1.block_sparse_moe.input_linear.weight",
                   "model.layers.1.block_sparse_moe.experts.3.up_proj", (96, 1)),
    "llama4": ("model.layers.1.feed_forward.experts.gate_up_proj",
               "model.layers.1.feed_forward.experts.3.up_proj", (96, 1)),
}  # fmt: skip
RANDOM = "transformers would replace them by random ones"
BIASES = "does not load FP8 experts with biases on GPUs"


def test_no_format_holds_a_llama_4_of_two_experts_per_token(tmp_path: Path) -> None:
    base = write(ARCHITECTURES["llama4"], tmp_path)
    written = (base / "config.json").read_text(encoding="utf-8")
    assert '"num_experts_per_tok": 1' in written
    (base / "config.json").write_text(written.replace('per_tok": 1', 'per_tok": 2'), encoding="utf-8")
    trained = check_base(base, "mine").trainable
    found = foresee(base, FALQON_KIND, trained)
    assert [finding.rule for finding in found["--target vllm"]] == ["experts-per-token"]
    assert all("experts-per-token" in {finding.rule for finding in findings} for findings in found.values())
    with pytest.raises(ConfigurationError, match="no export of the tuned model would be possible"):
        export_warnings(base, "falqon", "fp8", trained)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("kind", "form", "single"),
    [(FALQON_KIND, ExportFormat.FP8, True), (FALQON_KIND, ExportFormat.BF16, True),
     (LORA_KIND, ExportFormat.FP8, True), (LORA_KIND, ExportFormat.BF16, False)],
)  # fmt: skip
def test_experts_lie_as_the_format_needs(
    family: str, kind: str, form: ExportFormat, single: bool, tmp_path: Path
) -> None:
    base = write(ARCHITECTURES[family], tmp_path)
    plan = plan_ahead(base, kind, check_base(base, "mine").trainable, form)
    assert lint_structure(plan) == []
    shapes = {output.name: output.shape for unit in plan.units for output in unit.outputs}
    stack, one, scale = FAMILIES[family]
    assert (stack in shapes) is not single
    assert (f"{one}.weight" in shapes) is single
    assert (f"{one}.bias" in shapes) is (single and family == "gpt_oss")
    assert shapes.get(f"{one}.weight_scale") == (scale if form.quantized else None)
    warnings = [said for said in plan_warnings(plan) if "experts" in said and "stay unquantized" not in said]
    told = BIASES if family == "gpt_oss" and form.quantized else RANDOM
    assert [told in said for said in warnings] == ([True] if single else [])
