"""Unstacked experts: the numbers of transformers' own, the names of checkpoints, and routers seen by their place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from language_models import ARCHITECTURES, build, llama_like, write
from safetensors.torch import load_file, save_file

from exporters.vllm.export import plan_export
from exporters.vllm.options import VllmExportOptions
from fp8pipe.core.errors import ConfigurationError
from fp8pipe.models.checkpoint.names import naming_of
from fp8pipe.models.compat import import_transformers
from fp8pipe.models.language.base import check_base
from fp8pipe.models.language.experts import UnstackedExperts, call_every_expert, find_routers
from fp8pipe.models.language.structure import load_config, structure_of
from fp8pipe.models.language.unstacking import unstack_experts

FAMILIES = ("mixtral", "qwen3_moe", "deepseek_v3")  # whose checkpoints store experts one by one


def experts_of(model: torch.nn.Module) -> UnstackedExperts:
    return next(module for module in model.modules() if isinstance(module, UnstackedExperts))


@pytest.mark.parametrize("name", [*FAMILIES, "gpt_oss", "granitemoe", "granitemoeshared", "granitemoehybrid", "llama4"])
def test_the_model_says_what_it_said(name: str) -> None:
    model = build(ARCHITECTURES[name]).float()
    ids = torch.arange(3, 19)[None]
    with torch.no_grad():
        before = model(input_ids=ids).logits
        assert unstack_experts(model)
        after = model(input_ids=ids).logits
    # Gate and up are two products now where they were one: sums of 64 numbers in another order.
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5)
    assert unstack_experts(model) == ()  # once is enough


@pytest.mark.parametrize("name", ["mixtral", "granitemoe"])
def test_all_experts_with_equal_weights_are_a_dense_layer(name: str) -> None:
    model = build(ARCHITECTURES[name]).float()
    unstack_experts(model)
    experts, x = experts_of(model), torch.randn(7, 64)
    dense = torch.zeros_like(x)
    for number in range(4):
        one = experts.get_submodule(str(number))
        gate, up = x @ one.gate_proj.weight.t(), x @ one.up_proj.weight.t()
        dense += 0.25 * ((torch.nn.functional.silu(gate) * up) @ one.down_proj.weight.t())
    found = experts(x, torch.arange(4).expand(7, 4), torch.full((7, 4), 0.25))
    assert torch.equal(found, dense)


def test_an_expert_with_interleaved_gate_and_clamps_is_a_dense_layer() -> None:
    """gpt-oss's, as its published code defines it: alpha 1.702, limit 7, and up + 1."""
    model = build(ARCHITECTURES["gpt_oss"]).float()
    stacks = {name: 60 * tensor for name, tensor in model.state_dict().items() if "layers.0.mlp.experts." in name}
    model.load_state_dict(stacks, strict=False)
    unstack_experts(model)
    experts, x = experts_of(model), torch.randn(7, 64)
    stack = {name.rpartition(".")[2]: tensor for name, tensor in stacks.items()}
    dense = torch.zeros_like(x)
    for number in range(4):
        joined = torch.addmm(stack["gate_up_proj_bias"][number], x, stack["gate_up_proj"][number])
        gate, up = joined[:, 0::2].clamp(max=7.0), joined[:, 1::2].clamp(-7.0, 7.0)
        assert (joined.abs() > 7).any()
        inner = (up + 1) * (gate * torch.sigmoid(gate * 1.702))
        dense += 0.25 * torch.addmm(stack["down_proj_bias"][number], inner, stack["down_proj"][number])
    found = experts(x, torch.arange(4).expand(7, 4), torch.full((7, 4), 0.25))
    assert torch.equal(found, dense)


@pytest.mark.parametrize("chosen", [1, 2])
def test_experts_of_weighed_inputs_are_a_dense_layer(chosen: int) -> None:
    """Llama 4's: the router's sigmoid multiplies the input of an expert, and the shared expert has none."""
    layer: Any = build(ARCHITECTURES["llama4"]).float().model.layers[1].feed_forward
    layer.top_k = layer.router.top_k = chosen
    inner, outer = layer.experts.gate_up_proj.detach(), layer.experts.down_proj.detach()
    x = torch.randn(5, 64)
    logits = x @ layer.router.weight.t()
    taken = logits.topk(chosen).indices
    dense = torch.zeros_like(x)
    for number in range(4):
        mine = (taken == number).any(1)
        rows = x[mine] * logits[mine][:, [number]].sigmoid()
        gate, up = rows @ inner[number][:, :96], rows @ inner[number][:, 96:]
        dense[mine] += (up * torch.nn.functional.silu(gate)) @ outer[number]
    wrapped = build(ARCHITECTURES["llama4"]).float()
    unstack_experts(wrapped)
    found: Any = wrapped.model.layers[1].feed_forward
    found.top_k = found.router.top_k = chosen
    with torch.no_grad():
        wanted, theirs = layer(x[None])
        output, told = found(x[None])
        assert torch.equal(output, found.shared_expert(x) + dense)
    assert torch.equal(told, theirs)
    torch.testing.assert_close(output, wanted, rtol=0, atol=1e-6)  # sums of 64 numbers in another order


