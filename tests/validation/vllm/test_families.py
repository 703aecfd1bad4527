"""Read-back in a real vLLM where its classes fuse without saying so, or permute rows: right exports are accepted, and
what is changed in one is named.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from artifact_tree import rehash
from breadth import LONG, only_long
from safetensors.torch import load_file, save_file
from tiny_checkpoints import write_plain
from torch import Tensor

from exporters.vllm.environment import last_lines
from exporters.vllm.export import export_vllm
from exporters.vllm.options import ExportFormat, VllmExportOptions
from fp8pipe.artifact import open_artifact
from fp8pipe.artifact.record import ExportRejectedError
from fp8pipe.models.compat import import_transformers
from validation.vllm.expected import ExpectedWeights, plan_of, weight_report
from validation.vllm.held import Holding
from validation.vllm.launcher import PARITY_ARGUMENTS, PROBE, ProbeJob, in_process
from validation.vllm.record import WeightReport
from validation.vllm.validate import validate_export

HOST = Path(__file__).parents[2] / "serving" / "vllm_plugin" / "engine_host.py"
pytestmark = [pytest.mark.vllm, pytest.mark.slow]

_IDS = {"vocab_size": 260, "bos_token_id": 256, "eos_token_id": 256}
# vLLM's attention for CPUs takes no heads of fewer than 32.
_SHAPE = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, **_IDS}
_DECODER = {**_SHAPE, "intermediate_size": 96, "num_key_value_heads": 2, "max_position_embeddings": 128}
_FALCON = {
    "new_decoder_architecture": True,
    "num_kv_heads": 2,
    "bias": True,
    "alibi": False,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True)
class Family:
    """An architecture, and two of each layer's matrices: the one that the engine rearranges, and another."""

    config: str
    options: dict[str, Any]
    first: str
    second: str
    format: ExportFormat = ExportFormat.FP8


def _layer(place: str, first: str, second: str) -> dict[str, str]:
    return {"first": f"{place}.{first}.weight", "second": f"{place}.{second}.weight"}


FAMILIES = {
    "stablelm": Family("StableLmConfig", {**_DECODER, "use_qkv_bias": True, "tie_word_embeddings": False},
                       **_layer("model.layers.{}", "self_attn.k_proj", "mlp.up_proj")),
    "falcon": Family("FalconConfig", {**_SHAPE, **_FALCON},
                     **_layer("transformer.h.{}", "self_attention.query_key_value", "mlp.dense_4h_to_h")),
    "bloom": Family("BloomConfig", {"hidden_size": 128, "n_layer": 2, "n_head": 4, **_IDS},
                    **_layer("transformer.h.{}", "self_attention.query_key_value", "mlp.dense_h_to_4h")),
    "gpt_neox": Family("GPTNeoXConfig", {**_SHAPE, "intermediate_size": 96},
                       **_layer("gpt_neox.layers.{}", "attention.query_key_value", "mlp.dense_h_to_4h")),
    "gpt2": Family("GPT2Config", {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 128, **_IDS},
                   **_layer("transformer.h.{}", "attn.c_attn", "mlp.c_proj")),
    "phi3": Family("Phi3Config", {**_DECODER, "pad_token_id": 0, "tie_word_embeddings": False},
                   **_layer("model.layers.{}", "self_attn.qkv_proj", "mlp.gate_up_proj")),
    "mixtral": Family("MixtralConfig", {**_DECODER, "num_local_experts": 2, "num_experts_per_tok": 1},
                      **_layer("model.layers.{}", "self_attn.k_proj", "block_sparse_moe.experts.1.w2"),
                      format=ExportFormat.BF16),
}  # fmt: skip
# GPT-NeoX permutes its rows as BLOOM does; experts have tests of their own.
CHOSEN = [name for name in FAMILIES if LONG or name not in {"bloom", "mixtral"}]


def write_model(folder: Path, family: Family) -> Path:
    transformers = import_transformers()
    torch.manual_seed(3)
    config = getattr(transformers, family.config)(**family.options)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():  # no two equal: zeros and ones could stand for each other
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return write_plain(folder, model)


def change(export: Path, copy: Path, family: Family) -> list[str]:
    """Changes a copy of an export: one code by one, two rows and their scales, two tensors and theirs; their names."""
    shutil.copytree(export, copy)
    found = load_file(export / "model.safetensors")
    first, swapped = family.first.format(0), family.first.format(1)
    found[first].view(torch.uint8 if found[first].dtype.itemsize == 1 else torch.int16).view(-1)[77] ^= 1
    for name in (swapped, f"{swapped}_scale"):
        if name in found:
            _swap(found[name])
    here, there = family.second.format(0), family.second.format(1)
    for end in ("", "_scale"):
        if here + end in found:
            found[here + end], found[there + end] = found[there + end], found[here + end]
    save_file(found, copy / "model.safetensors", metadata={"format": "pt"})
    return sorted([first, swapped, here, there])


