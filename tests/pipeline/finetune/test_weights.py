"""Writing trained experts of a base that holds them stacked: floats are stacked again, codes lie one by one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from language_models import ARCHITECTURES, write
from safetensors.torch import load_file

from pipeline.finetune.weights import Deployed, count_differing, write_checkpoint

STACK = "model.layers.1.mlp.experts"


@pytest.mark.parametrize(
    ("family", "stack", "single"),
    [("granitemoe", "block_sparse_moe.input_linear.weight", "block_sparse_moe.experts.2.up_proj"),
     ("llama4", "feed_forward.experts.gate_up_proj", "feed_forward.experts.2.up_proj")],
)  # fmt: skip
def test_gate_and_up_are_stacked_again(family: str, stack: str, single: str, tmp_path: Path) -> None:
    base = write(ARCHITECTURES[family], tmp_path / "base")
    wanted, changed = load_file(base / "model.safetensors"), torch.randn(96, 64).to(torch.bfloat16)
    expert = wanted[f"model.layers.1.{stack}"][2]
    (expert.t() if family == "llama4" else expert)[96:] = changed
    (tmp_path / "floats").mkdir()
    weights = {f"model.layers.1.{single}": Deployed(changed, None, False)}
    write_checkpoint(base, tmp_path / "floats", weights)
    assert count_differing(tmp_path / "floats", weights) == 0
    found = load_file(tmp_path / "floats" / "model.safetensors")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_experts_are_stored_as_their_readers_need_them(tmp_path: Path) -> None:
    base = write(ARCHITECTURES["gpt_oss"], tmp_path / "base")
    before = load_file(base / "model.safetensors")
    name, changed = f"{STACK}.2.down_proj", torch.randn(96, 64).to(torch.bfloat16)
    floats, codes = tmp_path / "floats", tmp_path / "codes"
    for root in (floats, codes):
        root.mkdir()
    weights = {name: Deployed(changed, None, True)}
    write_checkpoint(base, floats, weights)
    assert count_differing(floats, weights) == 0
    assert count_differing(floats, {name: Deployed(changed + 1, None, True)}) > 0
    after = load_file(floats / "model.safetensors")
    before[f"{STACK}.down_proj"][2] = changed
    assert after.keys() == before.keys()  # so transformers loads it
    assert all(torch.equal(after[key], before[key]) for key in before)

    weights = {name: Deployed(changed.to(torch.float8_e4m3fn), torch.tensor(0.5), True)}
    write_checkpoint(base, codes, weights)
    assert count_differing(codes, weights) == 0
    single = load_file(codes / "model.safetensors")
    assert f"{name}.weight_scale" in single
    assert f"{STACK}.down_proj" not in single
    assert torch.equal(single[f"{STACK}.1.gate_up_proj.bias"], before[f"{STACK}.gate_up_proj_bias"][1])