def test_an_expert_that_no_token_reaches_is_not_run_unless_all_are_asked_for() -> None:
    model = build(ARCHITECTURES["mixtral"]).float()
    unstack_experts(model)
    experts, x = experts_of(model), torch.randn(3, 64)
    called = []
    for number in range(4):
        experts.get_submodule(f"{number}.gate_proj").register_forward_pre_hook(
            lambda _, args, number=number: called.append((number, len(args[0])))
        )
    chosen, weights = torch.tensor([[2, 0], [2, 4], [2, 4]]), torch.ones(3, 2)  # 4 stands for none
    first = experts(x, chosen, weights)
    assert called == [(0, 1), (2, 3)]
    called.clear()
    with call_every_expert(model):
        assert torch.equal(experts(x, chosen, weights), first)
    assert called == [(0, 1), (1, 0), (2, 3), (3, 0)]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_tensor_of_a_checkpoint_is_one_of_the_unstacked_model(name: str, tmp_path: Path) -> None:
    model = build(ARCHITECTURES[name])
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    unstack_experts(model)
    state = model.state_dict()
    table = naming_of(model, state).table(stored)
    assert all(known.whole for known in table.values())
    assert all(torch.equal(stored[theirs], state[known.name]) for theirs, known in table.items())
    assert {known.name for known in table.values()} >= {name for name in state if ".experts." in name}


@pytest.mark.parametrize(
    ("name", "routers"),
    [("mixtral", {"model.layers.0.mlp.gate", "model.layers.1.mlp.gate"}), ("deepseek_v3", {"model.layers.1.mlp.gate"}),
     ("gpt_oss", {"model.layers.0.mlp.router", "model.layers.1.mlp.router"}),
     ("granitemoe", {f"model.layers.{layer}.block_sparse_moe.router" for layer in (0, 1)}),
     ("llama4", {"model.layers.1.feed_forward.router"}),
     ("jamba", {"model.layers.1.feed_forward.router"}), ("llama", set())],
)  # fmt: skip
def test_routers_are_found_by_their_place_and_never_trained(name: str, routers: set[str]) -> None:
    model = build(ARCHITECTURES[name])
    assert find_routers(model) == routers
    unstack_experts(model)
    structure = structure_of(model)
    assert find_routers(model) == routers
    assert {module for module, why in structure.left_out.items() if why.startswith("router")} == routers


@pytest.mark.parametrize(
    ("kind", "settings", "routers"),
    [
        ("HunYuanMoEV1", {"num_experts": 32, "moe_topk": 2, "head_dim": 16},
         {"model.layers.0.mlp.gate.wg", "model.layers.1.mlp.gate.wg"}),
        ("Afmoe", {"num_experts": 32, "num_experts_per_tok": 2, "num_dense_layers": 1, "moe_intermediate_size": 32,
                   "head_dim": 16, "num_shared_experts": 1}, {"model.layers.1.mlp.router.gate"}),
    ],
)  # fmt: skip
def test_a_router_inside_a_module_of_its_own_is_never_trained(kind: str, settings: dict, routers: set[str]) -> None:
    """With as many experts as an FP8 kernel needs rows, its size does not tell it from other layers."""
    model = build(llama_like(kind, **settings))
    unstack_experts(model)
    structure = structure_of(model)
    assert {module for module, why in structure.left_out.items() if why.startswith("router")} == routers
    assert all(len(structure.trainable) > len(routers) and router not in structure.trainable for router in routers)


def test_stacks_of_other_families_stay_stacked() -> None:
    aria = {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1}
    assert unstack_experts(build(llama_like("AriaText", **aria))) == ()
    assert unstack_experts(torch.nn.Linear(2, 2)) == ()


@pytest.mark.parametrize("count", [3, 5])
def test_another_number_of_experts_than_declared_is_refused_with_both(count: int, tmp_path: Path) -> None:
    base = write(ARCHITECTURES["qwen3_moe"], tmp_path)
    tensors = load_file(base / "model.safetensors")
    one = {name: value for name, value in tensors.items() if "layers.1.mlp.experts.3." in name}
    for name, value in one.items():
        if count == 3:
            del tensors[name]
        else:
            tensors[name.replace("experts.3.", "experts.4.")] = value.clone()
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigurationError, match=rf"{count} experts in model\.layers\.1\.mlp\.experts.* declares 4"):
        check_base(base, "my model")
    with pytest.raises(ConfigurationError, match=f"{count} experts"):
        plan_export(base, VllmExportOptions())


def test_on_paper_no_two_experts_are_taken_for_one() -> None:
    one = ARCHITECTURES["mixtral"]
    transformers = import_transformers()
    with torch.device("meta"):
        paper = getattr(transformers, one.kind)._from_config(getattr(transformers, one.config)(**one.settings))
    unstack_experts(paper)
    structure = structure_of(paper)
    assert structure.shared == frozenset()
    assert len(structure.trainable) == one.trained


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_experts_per_tok": 5}, "num_experts_per_tok is 5, of 4 experts"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok is 0, of 4 experts"),
        ({"num_local_experts": 8, "num_experts": 4}, "num_local_experts is 8 and num_experts is 4"),
        ({"text_config": {"num_experts": 2, "num_experts_per_tok": 3}}, "text_config.num_experts_per_tok is 3, of 2"),
    ],
)
def test_settings_of_experts_that_contradict_each_other_are_refused_with_both(
    changes: dict[str, object], words: str, tmp_path: Path
) -> None:
    base = write(ARCHITECTURES["qwen3_moe"], tmp_path)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ConfigurationError, match="contradicts itself about experts") as refused:
        load_config(base)
    assert words in str(refused.value.why)
