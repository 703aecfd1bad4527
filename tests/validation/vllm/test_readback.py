"""What is made of a layout, without an engine: numbers that a loader computes, tied heads, what is missing."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from validation.vllm.held import Expected
from validation.vllm.layout import Head, learn
from validation.vllm.readback import Reading, loadable
from validation.vllm.rebuild import Rebuild

LOG = torch.tensor([0.5, 2.0, -1.0, 0.25])
WORDS = torch.arange(12.0).reshape(4, 3)


class Engine:
    """Mamba's: A is -exp(A_log); a head that is the embeddings; and a tensor that it does not load."""

    def __init__(self) -> None:
        self.held = {"mixer.A": torch.zeros(4), "embed.weight": torch.zeros(6, 3)}

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        for name, value in weights:
            if name == "mixer.A_log":
                self.held["mixer.A"].copy_(-torch.exp(value.float()))
            elif name == "embed.weight":
                self.held["embed.weight"][:4].copy_(value)
                self.held["embed.weight"][4:].zero_()


@pytest.fixture
def read(tmp_path: Path) -> tuple[Reading, Engine]:
    files = {"mixer.A_log": LOG, "embed.weight": WORDS, "lm_head.weight": WORDS, "unused.bias": LOG + 1}
    expected = files | {"gone.weight": WORDS}
    tensors = {name: Expected(name, value, None, False).digests() for name, value in expected.items()}
    reading, engine = Reading(tensors, tmp_path), Engine()
    heads = [Head(name, tuple(value.shape), value.dtype) for name, value in files.items()]
    reading.layout = learn(engine.held, heads, engine.load)
    reading.rebuild = Rebuild(reading.layout)
    reading._find_computed(files.items(), engine.load, engine.held)
    engine.load(files.items())
    return reading, engine


def test_numbers_that_the_loader_computes_are_held_against_what_it_made(read: tuple[Reading, Engine]) -> None:
    reading, engine = read
    reading._take("mixer.A", engine.held["mixer.A"], "stored")
    assert reading.report["mixer.A_log"] == {"status": "match", "read": "computed", "gemm_differs": False}
    engine.held["mixer.A"][1] += 1
    reading._take("mixer.A", engine.held["mixer.A"], "stored")
    assert reading.report["mixer.A_log"]["status"] == "differs"
    assert reading.unexplained == []


def test_rotations_that_an_engine_computes_are_no_weights() -> None:
    tower = torch.nn.Linear(2, 2)
    tower.register_buffer("rotations", torch.polar(torch.ones(2), torch.ones(2)))
    tower.register_buffer("table", torch.ones(2))
    assert loadable(tower).keys() == {"weight", "bias", "table"}


def test_a_tied_head_is_excused_only_by_equal_embeddings_that_serve_for_it(read: tuple[Reading, Engine]) -> None:
    reading, engine = read
    reading._take("embed.weight", engine.held["embed.weight"], "stored")
    assert reading.report["embed.weight"]["status"] == "match"
    tied = {name: engine.held["embed.weight"] for name in ("embed.weight", "lm_head.weight")}
    assert reading._absent("lm_head.weight", tied) == {"status": "match", "read": "tied", "gemm_differs": False}
    assert reading._absent("lm_head.weight", {"embed.weight": tied["embed.weight"]})["status"] == "missing"
    assert reading._absent("unused.bias", tied)["why"] == "the engine has no copy of it"
    assert reading._absent("gone.weight", tied)["why"] == "the files hold no tensor of this name"


def test_padding_that_is_no_zero_is_told(read: tuple[Reading, Engine]) -> None:
    reading, engine = read
    engine.held["embed.weight"][5, 1] = 0.5
    reading._take("embed.weight", engine.held["embed.weight"], "stored")
    assert any("embed.weight" in line for line in reading.unexplained)
    assert reading.report["embed.weight"]["status"] == "match"
