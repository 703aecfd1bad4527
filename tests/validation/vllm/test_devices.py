"""An engine on another device than the host's: nothing mixes both, and what is read is the same."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from fp8_layers import PackedKernel, ScaledKernel, make_codes, make_layer
from torch import Tensor
from two_devices import far, two_devices

from validation.vllm.held import Expected, Holding
from validation.vllm.layout import Head, learn
from validation.vllm.readback import Reading
from validation.vllm.rebuild import Rebuild

SIZE = 64
HOLDING = Holding(torch.bfloat16, codes=True)
LOG = torch.tensor([0.5, 2.0, -1.0, 0.25])


def parts() -> dict[str, tuple[Tensor, Tensor]]:
    """Codes and scales of a checkpoint's two tensors, which the engine fuses to a square matrix."""
    return {f"{name}.weight": make_codes(SIZE // 2, SIZE, seed) for seed, name in enumerate(("q", "k"))}


class Engine:
    """Loads as vLLM does: parts of a fused layer one below the other, embeddings padded, A as -exp of its logarithm."""

    def __init__(self, *, there: bool) -> None:
        held = {"qkv.weight": torch.zeros(SIZE, SIZE, dtype=torch.float8_e4m3fn), "A": torch.zeros(4)}
        held |= {"qkv.weight_scale": torch.zeros(SIZE, 1), "embed.weight": torch.zeros(6, 4, dtype=torch.bfloat16)}
        self.held = {name: far(tensor) for name, tensor in held.items()} if there else held

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        for name, value in weights:
            part, _, leaf = name.partition(".")
            if name == "A_log":
                self.held["A"].copy_(-torch.exp(value.float()))
            elif name == "embed.weight":
                self.held[name][:4].copy_(value)
                self.held[name][4:].zero_()
            else:
                start = 0 if part == "q" else SIZE // 2
                self.held[f"qkv.{leaf}"][start : start + SIZE // 2].copy_(value)


def read(tmp_path: Path, kernel: Any, *, there: bool) -> Reading:
    """What a reading finds in an engine that holds what it should."""
    engine, files, tensors = Engine(there=there), {"A_log": LOG, "embed.weight": torch.ones(4, 4).bfloat16()}, {}
    for name, value in files.items():
        tensors[name] = Expected(name, value.float(), None, False).digests()
    for name, (codes, scale) in parts().items():
        files |= {name: codes, f"{name}_scale": scale}
        whole = Expected(name, codes.float() * scale, scale, False)
        tensors |= {held.name: held.digests() for held in whole.held(HOLDING)}
    reading = Reading(tensors, tmp_path, products=True)
    heads = [Head(name, tuple(value.shape), value.dtype) for name, value in files.items()]
    reading.layout = learn(engine.held, heads, engine.load)
    reading.rebuild = Rebuild(reading.layout)
    reading._find_computed(files.items(), engine.load, engine.held)
    engine.load(files.items())
    layer = make_layer(engine.held["qkv.weight"], engine.held["qkv.weight_scale"], kernel)
    reading._take("qkv.weight", *reading._linear("qkv.weight", layer, reading.layout.origins["qkv.weight"]))
    if not reading._packed("qkv.weight"):
        reading._take("qkv.weight_scale", layer.weight_scale.cpu(), "stored")
    for name in ("A", "embed.weight"):
        reading._take(name, engine.held[name].cpu().float(), "stored")
    for name in tensors.keys() - reading.report.keys():
        reading.report[name] = reading._absent(name, {})
    return reading


@pytest.mark.parametrize("kernel", [ScaledKernel, PackedKernel])
def test_an_engine_on_another_device_is_read_as_one_on_the_host(kernel: Any, tmp_path: Path) -> None:
    with two_devices():
        reading = read(tmp_path, kernel(), there=True)
    assert {entry["status"] for entry in reading.report.values()} == {"match"}, reading.report
    assert reading.unexplained == []
    how = "codes" if kernel is ScaledKernel else "gemm"
    assert reading.report["q.weight"]["read"] == reading.report["k.weight"]["read"] == how
    layer = reading.layers["qkv"]
    assert (layer["device"], layer["holds"]) == ("meta", "codes" if how == "codes" else "packed")
    assert layer["tensors"] == ["k.weight", "q.weight"]
    right, other = ("error_rounded", "error_plain") if how == "codes" else ("error_plain", "error_rounded")
    assert layer[right] < 1 < layer[other]
    here = read(tmp_path, kernel(), there=False)
    assert here.report == reading.report
    assert here.layers["qkv"] == layer | {"device": "cpu"}


def test_what_mixes_both_devices_is_seen() -> None:
    with two_devices():
        there = far(torch.ones(3))
        assert torch.equal((there + 1).cpu(), torch.full((3,), 2.0))
        assert torch.equal(there[torch.tensor([0, 2])].cpu(), torch.ones(2))
        with pytest.raises(AssertionError, match="both devices"):
            there + torch.ones(3)
