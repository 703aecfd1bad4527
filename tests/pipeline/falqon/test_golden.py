"""The released rule against numbers recorded from the official layer: Y, dX, dB and every code."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fp8pipe.numerics.grids import E4M3, Scale, quantize
from fp8pipe.numerics.kinds import ScaleRule
from pipeline.falqon.flush import flush_rows, select_rows
from pipeline.falqon.layer import FalqonLinear
from pipeline.falqon.rules import update_rule

GOLDEN = Path(__file__).resolve().parents[2] / "data" / "falqon_golden"


@pytest.mark.parametrize("name", ["a", "b"])
def test_released_rule_reproduces_the_official_layer(name):
    recorded = np.load(GOLDEN / f"{name}.npz")
    rank, rule = int(recorded["rank"]), update_rule("released")
    codes = torch.tensor(recorded["codes0"]).view(torch.float8_e4m3fn)
    layer = FalqonLinear(codes, Scale.exact(torch.tensor(recorded["scale"])), rank=rank, live=False)
    optimizer = torch.optim.AdamW([layer.lora_B], lr=float(recorded["lr"]), weight_decay=0.0)
    for step in range(4):
        x = torch.tensor(recorded[f"X_{step}"], requires_grad=True)
        y = layer(x)
        y.backward(torch.tensor(recorded[f"G_{step}"]))
        assert torch.equal(y, torch.tensor(recorded[f"Y_{step}"]))
        assert torch.equal(x.grad, torch.tensor(recorded[f"dX_{step}"]))
        assert torch.equal(layer.lora_B.grad, torch.tensor(recorded[f"dB_{step}"]))
        optimizer.step()
        # B itself may differ in its last bit between AdamW implementations; the codes must not.
        torch.testing.assert_close(layer.lora_B.data, torch.tensor(recorded[f"B_{step}"]), rtol=1e-6, atol=1e-8)
        flush_rows(layer, select_rows(layer, rank), rule)
        optimizer.zero_grad()
        assert torch.equal(layer.codes.view(torch.uint8), torch.tensor(recorded[f"codes_{step}"]))
        assert not layer.lora_B.any()


def test_the_recorded_weight_is_what_our_quantizer_makes():
    for name in ("a", "b"):
        recorded = np.load(GOLDEN / f"{name}.npz")
        codes, scale = quantize(torch.tensor(recorded["W"]), E4M3, ScaleRule.EXACT)
        out = recorded["W"].shape[0]
        assert torch.equal(codes.view(torch.uint8), torch.tensor(recorded["codes0"][:out]))
        assert scale.inverse_scale == torch.tensor(recorded["scale"])
