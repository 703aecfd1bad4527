"""Grouped products of experts: the loop's results on a CPU, where torch has them too, and a count on fake CUDA."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from fake_cuda import fake_cuda
from mixtures import IDS, first_experts, loss_of, method_of, mixture, never_to
from safetensors.torch import load_file, save_file

from fp8pipe.models.language.experts import Expert, UnstackedExperts
from pipeline.falqon import grouped
from pipeline.falqon.method import FalqonMethod
from pipeline.falqon.rules import Initialisation, update_rule

# gpt-oss has biases, and in Llama 4 routing weights multiply inputs.
FAMILIES = ("mixtral", "gpt_oss", "llama4")


def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped, "supported", lambda x: True)


def converted(
    family: str = "mixtral", rule: str = "live", together: bool = True
) -> tuple[torch.nn.Module, FalqonMethod]:
    torch.manual_seed(0)
    model = mixture(family)
    method = method_of(rule)
    method.prepare(model)
    if together:
        grouped.group_experts(model)
        assert all(m.grouped is not None for m in model.modules() if isinstance(m, UnstackedExperts))
    return model, method


def set_b(method: FalqonMethod, std: float) -> None:
    torch.manual_seed(1)
    for layer in method.layers.values():
        layer.lora_B.data.normal_(std=std)


def results(model: torch.nn.Module, x: torch.Tensor, index: torch.Tensor) -> list[torch.Tensor | None]:
    """Output and gradients of the first layer's experts."""
    experts = first_experts(model)
    torch.manual_seed(2)
    own, weights = x.clone().requires_grad_(), torch.rand(index.shape).to(x.dtype).requires_grad_()
    y = experts(own, index, weights)
    y.backward(torch.randn_like(y))
    return [y.detach(), own.grad, weights.grad, *(b.grad for b in experts.parameters() if b.requires_grad)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("rule", "std"), [("live", 0.0), ("live", 0.02), ("live-both", 0.02), ("accumulate", 0.02)])
