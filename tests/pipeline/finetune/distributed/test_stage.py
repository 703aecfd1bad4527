"""Fine-tuning in several processes ends with the bits of one, whatever the number, and after any fault."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
from breadth import LONG, only_long
from rank_work import command, tuned
from ranks import ROOT, assert_same, run_ranks
from safetensors.torch import load_file

# The norm of the gradients is above the limit, so that they are scaled.
SETTINGS = {
    "steps": 3, "save_every": 2, "evaluate_every": 3, "heldout_fraction": 0.1, "clip_norm": 0.1,
    "final_merge_batches": 2,
}  # fmt: skip
INTERRUPTED = 130
TWO_AND_FOUR = (2, 4) if LONG else (4,)
# With rank 32 some A and B have 4,096 values: those whose moments bitsandbytes keeps in 8 bits. Others have fewer.
EIGHT_BITS = {"optimizer": "adamw-8bit", "rank": 32}
LORA, QLORA = ({"method": name} for name in ("lora", "qlora"))


def tiny(make_base, changes, **shapes):
    """A base model for these settings; skips if a package that they need is missing."""
    if "optimizer" in changes or "method" in changes:
        pytest.importorskip("bitsandbytes")
        pytest.importorskip("peft")
        shapes = {"intermediate_size": 128, **shapes}  # bitsandbytes quantizes blocks of 64 values
    return str(make_base(**shapes))


# Uneven: of three micro-batches two processes have two and one, and four have one or none.
@pytest.mark.parametrize(
    ("changes", "blank", "sizes"),
    [
        # In fp32, as sums of a few bf16 gradients are exact, whatever their order.
        pytest.param({"gradient_accumulation": 4, "dtype": "float32"}, (), TWO_AND_FOUR, id="live"),
        # With so many rows of A, one of four processes holds nothing but some of them.
        pytest.param(
            {"gradient_accumulation": 4, "dtype": "float32", "update_rule": "live-both", "rank": 32},
            (),
            TWO_AND_FOUR if LONG else (4,),
            id="live-both",
        ),
        pytest.param(
            {"gradient_accumulation": 3, "gradient_checkpointing": True, "update_rule": "released"},
            (1, 4),
            (2,),
            id="released",
        ),
        pytest.param(
            {"gradient_accumulation": 2, "update_rule": "accumulate-stochastic", "rows": 4, **EIGHT_BITS},
            (0, 1),
            (2,),
            id="rows",
        ),
        pytest.param({"gradient_accumulation": 4, "rank": 6, **LORA}, (), TWO_AND_FOUR, id="lora"),
        pytest.param(
            {"gradient_accumulation": 3, "gradient_checkpointing": True, **QLORA, **EIGHT_BITS},
            (1, 4),
            (2, 3) if LONG else (2,),
            id="qlora",
        ),
    ],
)
def test_any_number_of_processes_ends_with_the_bits_of_one(make_base, pairs, tmp_path, changes, blank, sizes):
    settings = {"base": tiny(make_base, changes), "data": str(pairs), **SETTINGS, **changes}
    tuned(settings, str(tmp_path / "one"), blank=blank)
    for size in sizes:
        assert set(run_ranks(size, tuned, settings, str(tmp_path / str(size)), False, blank)) == set(range(size))
        assert_same(tmp_path / "one", tmp_path / str(size))
        facts = json.loads((tmp_path / str(size) / "manifest.json").read_text())["runtime"]
        assert facts["world_size"] == size


@pytest.mark.parametrize("changes", [{}, LORA], ids=["falqon", "lora"])
def test_experts_that_only_some_processes_reach_end_with_the_bits_of_one(make_base, pairs, tmp_path, changes):
    experts = {"num_local_experts": 24, "num_experts_per_tok": 1, "hidden_size": 32, "intermediate_size": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    settings = {
        "base": tiny(make_base, changes, family="mixtral", num_hidden_layers=1, **heads, **experts),
        "data": str(pairs), **SETTINGS, "gradient_accumulation": 2, "batch_size": 1, "packing": False, "steps": 2,
        "save_every": 0, **changes,
    }  # fmt: skip
    tuned(settings, str(tmp_path / "one"))
    run_ranks(2, tuned, settings, str(tmp_path / "two"))
    assert_same(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize(
    ("fault", "code", "says", "changes", "resumed_by"),
    [
        ("memory", 15, "out of memory", QLORA | EIGHT_BITS, 3),
        pytest.param("interrupt", INTERRUPTED, "interrupted", LORA, 1, marks=only_long),
        ("killed", -9, "", {}, 4),
    ],
)
def test_a_fault_of_one_process_ends_all_with_one_error_and_another_number_of_them_goes_on(
    make_base, pairs, tmp_path, fault, code, says, changes, resumed_by
):
    settings = {"base": tiny(make_base, changes), "data": str(pairs), **SETTINGS, "gradient_accumulation": 4, **changes}
    output = tmp_path / "cut"
    ended = run_ranks(2, command, settings, str(output), fault, 1, 2)  # returns once all have ended
    # Of the first to end, after which the launcher ends the other one. Only a killed process does not tell its code.
    assert set(ended.values()) <= ({code} if says else {code, INTERRUPTED})
    assert ended
    logs = [(tmp_path / f"cut-{rank}.log").read_text() for rank in (0, 1)]
    assert "step 2" in logs[0]
    assert "step 2" not in logs[1]  # only one process tells how far they are
    if says:
        assert json.loads(logs[1][logs[1].index("{\n") :])["error"]["what"] == says
        assert "error" not in logs[0]
    else:  # the launcher may have ended it before it noticed
        assert ("ended unexpectedly" in logs[0]) or ended == {1: code}
        assert "unforeseen" not in logs[0]
    assert [path.name for path in (tmp_path / "cut.partial" / "checkpoints").glob("step-*")] == ["step-00000002"]
    if resumed_by > 1:
        run_ranks(resumed_by, tuned, settings, str(output), True)
    else:
        tuned(settings, str(output), resume=True)
    tuned(settings, str(tmp_path / "whole"))
    assert_same(tmp_path / "whole", output)
    assert all(tensor.float().isfinite().all() for tensor in load_file(output / "model.safetensors").values())


@pytest.mark.parametrize("changes", [{}, pytest.param(LORA, marks=only_long)], ids=["falqon", "lora"])
def test_an_output_that_processes_do_not_share_is_refused(make_base, pairs, tmp_path, changes):
    settings = {"base": tiny(make_base, changes), "data": str(pairs), "gradient_accumulation": 2, **changes}
    ended = run_ranks(2, command, settings, str(tmp_path / "out"), "elsewhere", 1, 0)
    assert 10 in ended.values()
    told = (tmp_path / "out-1.log").read_text()
    assert "is not the directory that rank 0 has written" in told
    assert not (tmp_path / "out-elsewhere.partial").exists()


def test_torchrun_reports_one_error_and_the_exit_code(make_base, pairs, tmp_path):
    """The whole command in new processes, which takes ten seconds: how an interpreter ends is part of it."""
    command = [
        "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "fp8pipe", "finetune", "--model",
        str(make_base()), "--data", str(pairs), "--output", str(tmp_path / "out"), "--device", "cpu",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 1  # torchrun's own
    assert ended.stderr.count("error: 2 processes have 1 micro-batch(es) per step to share") == 1
    codes = set(re.findall(r"exitcode  : (-?\d+)", ended.stderr))
    assert "10" in codes
    assert codes <= {"10", "-15"}  # torchrun ends the other one if it has not yet ended by itself
    assert not (tmp_path / "out.partial").exists()
