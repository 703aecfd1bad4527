"""On a GPU: exports are served by the kernels that vLLM chooses for it, and proved in them.

Nothing here runs without a device. Needs a build of vLLM for GPUs (`FP8PIPE_VLLM_PYTHON` names its Python). What the
kernels are follows from the GPU: codes as bytes from compute capability 8.9 on, packed ones before.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_checkpoints import make_model, write_plain

from exporters.vllm.device import device_in_words, vllm_gpu
from exporters.vllm.environment import VllmEnvironment, find_vllm_python, inspect_environment
from exporters.vllm.export import export_vllm
from exporters.vllm.form import ServingForm
from exporters.vllm.options import ExportFormat, VllmExportOptions
from fp8pipe.artifact.record import ExportRejectedError
from fp8pipe.core.errors import MissingCapabilityError
from validation.vllm.record import ValidationRecord
from validation.vllm.validate import validate_export

pytestmark = [pytest.mark.gpu, pytest.mark.vllm, pytest.mark.slow]


@pytest.fixture(scope="module")
def environment() -> VllmEnvironment:
    try:
        found = inspect_environment(find_vllm_python())
        if vllm_gpu(found) is None:
            pytest.skip(f"{found.python} holds vLLM for CPUs")
    except MissingCapabilityError as error:
        pytest.skip(str(error))
    return found


@pytest.fixture(scope="module")
def plain(environment: VllmEnvironment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_plain(tmp_path_factory.mktemp("gpu") / "plain", make_model())


def proved(plain: Path, format: ExportFormat, **form: Any) -> ValidationRecord:
    export = plain.parent / format.value
    if not export.exists():
        export_vllm(plain, export, VllmExportOptions(format=format))
    chosen = ServingForm(gpu_memory_utilization=0.3, **form)
    try:
        return validate_export(export, against=plain, form=chosen, prompts=["Hello"], max_tokens=4)
    except ExportRejectedError as error:
        record: ValidationRecord = error.record
        return record


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled"])
def test_fp8_kernels_are_proved(plain: Path, environment: VllmEnvironment, eager: bool) -> None:
    record = proved(plain, ExportFormat.FP8, enforce_eager=eager)
    assert record.verdict == "ACCEPT", record.reasons
    served = record.served
    assert served is not None
    assert device_in_words(environment) in served.form
    assert served.kernels is not None
    gpu = vllm_gpu(environment)
    assert gpu is not None
    assert set(served.kernels.devices) == {"cuda:0"}
    assert served.kernels.holds == {"codes" if gpu.fp8 else "packed": 8}
    assert served.kernels.rounding == (8 if gpu.fp8 else 0)
    assert (served.weights.differing, served.weights.missing) == (0, [])


def test_weights_alone_in_fp8_are_proved(plain: Path) -> None:
    record = proved(plain, ExportFormat.W8A16, enforce_eager=True)
    assert record.verdict == "ACCEPT", record.reasons
    assert record.served is not None
    assert record.served.kernels is not None
    assert record.served.kernels.rounding == 0


def test_bf16_is_proved(plain: Path) -> None:
    record = proved(plain, ExportFormat.BF16, enforce_eager=True)
    assert record.verdict == "ACCEPT", record.reasons
    assert record.served is not None
    assert record.served.kernels is None
