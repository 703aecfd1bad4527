"""Experts in a real vLLM: each one's codes are read back, and experts that were swapped or scaled are named."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from artifact_tree import rehash
from breadth import only_long
from lasting_engines import probed
from safetensors.torch import load_file, save_file
from tiny_checkpoints import write_plain

from exporters.vllm.export import export_vllm
from exporters.vllm.options import VllmExportOptions
from fp8pipe.artifact import open_artifact
from fp8pipe.artifact.record import ExportRejectedError
from fp8pipe.models.compat import import_transformers
from validation.vllm.expected import ExpectedWeights, plan_of, weight_report
from validation.vllm.held import Holding
from validation.vllm.launcher import PARITY_ARGUMENTS, ProbeJob, in_process
from validation.vllm.validate import validate_export

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

_SHAPE = {
    "vocab_size": 260, "bos_token_id": 256, "eos_token_id": 256, "hidden_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96, "max_position_embeddings": 128,
}  # fmt: skip
# vLLM's latent attention for CPUs takes keys of 576 features alone: 512 and the rotated 64.
_MLA = {"q_lora_rank": 48, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 64, "v_head_dim": 64}
# Multipliers of Granite 3.0. Those of transformers' defaults would leave attention to one token.
_GRANITE = {"num_local_experts": 4, "num_experts_per_tok": 2, "attention_multiplier": 0.0156, "logits_scaling": 6.0,
            "embedding_multiplier": 12.0, "residual_multiplier": 0.22}  # fmt: skip
FAMILIES = {
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": ("Qwen3MoeConfig", {"head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2,
                                     "moe_intermediate_size": 64}),
    "deepseek_v3": ("DeepseekV3Config", {**_MLA, "num_key_value_heads": 4, "moe_intermediate_size": 64,
                                         "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2,
                                         "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1,
                                         "topk_method": "noaux_tc", "scoring_func": "sigmoid"}),
    "gpt_oss": ("GptOssConfig", {"head_dim": 32, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8,
                                 "pad_token_id": None, "rope_parameters": {
                                     "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "beta_fast": 32.0,
                                     "beta_slow": 1.0, "original_max_position_embeddings": 32}}),
    "granitemoe": ("GraniteMoeConfig", _GRANITE),
    "granitemoeshared": ("GraniteMoeSharedConfig", {**_GRANITE, "shared_intermediate_size": 64}),
    "granitemoehybrid": ("GraniteMoeHybridConfig", {**_GRANITE, "shared_intermediate_size": 64,
                                                    "layer_types": ["attention"] * 2}),
    # vLLM's attention in chunks needs whole blocks of its cache, which have 128 tokens on CPUs.
    "llama4": ("Llama4TextConfig", {"head_dim": 32, "num_local_experts": 4, "num_experts_per_tok": 1,
                                    "intermediate_size_mlp": 160, "interleave_moe_layer_step": 1,
                                    "no_rope_layers": [1, 0], "attention_chunk_size": 128, "pad_token_id": None}),
}  # fmt: skip
# Experts without and with biases, gate and up one after the other or interleaved, and routing weights on inputs.
READ_BACK = ("qwen3_moe", "gpt_oss", "granitemoe", "llama4")
BLOCKS = {
    "granitemoe": "block_sparse_moe",
    "granitemoeshared": "block_sparse_moe",
    "granitemoehybrid": "block_sparse_moe",
    "llama4": "feed_forward",
}


def layer_of(name: str) -> str:
    """The name of the experts of the second layer."""
    return f"model.layers.1.{BLOCKS.get(name, 'mlp')}.experts"


def leaves(name: str) -> tuple[str, ...]:
    """The ends of the names of an expert's tensors, without those of scales."""
    if name == "gpt_oss":
        return ("gate_up_proj.weight", "gate_up_proj.bias", "down_proj.weight", "down_proj.bias")
    return ("gate_proj.weight", "up_proj.weight", "down_proj.weight")


def write_model(folder: Path, name: str) -> Path:
    transformers = import_transformers()
    torch.manual_seed(3)
    config, more = FAMILIES[name]
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**_SHAPE | more))
    for parameter in model.parameters():  # no two equal: zeros and ones could stand for each other
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    for module in model.modules():
        if hasattr(module, "gate_up_proj_bias"):  # so large that some gates and ups are clamped
            module.gate_up_proj_bias.data.normal_(std=6)
    return write_plain(folder, model)


