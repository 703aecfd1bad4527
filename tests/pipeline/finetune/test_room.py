"""A disk that is too full for the checkpoints or the result of a run is refused before the first step."""

from __future__ import annotations

from pathlib import Path

import pytest
from tuning_config import config

from fp8pipe.core import machine
from fp8pipe.core.errors import OutOfMemoryError
from pipeline.finetune.plan import plan_finetune
from pipeline.finetune.stage import finetune

# Of the space that a plan predicts: what is not tensors (the tokenizer, the curves) is a third for a model this small.
SHARE = 0.65


@pytest.mark.parametrize("method", ["falqon", "lora"])
def test_a_disk_that_the_result_would_fill_is_refused_before_training_and_the_run_resumes(
    make_base, pairs, tmp_path, monkeypatch, method
):
    settings, output = config(make_base(), pairs, method=method, steps=3, save_every=1), tmp_path / "out"
    partial, size = tmp_path / "out.partial", plan_finetune(settings, output).disk_bytes

    def used() -> int:
        return sum(file.stat().st_size for file in partial.rglob("*") if file.is_file())

    monkeypatch.setattr(machine, "free_bytes", lambda path: int(SHARE * size) - used())
    with pytest.raises(OutOfMemoryError, match="is full"):
        finetune(settings, output)
    assert not list(Path(partial).glob("checkpoints/step-*"))
    assert not (partial / "metrics.jsonl").exists()
    assert (partial / "checkpoints/run.json").exists()  # the conversion is done, and kept
    monkeypatch.setattr(machine, "free_bytes", lambda path: int(1.2 * size) - used())
    finetune(settings, output, resume=True)