def _swap(value: Tensor) -> None:
    codes = value.view(torch.uint8) if value.dtype.itemsize == 1 else value
    codes[[2, 5]] = codes[[5, 2]]


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of each family, `NAME` and its export `NAME-export`."""
    root = tmp_path_factory.mktemp("families")
    for name in CHOSEN:
        options = VllmExportOptions(format=FAMILIES[name].format)
        export_vllm(write_model(root / name, FAMILIES[name]), root / f"{name}-export", options)
    return root


@pytest.fixture(scope="module")
def reports(exports: Path, python: Path) -> dict[str, tuple[WeightReport, WeightReport, list[str]]]:
    """By family: of the right export, of the changed one, and what was changed. All engines in one process."""
    jobs, judged, changed = [], {}, {}
    for name in CHOSEN:
        export, copy = exports / f"{name}-export", exports / f"{name}-changed"
        artifact = open_artifact(export)
        expected = ExpectedWeights(artifact, plan_of(artifact, exports / name))
        digests = {e.name: e.digests() for e in expected}
        changed[name], judged[name] = change(export, copy, FAMILIES[name]), (expected, digests)
        for place in (export, copy):
            job = ProbeJob(str(place), [*PARITY_ARGUMENTS, "--max-model-len", "64"], digests, [[3, 4, 5]])
            dump = exports / f"{place.name}-differs"
            dump.mkdir()
            jobs.append({**asdict(job), "dump": str(dump), "result": str(exports / "result.json")})
    (exports / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
    with (exports / "log").open("wb") as log:
        command = [str(python), "-P", str(HOST), str(PROBE), str(exports / "jobs.json")]
        subprocess.run(command, stdout=log, stderr=log, env=in_process(), check=False, timeout=1800)
    assert (exports / "result.json").is_file(), last_lines(exports / "log", 60)
    results = json.loads((exports / "result.json").read_text(encoding="utf-8"))
    assert not any("error" in result for result in results), last_lines(exports / "log", 80)
    found = [weight_report(*judged[name], Holding(torch.float32), result) for name, result in zip(
        [name for name in CHOSEN for _ in range(2)], results, strict=True)]  # fmt: skip
    return {name: (found[2 * i], found[2 * i + 1], changed[name]) for i, name in enumerate(CHOSEN)}


@pytest.mark.parametrize("name", CHOSEN)
def test_a_right_export_is_found_right(reports: Any, name: str) -> None:
    right, _, _ = reports[name]
    assert (right.different, right.missing, right.unexplained, right.gemm_differs) == ([], [], [], [])
    assert all(gate.passed for gate in right.gates("in fp32"))


@pytest.mark.parametrize("name", CHOSEN)
def test_what_was_changed_is_named(reports: Any, name: str) -> None:
    _, wrong, changed = reports[name]
    assert sorted(wrong.different) == changed
    assert (wrong.missing, wrong.unexplained) == ([], [])


@only_long
@pytest.mark.parametrize("name", CHOSEN)
def test_a_whole_validation_accepts(exports: Path, python: Path, name: str) -> None:
    record = validate_export(exports / f"{name}-export", against=exports / name, prompts=["Hello"], max_tokens=2)
    assert record.verdict == "ACCEPT"
    assert record.served is not None


@only_long
@pytest.mark.parametrize("name", CHOSEN)
def test_a_whole_validation_rejects_one_code_and_names_its_layer(
    exports: Path, python: Path, tmp_path: Path, name: str
) -> None:
    copy = Path(shutil.copytree(exports / f"{name}-export", tmp_path / "export"))
    found = load_file(copy / "model.safetensors")
    layer = FAMILIES[name].first.format(1)
    found[layer].view(torch.uint8 if found[layer].dtype.itemsize == 1 else torch.int16).view(-1)[300] ^= 1
    save_file(found, copy / "model.safetensors", metadata={"format": "pt"})
    rehash(copy)
    with pytest.raises(ExportRejectedError) as caught:
        validate_export(copy, against=exports / name, prompts=["Hello"], max_tokens=2)
    assert any(layer in reason for reason in caught.value.record.reasons), caught.value.record.reasons
