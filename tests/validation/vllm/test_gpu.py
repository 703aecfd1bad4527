"""On a GPU: exports are served by the kernels that vLLM chooses for it, and proved in them.

Nothing here runs without a device. Needs a build of vLLM for GPUs (`FP8PIPE_VLLM_PYTHON` names its Python). What the
kernels are follows from the GPU: codes as bytes from compute capability 8.9 on, packed ones before.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from artifact_tree import rehash
from safetensors.torch import load_file, save_file
from tiny_checkpoints import make_model, write_plain
from trained_exports import write_trained

from exporters.vllm.device import device_in_words, vllm_gpu
from exporters.vllm.environment import VllmEnvironment, find_vllm_python, inspect_environment
from exporters.vllm.export import export_vllm
from exporters.vllm.form import ServingForm
from exporters.vllm.options import ExportFormat, VllmExportOptions
from fp8pipe.artifact.record import ExportRejectedError
from fp8pipe.core.errors import MissingCapabilityError
from validation.vllm.record import ValidationRecord
from validation.vllm.validate import validate_export

LAYER = "model.layers.1.mlp.down_proj.weight"
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


@pytest.fixture(scope="module")
def trained(plain: Path) -> Path:
    return write_trained(plain.parent / "trained", plain)


def exported(source: Path, format: ExportFormat) -> Path:
    export = source.parent / f"{source.name}-{format.value}"
    if not export.exists():
        export_vllm(source, export, VllmExportOptions(format=format))
    return export


def proved(source: Path, format: ExportFormat, **form: Any) -> ValidationRecord:
    return checked(exported(source, format), source, **form)


def checked(export: Path, source: Path, **form: Any) -> ValidationRecord:
    chosen = ServingForm(gpu_memory_utilization=0.3, **form)
    try:
        return validate_export(export, against=source, form=chosen, prompts=["Hello"], max_tokens=4)
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


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled"])
@pytest.mark.parametrize("source", ["plain", "trained"])
def test_kernels_with_a_scale_per_block_are_proved(
    source: str, eager: bool, environment: VllmEnvironment, request: pytest.FixtureRequest
) -> None:
    """CUTLASS or Triton from compute capability 8.9 on, Marlin before; DeepGEMM would change the weights."""
    record = proved(request.getfixturevalue(source), ExportFormat.FP8_BLOCK, enforce_eager=eager)
    assert record.verdict == "ACCEPT", record.reasons
    served, gpu = record.served, vllm_gpu(environment)
    assert served is not None
    assert gpu is not None
    assert served.kernels is not None
    assert set(served.kernels.devices) == {"cuda:0"}
    assert served.kernels.holds == {"codes" if gpu.fp8 else "packed": 8}
    assert served.kernels.rounding == (8 if gpu.fp8 else 0)
    assert not any("DeepGemm" in name for name in served.kernels.kernels)
    assert (served.weights.differing, served.weights.missing) == (0, [])


@pytest.mark.parametrize("source", ["plain", "trained"])
def test_a_wrong_scale_of_a_block_is_rejected(source: str, request: pytest.FixtureRequest) -> None:
    root: Path = request.getfixturevalue(source)
    broken = Path(shutil.copytree(exported(root, ExportFormat.FP8_BLOCK), root.parent / f"{source}-broken"))
    tensors = load_file(broken / "model.safetensors")
    tensors[f"{LAYER}_scale"][1, 2] *= 2
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    rehash(broken)
    record = checked(broken, root, enforce_eager=True)
    assert record.verdict == "REJECT"
    assert record.served is not None
    different = record.served.weights.different  # the scale, where codes can be read; where they are packed, the weight
    assert {name.removesuffix("_scale") for name in different} == {LAYER}