def test_grouped_products_are_the_loop(family: str, rule: str, std: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, but that O B^T is rounded before it is added, after which some codes of `down`'s input are others.

    That changes 1.3 % of the norm at most in 60 draws; without B^T it would be 5 to 50 %.
    """
    on_cpu(monkeypatch)
    torch.manual_seed(0)
    x, index = torch.randn(29, 64, dtype=torch.bfloat16), torch.rand(29, 4).argsort(1)[:, :2]
    index[index == 1] = 0  # no token goes to expert 1; both entries of a token may name the same expert
    index[3] = 4  # to skip
    found = []
    for together in (False, True):
        model, method = converted(family, rule, together)
        set_b(method, std)
        found.append(results(model, x, index))
    none = 0
    for alone, joined in zip(*found, strict=True):
        assert (alone is None) == (joined is None)
        none += alone is None
        if alone is None:
            continue
        if std and rule != "accumulate":
            assert (joined.float() - alone.float()).norm() <= 0.025 * alone.float().norm()
        else:
            assert torch.equal(joined, alone)
    assert none == (4 if rule == "live-both" else 2)  # B, and A, of the two layers of expert 1


@pytest.mark.parametrize("rule", ["live-nearest", "live-both", "live-flush"])
def test_a_grouped_run_moves_no_expert_without_tokens(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    on_cpu(monkeypatch)
    model, method = converted(rule=rule)
    never_to(model, 1)
    set_b(method, 0.02)
    before = {name: layer.lora_B.detach().clone() for name, layer in method.layers.items()}
    codes = {name: layer.codes.view(torch.uint8).clone() for name, layer in method.layers.items()}
    optimizer = torch.optim.AdamW(method.parameters().values(), lr=0.05, weight_decay=0.1)
    for _ in range(2):  # gradients of two batches are added
        loss_of(model).backward()
    optimizer.step()
    kept = {name for name, layer in method.layers.items() if torch.equal(before[name], layer.lora_B)}
    assert kept == {name for name in method.layers if ".experts.1." in name}
    method.after_step(0, measure=False)
    moved = {
        name for name, layer in method.layers.items() if not torch.equal(codes[name], layer.codes.view(torch.uint8))
    }
    assert bool(moved) == (rule != "live-nearest")
    assert rule == "live-flush" or not any(".experts.1." in name for name in moved)
    assert not any(layer.lora_B.grad is not None for name, layer in method.layers.items() if ".experts.1." in name)


def test_layers_keep_their_names_and_are_saved_alone(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_cpu(monkeypatch)
    plain, joined = converted(together=False)[1], converted()[1]
    path = tmp_path / "state.safetensors"
    save_file(joined.step_state() | joined.adapter(), path)
    assert load_file(path).keys() == (plain.step_state() | plain.adapter()).keys()
    for name, weight in plain.deployed_weights().items():
        assert torch.equal(weight.values.view(torch.uint8), joined.deployed_weights()[name].values.view(torch.uint8))


def test_a_tensor_replaced_in_a_layer_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    on_cpu(monkeypatch)
    model, method = converted()
    x, index = torch.randn(8, 64, dtype=torch.bfloat16), torch.zeros(8, 1, dtype=torch.int64)
    first = results(model, x, index)[0]
    layer = method.layers["model.layers.0.mlp.experts.0.down_proj"]
    layer.code_bytes.data, layer.lora_B.data = layer.code_bytes.clone(), layer.lora_B.data + 1.0
    assert not torch.equal(results(model, x, index)[0], first)


def test_experts_with_an_observer_run_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    on_cpu(monkeypatch)
    model, method = converted()
    seen: list[int] = []
    method.layers["model.layers.0.mlp.experts.2.gate_proj"].observer = lambda x: seen.append(len(x))
    with torch.no_grad():
        model(input_ids=IDS)
    assert 0 < sum(seen) < IDS.numel()


def test_scales_that_are_no_powers_of_two_are_not_grouped() -> None:
    model = mixture()
    method_of("released").prepare(model)
    grouped.group_experts(model)
    assert all(m.grouped is None for m in model.modules() if isinstance(m, UnstackedExperts))


def test_gate_and_up_may_be_layers_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    on_cpu(monkeypatch)
    x, index = torch.randn(13, 64, dtype=torch.bfloat16), torch.rand(13, 4).argsort(1)[:, :2]
    found = []
    for together in (False, True):
        model, method = mixture(), method_of("live")
        method.rule = replace(method.rule, stacked=False)
        method.prepare(model)
        assert "model.layers.0.mlp.experts.0.up_proj" in method.layers
        if together:
            grouped.group_experts(model)
            assert first_experts(model).grouped is not None
        found.append(results(model, x, index))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))  # B is zero: nothing is rounded


def test_stacks_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    on_cpu(monkeypatch)
    model, method = converted()
    before = [(layer.codes.data_ptr(), layer.lora_B.data_ptr()) for layer in method.layers.values()]
    loss_of(model).backward()
    assert [(layer.codes.data_ptr(), layer.lora_B.data_ptr()) for layer in method.layers.values()] == before


def swap(model: torch.nn.Module) -> None:
    """The up projection holds both, in the order up, gate."""
    for expert in first_experts(model).children():
        if isinstance(expert, Expert):
            children = expert._modules
            children["gate_proj"], children["up_proj"] = children["up_proj"], children["gate_proj"]


def one_differs(name: str, value: object, model: torch.nn.Module) -> None:
    setattr(first_experts(model).get_submodule("2.down_proj"), name, value)


@pytest.mark.parametrize(
    "change",
    [swap, partial(one_differs, "live", False), partial(one_differs, "rank", 16),
     partial(one_differs, "bias", torch.zeros(64))],
    ids=["up-first", "live", "rank", "bias"],
)  # fmt: skip
def test_layers_that_cannot_be_one_product_are_not_grouped(change: Callable[[torch.nn.Module], None]) -> None:
    model, _ = converted(together=False)
    change(model)
    grouped.group_experts(model)
    assert first_experts(model).grouped is None


def test_sides_that_the_kernel_does_not_take_are_not_grouped() -> None:
    model = mixture()
    FalqonMethod(update_rule("live"), rank=12, rows=None, initialisation=Initialisation.RANDOM, seed=0).prepare(model)
    grouped.group_experts(model)
    assert first_experts(model).grouped is None


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0), (10, 3), (11, 0), (12, 0)])
def test_only_gpus_with_a_kernel_group(capability: tuple[int, int]) -> None:
    assert not grouped.supported(torch.zeros(4, 64, dtype=torch.bfloat16))
    with fake_cuda(capability):
        found = [
            grouped.supported(torch.empty(rows, 64, device="cuda", dtype=dtype))
            for rows in (0, 1, 4) for dtype in (torch.bfloat16, torch.float16, torch.float32)
        ]  # fmt: skip
    has = capability[0] in (9, 10)
    assert found == [False, False, False, has, False, False, has, False, False]


def test_torch_has_the_kernel_on_linux_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert grouped.has_kernel(torch.bfloat16, (9, 0)) == (sys.platform == "linux")
    monkeypatch.setattr(sys, "platform", "win32")
    assert not grouped.has_kernel(torch.bfloat16, (9, 0))


@pytest.mark.parametrize(
    ("index", "reached"),
    [([[0, 2], [2, 2]], [True, False, True]), ([[3, 1], [3, 3]], [False, True, False]), ([[3], [3]], [False] * 3)],
)
def test_experts_with_tokens_are_known(index: list[list[int]], reached: list[bool]) -> None:
    assert grouped.Routes(torch.tensor(index), 3).reached() == reached  # 3 is to skip


def test_the_host_waits_for_its_copy_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    event = SimpleNamespace(record=lambda: calls.append("record"), synchronize=lambda: calls.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    with fake_cuda(integer=0) as counter:
        routes = grouped.Routes(torch.zeros(4, 2, device="cuda", dtype=torch.int64), 3)
    assert calls == ["record"]
    assert not counter.syncs
    routes._host = torch.tensor([1, 1, 8])  # fake tensors have no values
    assert routes.reached() == [True, False, True]
    assert calls == ["record", "synchronize"]


def on_cuda(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")


def counted(experts: int, together: bool, monkeypatch: pytest.MonkeyPatch) -> tuple[Counter, Counter]:
    """Kernels and waits of one layer of experts, forward and backward."""
    event = SimpleNamespace(record=lambda: None, synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    monkeypatch.setattr(grouped.Routes, "reached", lambda routes: [True] * experts)  # fake tensors have no values
    model = mixture(num_local_experts=experts, num_hidden_layers=1)
    method_of("live").prepare(model)
    module = first_experts(model)
    with fake_cuda(integer=0) as counter:
        for layer in module.modules():
            for name, buffer in layer._buffers.items():
                layer._buffers[name] = None if buffer is None else on_cuda(buffer)
            for name, parameter in layer._parameters.items():
                layer._parameters[name] = torch.nn.Parameter(on_cuda(parameter), parameter.requires_grad)
        if together:
            grouped.group_experts(module)
        module.call_all = not together
        x = torch.empty(32, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        index = torch.zeros(32, 2, device="cuda", dtype=torch.int64)
        weights = torch.empty(32, 2, device="cuda", dtype=torch.bfloat16)
        counter.clear()
        module(x, index, weights).backward(torch.empty_like(x))
        return Counter(counter.kernels), Counter(counter.syncs)


def test_kernels_on_cuda_do_not_grow_with_the_number_of_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    few, waits = counted(4, True, monkeypatch)
    many, _ = counted(16, True, monkeypatch)
    assert not waits
    assert few == many
    loop, waits = counted(16, False, monkeypatch)
    assert waits["nonzero"] == 16  # and two more to find the experts with tokens, where not all are called
    assert loop.total() > 10 * many.total()
    assert few["_grouped_mm"] == 2 * 5  # a projection: X [W; A]^T, O B^T, G B, dX, dB


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", FAMILIES)
def test_grouped_products_on_a_gpu_are_near_the_loop(family: str) -> None:
    """As on a CPU, and with fp32 sums in another order, which is a bf16 unit at most."""
    if torch.cuda.get_device_capability()[0] not in (9, 10):
        pytest.skip("torch has no grouped kernels for this GPU")
    x, index = torch.randn(29, 64, dtype=torch.bfloat16), torch.rand(29, 4).argsort(1)[:, :2]
    index[index == 1] = 0
    found = []
    for together in (False, True):
        model, method = converted(family, together=False)
        set_b(method, 0.02)
        model.cuda()
        if together:
            grouped.group_experts(model)
        torch.manual_seed(2)
        found.append(results(model, x.cuda(), index.cuda()))
    for alone, joined in zip(*found, strict=True):
        assert (alone is None) == (joined is None)
        if alone is not None:
            assert (joined.float() - alone.float()).norm() <= (0.025 + 2**-8) * alone.float().norm()
