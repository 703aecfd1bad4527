"""A base in FP8, from its shards into a real vLLM: tuned, exported and accepted; and rejected with one code changed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from artifact_tree import rehash
from breadth import only_long
from reference_checkpoints import write_compressed_tensors, write_native
from safetensors.torch import load_file, save_file
from tiny_checkpoints import make_model, write_tokenizer
from trained_exports import checked
from tuning_config import config

from exporters.vllm.export import export_vllm
from exporters.vllm.options import VllmExportOptions
from pipeline.finetune.stage import finetune

LAYER = "model.layers.1.mlp.down_proj.weight"
pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.usefixtures("forked_engines")]


def test_a_model_tuned_from_blocks_is_accepted(tmp_path: Path, pairs: Path) -> None:
    base = write_native(tmp_path / "base", make_model())
    tuned = finetune(config(base, pairs, steps=2), tmp_path / "tuned")
    record = checked(export_vllm(tuned.root, tmp_path / "export", VllmExportOptions()).root)
    assert (record.verdict, record.reference, record.reasons) == ("ACCEPT", "source", [])


@only_long
def test_an_export_of_a_base_in_fp8_is_held_against_that_base(tmp_path: Path) -> None:
    base = write_compressed_tensors(tmp_path / "base", make_model(), "channel")
    write_tokenizer(base)
    export = export_vllm(base, tmp_path / "export", VllmExportOptions()).root
    record = checked(export)
    assert (record.verdict, record.reference, record.reasons) == ("ACCEPT", "source", [])
    tensors = load_file(export / "model.safetensors")
    tensors[LAYER].view(torch.uint8)[3, 5] ^= 0x04
    save_file(tensors, export / "model.safetensors", metadata={"format": "pt"})
    rehash(export)
    record = checked(export)
    assert (record.verdict, record.reference) == ("REJECT", "source")
    assert record.served is not None
    assert (record.served.weights.different, record.served.weights.differing_codes) == ([LAYER], 1)
