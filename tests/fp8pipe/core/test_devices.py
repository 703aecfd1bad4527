"""One resolution of `--device`: what `auto` takes and says, what a named GPU must have, and what is refused why."""

from __future__ import annotations

import logging

import pytest
import torch

from fp8pipe.core import machine
from fp8pipe.core.devices import GpuNeed, has_kernels, on_device, parts_on, resolve_device, to_device
from fp8pipe.core.errors import MissingCapabilityError
from fp8pipe.core.machine import Gpu
from pipeline.finetune.config import FALQON_NEED, LORA_NEED, FinetuneConfig
from pipeline.vit.config import VIT_NEED, QuantizeVitConfig

HOPPER, AMPERE, VOLTA = Gpu("H200", (9, 0), 141 << 30), Gpu("A100", (8, 0), 40 << 30), Gpu("V100", (7, 0), 16 << 30)


@pytest.fixture
def here(monkeypatch):
    """Puts GPUs into this machine, or none, and another version of torch, built for some architectures."""

    def put(*gpus: Gpu, version: str = "2.13.0+cu130", cuda: str | None = "13.0", built: tuple[str, ...] = ()) -> None:
        monkeypatch.setattr(machine, "gpus", lambda: list(gpus))
        monkeypatch.setattr(machine, "distribution_version", lambda name: version)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: list(built))

    return put


@pytest.mark.parametrize(
    ("gpu", "need", "said"),
    [
        (HOPPER, FALQON_NEED, "cuda (H200, compute capability 9.0)"),
        (AMPERE, FALQON_NEED, "cuda (A100, compute capability 8.0)"),
        (VOLTA, FALQON_NEED, "cpu (compute capability 7.0; falqon needs 8.0 (bf16; FP8 products from 8.9 on))"),
        (AMPERE, LORA_NEED, "cuda (A100, compute capability 8.0)"),
        (VOLTA, VIT_NEED, "cpu (compute capability 7.0; quantize-vit needs 8.0 (bf16))"),
        (VOLTA, GpuNeed("quantize-vit"), "cuda (V100, compute capability 7.0)"),
    ],
)
def test_auto_takes_a_gpu_that_can(gpu, need, said, here):
    here(gpu)
    assert str(resolve_device("auto", need)) == said
    assert resolve_device("cpu", need).name == "cpu"


@pytest.mark.parametrize(
    ("torch_is", "why"),
    [
        ({"version": "2.13.0+cpu", "cuda": None}, "torch is a CPU build"), ({"cuda": None}, "torch is a CPU build"),
        ({"version": "2.13.0+rocm7.0", "cuda": None}, "torch is a build for ROCm"), ({}, "torch sees no GPU"),
    ],
)  # fmt: skip
def test_without_a_gpu_auto_says_why_and_cuda_is_refused_with_what_helps(torch_is, why, here):
    here(**torch_is)
    assert str(resolve_device("auto", VIT_NEED)).startswith(f"cpu ({why}")
    with pytest.raises(MissingCapabilityError) as caught:
        resolve_device("cuda", VIT_NEED)
    assert caught.value.exit_code == 11
    assert caught.value.why.startswith(why)
    assert "--device cpu" in caught.value.fix


def test_a_gpu_that_is_too_old_is_refused_by_its_name(here):
    here(VOLTA)
    with pytest.raises(MissingCapabilityError, match="V100 cannot run falqon") as caught:
        resolve_device("cuda", FALQON_NEED)
    assert "8.0" in caught.value.why


def test_a_gpu_that_torch_has_no_kernels_for_is_not_taken(here):
    here(Gpu("B200", (10, 0), 180 << 30), built=("sm_80", "sm_90"))
    assert "no kernels for compute capability 10.0: it has sm_80 sm_90" in resolve_device("auto", FALQON_NEED).reason


@pytest.mark.parametrize(
    ("capability", "built", "runs"),
    [
        ((8, 9), ["sm_80"], True), ((8, 0), ["sm_86"], False), ((9, 0), ["sm_80", "sm_86"], False),
        ((12, 0), ["sm_90", "compute_90"], True), ((8, 9), ["compute_90"], False), ((9, 0), ["sm_90a"], True),
        ((10, 0), ["sm_90a"], False), ((12, 1), ["sm_120a"], False), ((10, 3), ["sm_100f"], True), ((9, 0), [], False),
    ],
)  # fmt: skip
def test_which_kernels_run_where(capability, built, runs):
    """NVIDIA's rules of compatibility: one major version, upward; PTX on all later ones; `a` on that GPU alone."""
    assert has_kernels(capability, built) is runs


def test_auto_is_said_in_one_line_and_a_name_in_none(here, caplog):
    config = FinetuneConfig(model="m", data="d")
    here(HOPPER)
    with caplog.at_level(logging.INFO, "fp8pipe"):
        assert on_device(config).device == "cuda"
        assert [record.getMessage() for record in caplog.records] == ["device: cuda (H200, compute capability 9.0)"]
        caplog.clear()
        assert on_device(config.model_copy(update={"device": "cpu"})).device == "cpu"
        assert not caplog.records


def test_bf16_is_asked_of_a_gpu_only_where_it_is_used():
    given = {"model": "m", "bits": "w4a4"}
    assert QuantizeVitConfig(**given).gpu_need == VIT_NEED
    plain = QuantizeVitConfig(**given, synthesis={"bf16": False}, distill={"bf16": False})
    assert plain.gpu_need.capability is None


def test_on_a_cpu_tensors_stay_what_they_are():
    tensor = torch.arange(7)
    assert to_device(tensor, torch.device("cpu")) is tensor
    assert [part.tolist() for part in parts_on(tensor, 3, torch.device("cpu"))] == [[0, 1, 2], [3, 4, 5], [6]]


def test_torch_is_asked_for_gpus_only_where_the_driver_shows_one(monkeypatch):
    """A recipe's keys name the device, and a run with nothing to do must not wait for torch."""
    monkeypatch.setattr(machine, "driver_gpus", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("torch was asked"))
    assert machine.gpus() == []
    monkeypatch.setattr(machine, "driver_gpus", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert machine.gpus() == []