def swapped(name: str, export: Path) -> list[str]:
    """Put two experts in each other's place, scales and all; names of what is wrong then."""
    found, layer = load_file(export / "model.safetensors"), layer_of(name)
    ends = [key.removeprefix(f"{layer}.1.") for key in found if key.startswith(f"{layer}.1.")]
    for end in ends:
        one, other = (f"{layer}.{number}.{end}" for number in (1, 2))
        found[one], found[other] = found[other], found[one]
    save_file(found, export / "model.safetensors", metadata={"format": "pt"})
    return sorted(f"{layer}.{number}.{end}" for number in (1, 2) for end in ends if not end.endswith("_scale"))


def scaled(name: str, export: Path) -> list[str]:
    """Double the scales of one expert; its name."""
    found = load_file(export / "model.safetensors")
    found[f"{layer_of(name)}.3.down_proj.weight_scale"].mul_(2)
    save_file(found, export / "model.safetensors", metadata={"format": "pt"})
    return [f"{layer_of(name)}.3.down_proj.weight"]


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models and an export of each, named after it with `-export` added."""
    root = tmp_path_factory.mktemp("experts")
    for name in READ_BACK:
        export_vllm(write_model(root / name, name), root / f"{name}-export", VllmExportOptions())
    return root


def test_every_expert_is_read_back_and_a_wrong_one_is_named(exports: Path, python: Path, tmp_path: Path) -> None:
    cases = []
    for name in READ_BACK:
        export, wrong = exports / f"{name}-export", tmp_path / name
        artifact = open_artifact(export)
        expected = ExpectedWeights(artifact, plan_of(artifact, exports / name))
        digests = {tensor.name: tensor.digests() for tensor in expected}
        shutil.copytree(export, wrong)
        names = sorted([*swapped(name, wrong), *scaled(name, wrong)])
        cases += [(name, expected, digests, wrong, "none", names), (name, expected, digests, export, "quant", [])]
    arguments = [*PARITY_ARGUMENTS, "--max-model-len", "64"]
    jobs = [
        ProbeJob(
            str(place), arguments, digests, [[3, 4, 5]], products=True,
            variables=in_process() | {"FP8PIPE_VLLM_ACTIVATIONS": way},
        )
        for _, _, digests, place, way, _ in cases
    ]  # fmt: skip
    results = probed(python, jobs, tmp_path)
    for (name, expected, digests, place, way, wrong), result in zip(cases, results, strict=True):
        case = f"{name} {place.name} {way}"
        report = weight_report(expected, digests, Holding(torch.float32), result)
        assert sorted(report.different) == wrong, case
        assert (report.missing, report.unexplained) == ([], []), case
        experts = [told for layer, told in result["layers"].items() if ".experts" in layer]
        weights = [leaf for leaf in leaves(name) if leaf.endswith("weight")]
        assert [len(told["tensors"]) for told in experts] == [4 * len(weights)] * 2
        right, other = ("rounded", "plain") if way == "quant" else ("plain", "rounded")
        assert all(told[f"error_{right}"] <= 1 < told[f"error_{other}"] for told in experts), case


@only_long
@pytest.mark.parametrize("name", FAMILIES)
def test_a_whole_validation_accepts(name: str, python: Path, tmp_path: Path) -> None:
    export_vllm(write_model(tmp_path / name, name), tmp_path / "export", VllmExportOptions())
    record = validate_export(tmp_path / "export", against=tmp_path / name, prompts=["Hello"], max_tokens=2)
    assert record.verdict == "ACCEPT"


@only_long
@pytest.mark.parametrize("change", [swapped, scaled])
@pytest.mark.parametrize("name", READ_BACK)
def test_a_whole_validation_rejects_by_name(name, change, exports: Path, python: Path, tmp_path: Path) -> None:
    shutil.copytree(exports / f"{name}-export", tmp_path / "export")
    names = change(name, tmp_path / "export")
    rehash(tmp_path / "export")
    with pytest.raises(ExportRejectedError) as caught:
        validate_export(tmp_path / "export", against=exports / name, prompts=["Hello"], max_tokens=2)
    assert any(names[0] in reason for reason in caught.value.record.reasons), caught.value.record.reasons
