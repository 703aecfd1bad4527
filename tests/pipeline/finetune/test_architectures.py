"""Every architecture of the table on its way from the plan to an export: each cell works, or refuses as it says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from architecture_table import PAGE, page
from breadth import only_long
from language_models import ARCHITECTURES, write

from exporters.target import foresee
from exporters.verify.contents import check_contents
from exporters.vllm.export import export_vllm
from exporters.vllm.options import VllmExportOptions
from exporters.vllm.reopen import load_torch_model
from exporters.vllm.verify import check_vllm
from fp8pipe.artifact import Artifact
from fp8pipe.artifact.finding import LintFindingsError
from fp8pipe.cli.tune import next_export
from fp8pipe.core.config import build_config
from pipeline.finetune.config import FinetuneConfig
from pipeline.finetune.plan import plan_finetune
from pipeline.finetune.stage import finetune


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "pairs.jsonl"
    rows = [{"prompt": f"double {n}", "completion": f"{2 * n}"} for n in range(24)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def config_of(text: Path) -> Callable[..., FinetuneConfig]:
    def make(base: Path, **more: object) -> FinetuneConfig:
        small = {"steps": 2, "batch_size": 2, "sequence_length": 32, "rank": 4, "heldout_limit": 2}
        few = {
            "final_merge_batches": 2,
            "gradient_batches": 1,
            "warmup_steps": 0,
            "model": str(base),
            "data": str(text),
        }
        return build_config(FinetuneConfig, small | few | more)

    return make


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=only_long if one.rare else ()) for name, one in ARCHITECTURES.items()]
)
def test_every_cell_is_as_the_table_says(name: str, config_of: Callable[..., FinetuneConfig], tmp_path: Path) -> None:
    one = ARCHITECTURES[name]
    base = write(one, tmp_path / "base")
    config = config_of(base)
    plan = plan_finetune(config, tmp_path / "tuned")
    assert plan.facts["layers"] == one.trained
    assert not any("could not be counted" in note for note in plan.notes)
    assert any(one.refused in note and "--format bf16" in note for note in plan.notes) == bool(one.refused)

    tuned = finetune(config, tmp_path / "tuned")
    records = {record.name: record for record in tuned.manifest.layers}
    assert sum(record.converted for record in records.values()) == one.trained
    left_out = {n: r.reason for n, r in records.items() if not r.converted}
    assert {why for n, why in left_out.items() if n.endswith(tuple(one.left_out))} == set(one.left_out.values())
    others = {why for n, why in left_out.items() if not n.endswith(tuple(one.left_out))}
    assert others <= {"output head", "outside the text decoder"}
    assert check_contents(tuned, base)[0] == []
    assert any(one.refused in warning for warning in tuned.manifest.warnings) == bool(one.refused) or not one.refused

    bf16 = _export(tuned, tmp_path, "bf16")
    expected = "--target vllm --format bf16 --output" if one.refused else "--target vllm --output"
    assert expected in next_export(tuned)
    forms = foresee(tuned.root, tuned.kind)
    blocks = "--target vllm --format fp8-block"
    assert forms.pop(blocks)  # sides of these tiny models are no whole blocks
    four_bits = forms.pop("--target vllm --format nvfp4")  # refuses some that FP8 takes, but none that it refuses
    assert bool(four_bits) >= bool(one.refused)
    assert {form for form, findings in forms.items() if form.startswith("--target vllm") and findings} == (
        {"--target vllm", "--target vllm --format w8a16"} if one.refused else set()
    )
    if one.refused:
        with pytest.raises(LintFindingsError) as refusal:
            _export(tuned, tmp_path, "fp8")
        assert {finding.rule for finding in refusal.value.findings} >= {one.refused}
        assert list(refusal.value.findings) == forms["--target vllm"]  # nothing that the start did not tell
    else:
        _same_answers(_export(tuned, tmp_path, "fp8"), bf16)


def _export(tuned: Artifact, folder: Path, form: str) -> Artifact:
    """Written, reopened, verified against its source."""
    exported = export_vllm(tuned.root, folder / form, build_config(VllmExportOptions, {"format": form}))
    assert all(gate.passed for gate in exported.manifest.gates)
    assert list(check_vllm(exported, tuned.root, [])) == []
    return exported


def _same_answers(fp8: Artifact, bf16: Artifact) -> None:
    """Both hold one model, but for rounding to bf16."""
    ids = torch.arange(3, 19)[None]
    with torch.no_grad():
        ours, theirs = (load_torch_model(one.root, torch.float32)(input_ids=ids).logits for one in (fp8, bf16))
    assert torch.isfinite(ours).all()
    assert torch.nn.functional.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0) > 0.999


def test_the_page_is_the_table() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python tests/support/architecture_table.py"
