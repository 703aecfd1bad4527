"""What marks tell about a loader, for loaders written out here: each kind of rearrangement, and what is none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import pytest
import torch
from torch import Tensor

from validation.vllm.layout import Head, Layout, learn
from validation.vllm.rebuild import Found, Rebuild

Loader = Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], None]  # (engine, checkpoint)
GENERATOR = torch.Generator()


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    values = torch.randn(shape, generator=GENERATOR.manual_seed(len(shape) + sum(shape)))
    return values.to(dtype)


def engine_of(checkpoint: Mapping[str, Tensor], tensors: Mapping[str, Tensor], loader: Loader) -> Layout:
    """The layout, and the true weights loaded after it, as the probe does."""

    def load(weights: Iterable[tuple[str, Tensor]]) -> None:
        loader(tensors, dict(weights))

    heads = [Head(name, tuple(value.shape), value.dtype) for name, value in checkpoint.items()]
    layout = learn(tensors, heads, load)
    load(checkpoint.items())
    return layout


def rebuilt(layout: Layout, tensors: Mapping[str, Tensor]) -> dict[str, Found]:
    rebuild = Rebuild(layout)
    found = [one for name in layout.origins for one in rebuild.add(name, tensors[name].float(), "stored")]
    assert not rebuild.found
    return {one.head.name: one for one in found}


def assert_whole(found: Mapping[str, Found], checkpoint: Mapping[str, Tensor]) -> None:
    assert found.keys() == checkpoint.keys()
    for name, one in found.items():
        assert (one.absent, one.unequal, one.changed) == (0, 0, False), name
        assert torch.equal(one.value, checkpoint[name].float()), name


def fused(engine: Mapping[str, Tensor], files: Mapping[str, Tensor]) -> None:
    """Parts below each other; heads of q, k, v taken apart as Falcon stores them; the head's padding zero."""
    engine["gate_up"].copy_(torch.cat([files["up"], files["gate"]]))
    packed = files["qkv"].view(3, 4, 5, -1)  # 3 groups of two q, one k, one v
    engine["qkv"].copy_(
        torch.cat([packed[:, :2].flatten(0, 2), packed[:, 2].flatten(0, 1), packed[:, 3].flatten(0, 1)])
    )
    engine["head"][:7].copy_(files["head"])
    engine["head"][7:].zero_()
    engine["norm"].copy_(files["norm"])
    engine["one"].copy_(files["one"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_fused_permuted_and_padded(dtype: torch.dtype) -> None:
    checkpoint = {
        "gate": random(300, 6), "up": random(300, 6), "qkv": random(60, 700), "head": random(7, 3), "norm": random(270),
        "one": random(),
    }  # fmt: skip
    checkpoint = {name: value.to(dtype) for name, value in checkpoint.items()}
    shapes = {"gate_up": (600, 6), "qkv": (60, 700), "head": (16, 3), "norm": (270,), "one": ()}
    tensors = {name: torch.empty(shape).to(dtype) for name, shape in shapes.items()}
    layout = engine_of(checkpoint, tensors, fused)
    assert_whole(rebuilt(layout, tensors), checkpoint)
    padded = layout.origins["head"]
    assert (padded.rest(tensors["head"].float()).numel(), padded.unwritten, padded.filled) == (27, 0, True)


def test_rows_swapped_after_loading_are_seen() -> None:
    checkpoint = {"a": random(8, 4), "b": random(8, 4) + 1}
    tensors = {"both": torch.empty(16, 4)}
    layout = engine_of(checkpoint, tensors, lambda e, f: e["both"].copy_(torch.cat([f["b"], f["a"]])))
    tensors["both"][[2, 3]] = tensors["both"][[3, 2]]
    found = rebuilt(layout, tensors)
    assert torch.equal(found["a"].value, checkpoint["a"])
    assert (found["b"].value != checkpoint["b"]).any(dim=1).nonzero().flatten().tolist() == [2, 3]


def permutations(engine: Mapping[str, Tensor], files: Mapping[str, Tensor]) -> None:
    engine["transposed"].copy_(files["conv1d"].t())
    engine["experts"][0].copy_(torch.cat([files["w1.0"], files["w3.0"]]))
    engine["experts"][1].copy_(torch.cat([files["w1.1"], files["w3.1"]]))
    engine["diagonal"].copy_(files["diagonal"].flip(0, 1))
    engine["first"].copy_(files["split"][:, ::2])
    engine["second"].copy_(files["split"][:, 1::2])
    engine["checkered"].copy_(torch.where(torch.eye(4).bool(), files["square"], files["triangle"].t()))
    engine["checkered2"].copy_(torch.where(torch.eye(4).bool(), files["triangle"].t(), files["square"]))
    engine["kernel"].copy_(files["kernel"].reshape(6, 1, 4))
    engine["beside"].copy_(torch.cat([files["right"], files["left"]], dim=1))


def test_transposed_split_and_scattered() -> None:
    checkpoint = {
        "conv1d": random(5, 300), "w1.0": random(3, 4), "w3.0": random(3, 4) + 1, "w1.1": random(3, 4) + 2,
        "w3.1": random(3, 4) + 3, "diagonal": random(6, 5), "split": random(4, 10), "square": random(4, 4),
        "triangle": random(4, 4) + 1, "kernel": random(6, 4), "left": random(3, 4), "right": random(3, 5),
    }  # fmt: skip
    shapes = {
        "transposed": (300, 5), "experts": (2, 6, 4), "diagonal": (6, 5), "first": (4, 5), "second": (4, 5),
        "checkered": (4, 4), "checkered2": (4, 4), "kernel": (6, 1, 4), "beside": (3, 9),
    }  # fmt: skip
    tensors = {name: torch.empty(shape) for name, shape in shapes.items()}
    assert_whole(rebuilt(engine_of(checkpoint, tensors, permutations), tensors), checkpoint)


def test_more_tensors_and_rows_than_a_digit_counts() -> None:
    checkpoint = {f"t{i}": torch.full((2, 2), float(i)) for i in range(600)} | {"long": random(70_000, 1)}
    order = list(reversed(checkpoint))
    tensors = {"all": torch.empty(1200, 2), "long": torch.empty(70_000)}

    def loader(engine: Mapping[str, Tensor], files: Mapping[str, Tensor]) -> None:
        engine["all"].copy_(torch.cat([files[name] for name in order[1:]]))
        engine["long"].copy_(files["long"][:, 0].flip(0))

    assert_whole(rebuilt(engine_of(checkpoint, tensors, loader), tensors), checkpoint)


def test_what_is_there_twice_is_compared() -> None:
    checkpoint = {"k": random(4, 6)}
    tensors = {"rank": torch.empty(8, 6), "other": torch.empty(4, 6)}

    def loader(engine: Mapping[str, Tensor], files: Mapping[str, Tensor]) -> None:
        engine["rank"].copy_(files["k"].repeat_interleave(2, 0))
        engine["other"].copy_(files["k"])

    layout = engine_of(checkpoint, tensors, loader)
    assert_whole(rebuilt(layout, tensors), checkpoint)
    for name, at in (("rank", (5, 2)), ("other", (1, 1))):
        before = tensors[name][at].clone()
        tensors[name][at] += 1
        assert rebuilt(layout, tensors)["k"].unequal > 0
        tensors[name][at] = before


def test_a_row_that_is_twice_in_one_tensor_is_compared_with_itself() -> None:
    checkpoint = {"k": random(4, 6)}
    tensors = {"rank": torch.empty(8, 6)}
    layout = engine_of(checkpoint, tensors, lambda e, f: e["rank"].copy_(f["k"].repeat_interleave(2, 0)))
    assert_whole(rebuilt(layout, tensors), checkpoint)
    for at in ((4, 2), (5, 2)):
        before = tensors["rank"][at].clone()
        tensors["rank"][at] += 1
        assert rebuilt(layout, tensors)["k"].unequal == 1
        tensors["rank"][at] = before


def test_what_is_no_rearrangement_is_told() -> None:
    checkpoint = {"log": random(5), "half": random(4, 4), "unused": random(3), "plus": random(4)}
    names = {"log": (5,), "half": (2, 4), "bare": (3,), "ones": (3,), "zeros": (3,), "plus": (4,)}
    tensors = {name: torch.full(shape, 0.25) for name, shape in names.items()}

    def loader(engine: Mapping[str, Tensor], files: Mapping[str, Tensor]) -> None:
        engine["log"].copy_(-torch.exp(files["log"]))
        engine["half"].copy_(files["half"][2:])
        engine["ones"].fill_(1)
        engine["zeros"].zero_()
        engine["plus"].copy_(files["plus"] + 0.5)

    layout = engine_of(checkpoint, tensors, loader)
    rebuild = Rebuild(layout)
    found = {one.head.name: one for name in tensors for one in rebuild.add(name, tensors[name], "stored")}
    assert found["half"].absent == 8
    assert not any(name in found and not found[name].changed for name in ("log", "plus", "unused"))
    assert layout.origins["bare"].unwritten == 3
    assert torch.equal(tensors["bare"], torch.full((3,), 0.25))  # what the loader leaves alone, marks leave, too
    assert {name: layout.origins[name].filled for name in ("ones", "zeros")} == {"ones": False, "zeros": True}
