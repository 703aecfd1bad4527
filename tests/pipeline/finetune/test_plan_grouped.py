"""What a plan says of the GPU's memory where experts run as grouped products, against fake CUDA tensors."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_cuda import CudaCounter, fake_cuda

from fp8pipe.core import machine
from fp8pipe.core.config import build_config
from fp8pipe.core.machine import Gpu
from fp8pipe.models.compat import import_transformers
from fp8pipe.models.language.unstacking import unstack_experts
from pipeline.dry_run.memory import phase_bytes
from pipeline.dry_run.workload import Workload
from pipeline.falqon import grouped
from pipeline.finetune import needs
from pipeline.finetune.batches import Batch
from pipeline.finetune.config import FinetuneConfig
from pipeline.finetune.loop import Trainer
from pipeline.finetune.plan import plan_finetune
from pipeline.finetune.processes import build_method

EXPERTS, HOPPER, ADA = 16, (9, 0), (8, 9)
SHAPES = {
    "vocab_size": 272, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_local_experts": EXPERTS, "num_experts_per_tok": 2, "max_position_embeddings": 512,
}  # fmt: skip


class Same:
    """The same batch at every step."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def at(self, step: int) -> Batch:
        return self.batch


@pytest.fixture
def mixture(make_base: Any) -> tuple[Path, Any]:
    """A small model of 16 experts with the tokenizer of the other tiny models, saved and in memory."""
    path, transformers = make_base(), import_transformers()
    model = transformers.AutoModelForCausalLM.from_config(transformers.MixtralConfig(**SHAPES)).to(torch.bfloat16)
    model.save_pretrained(path)
    unstack_experts(model)
    return path, model


@pytest.fixture
def workload(mixture: tuple[Path, Any], pairs: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`workload(capability, ...)`: the configuration and the shapes that its plan is made of, on such a GPU."""

    def plan(capability: tuple[int, int], memory: int = 24 << 30, **changes: object) -> tuple[FinetuneConfig, Workload]:
        given: list[Workload] = []
        monkeypatch.setattr(machine, "gpus", lambda: [Gpu("a GPU of no table", capability, memory)])
        monkeypatch.setattr(needs, "phase_bytes", lambda work: given.append(work) or phase_bytes(work))
        values = {
            "model": str(mixture[0]), "data": str(pairs), "rank": 16, "steps": 100, "log_every": 50, "batch_size": 8,
            "sequence_length": 64, "initialisation": "random", "device": "cuda",
        }  # fmt: skip
        config = build_config(FinetuneConfig, values | changes)
        plan_finetune(config)
        return config, given[0]

    return plan


def to_fake_cuda(model: torch.nn.Module) -> None:
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else fake(buffer)
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = torch.nn.Parameter(fake(parameter), parameter.requires_grad)


def fake(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")


def one_step(
    config: FinetuneConfig, work: Workload, model: Any, method: Any, counter: CudaCounter, folder: Path
) -> int:
    """Bytes that the second step holds at most: the first makes the optimizer's state."""
    tokens = torch.zeros(work.tokens // work.length, work.length, dtype=torch.int64)
    places = torch.arange(work.length).expand(tokens.shape).contiguous()
    data = Same(Batch(tokens, tokens.clone(), places, work.tokens, work.answers, ()))
    trainer = Trainer(config, model.train(), method, data, data, None, folder / "metrics.jsonl")
    trainer.one_step()
    counter.clear()
    trainer.one_step()
    return counter.peak


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")
def test_a_plan_counts_what_grouped_experts_hold(
    mixture: tuple[Path, Any], workload: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step decodes a projection of all experts; stacking copies one, the most only if weights wait on the host."""
    config, work = workload(HOPPER)
    event = SimpleNamespace(record=lambda: None, synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    monkeypatch.setattr(grouped.Routes, "reached", lambda routes: [True] * EXPERTS)  # fake tensors have no values
    model, method = mixture[1], build_method(config)
    method.prepare(model)
    with fake_cuda(HOPPER, found=work.answers, integer=work.answers) as counter:
        to_fake_cuda(model)
        counter.clear()
        grouped.group_experts(model)
        stacked = counter.peak
        stepped = one_step(config, work, model, method, counter, tmp_path)
    alone, waiting = workload(ADA)[1], workload(HOPPER, memory=work.stored[0])[1]
    assert phase_bytes(work)["step"] == pytest.approx(stepped, rel=0.1)
    assert phase_bytes(alone)["step"] < 0.9 * stepped
    assert waiting.streamed
    assert phase_bytes(waiting)["prepare"] == pytest.approx(stacked, rel=0.1)


def test_experts_that_run_one_by_one_are_planned_one_by_one(workload: Any) -> None:
    def together(*arguments: Any, **changes: Any) -> set[int]:
        return {group.together for group in workload(*arguments, **changes)[1].groups}

    assert together(HOPPER) == {1, EXPERTS}  # attention, and experts
    assert together(ADA) == together(HOPPER, rank=12) == together(HOPPER, dtype="float32") == {1}
    assert together(HOPPER, update_rule="released") == {1}
