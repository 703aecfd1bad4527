"""Every checkpoint format the plugin claims, in a real engine, against exact values computed here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from breadth import LONG
from lasting_engines import probed
from tiny_checkpoints import FORMATS, INPUT_SCALE, Format, make_model, write_fp8, write_plain
from torch import Tensor

from exporters.vllm.environment import find_vllm_python, inspect_environment
from exporters.vllm.export import export_vllm
from exporters.vllm.options import ExportFormat, VllmExportOptions
from exporters.vllm.reopen import iter_weights
from fp8pipe.core.errors import MissingCapabilityError
from validation.vllm.held import Expected
from validation.vllm.kernel_report import kernel_report
from validation.vllm.launcher import PARITY_ARGUMENTS, ProbeJob, in_process

SEQUENCES = [[int(t) for t in torch.randint(0, 256, (40,), generator=torch.Generator().manual_seed(i))] for i in (1, 2)]
# Where activations stay, weights are handled as where they are quantized: one such form is enough in usual runs.
USUAL = [form for form in FORMATS if LONG or form.name not in {"ct-tensor-w8a16", "ct-block-w8a16"}]
EMULATED = ("ct-channel-dynamic", "ct-tensor-static")
NVFP4 = "ct-nvfp4-w4a16"
NAMES = [*(form.name for form in USUAL), NVFP4]
pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """By name, the exact weights and the probe's result."""
    try:
        python = find_vllm_python()
    except MissingCapabilityError as error:
        pytest.skip(str(error))
    root = tmp_path_factory.mktemp("formats")
    model = make_model()
    exact = {"bf16": {name: value.clone() for name, value in model.state_dict().items()}}
    write_plain(root / "bf16", model)
    for form in USUAL:
        exact[form.name] = write_fp8(root / form.name, model, form)
    if "0.1." not in str(inspect_environment(python).plugin):  # its first version does not know NVFP4
        export = export_vllm(root / "bf16", root / NVFP4, VllmExportOptions(format=ExportFormat.NVFP4))
        exact[NVFP4] = dict(iter_weights(export.root))
    jobs = [_job(root, name, values) for name, values in exact.items()]
    for name in EMULATED:
        exact[f"{name}+quant"] = exact[name]
        jobs.append(_job(root, name, exact[name], FP8PIPE_VLLM_ACTIVATIONS="quant"))
    results = probed(python, jobs, root)
    return {name: {"exact": exact[name], "result": result} for name, result in zip(exact, results, strict=True)}


def _job(root: Path, name: str, exact: dict[str, Tensor], **environment: str) -> ProbeJob:
    tensors = {key: Expected(key, value, None, False).digests() for key, value in exact.items()}
    for key, told in tensors.items():
        told["quantized"] = key.endswith("_proj.weight") and name != "bf16"
    arguments = [*PARITY_ARGUMENTS, "--max-model-len", "128"]
    return ProbeJob(
        str(root / name), arguments, tensors, sequences=SEQUENCES, prompts=["Hello"], max_tokens=4, products=True,
        variables=in_process() | environment,
    )  # fmt: skip


def _reference(exact: dict[str, Tensor], form: Format | None = None) -> list[Tensor]:
    """Log-probabilities of SEQUENCES by a torch model; with a format, its activations are rounded too."""
    model = make_model()
    model.load_state_dict(exact)
    if form is not None:
        for name, module in model.named_modules():
            if name.endswith("_proj"):
                module.register_forward_pre_hook(lambda _, args: (_rounded(args[0], form),))
    out = []
    with torch.inference_mode():
        for ids in SEQUENCES:
            table = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0].float(), -1)
            out.append(table[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0])
    return out


def _rounded(x: Tensor, form: Format) -> Tensor:
    if form.activations == "static":
        scale = torch.tensor(INPUT_SCALE)
    else:
        scale = x.abs().amax(-1, keepdim=True) / 448.0
    return (x / scale).clamp(-448.0, 448.0).to(torch.float8_e4m3fn).float() * scale


def _distance(run: dict[str, Any], reference: list[Tensor]) -> Tensor:
    rows = zip(SEQUENCES, run["result"]["logprobs"], strict=True)
    theirs = [torch.tensor([float(p[str(t)]) for t, p in zip(ids[1:], row, strict=True)]) for ids, row in rows]
    return torch.cat([(a - b).abs() for a, b in zip(theirs, reference, strict=True)])


def _run_of(runs: dict[str, Any], name: str) -> dict[str, Any]:
    if name not in runs:
        pytest.skip("the installed plugin does not know NVFP4: run scripts/setup_vllm.sh")
    run: dict[str, Any] = runs[name]
    return run


@pytest.mark.parametrize("name", NAMES)
def test_the_engine_holds_exactly_code_times_scale(runs: dict[str, Any], name: str) -> None:
    run = _run_of(runs, name)
    weights = run["result"]["weights"]
    assert {key: entry["status"] for key, entry in weights.items()} == dict.fromkeys(run["exact"], "match")
    # `stored` means the plugin ran: vLLM's own methods leave codes, or give the weight away.
    assert {entry["read"] for key, entry in weights.items() if key.endswith("_proj.weight")} == {"stored"}
    assert not any(entry["gemm_differs"] for entry in weights.values())


def test_unquantized_weights_are_read_through_the_gemm(runs: dict[str, Any]) -> None:
    weights = runs["bf16"]["result"]["weights"]
    assert {entry["status"] for entry in weights.values()} == {"match"}
    assert {entry["read"] for key, entry in weights.items() if key.endswith("_proj.weight")} == {"gemm"}


@pytest.mark.parametrize("name", ["bf16", *NAMES])
def test_logprobs_are_those_of_the_exact_weights(runs: dict[str, Any], name: str) -> None:
    # fp32 on both sides, the same formulas: only the order of additions differs. A fused layer at a common
    # scale would be off by more than 0.1 here.
    run = _run_of(runs, name)
    assert float(_distance(run, _reference(run["exact"])).max()) < 1e-3


def test_products_tell_whether_activations_are_rounded(runs: dict[str, Any]) -> None:
    tensors = [key for key in runs["bf16"]["exact"] if key.endswith("_proj.weight")]
    for name, rounded in (("ct-channel-dynamic", []), ("ct-channel-dynamic+quant", tensors)):
        report = kernel_report(runs[name]["result"]["layers"], tensors, rounded, codes=False)
        assert all(gate.passed for gate in report.gates), report
        assert (report.layers, report.rounding, report.kernels) == (8, 8 if rounded else 0, {"CpuFp8Scheme": 8})
        other = kernel_report(runs[name]["result"]["layers"], tensors, [] if rounded else tensors, codes=False)
        assert len(other.other_rounding) == 8


@pytest.mark.parametrize("name", EMULATED)
def test_emulated_activations_follow_the_checkpoint(runs: dict[str, Any], name: str) -> None:
    form = next(form for form in FORMATS if form.name == name)
    run = runs[f"{name}+quant"]
    rounded = _distance(run, _reference(run["exact"], form)).mean()
    plain = _distance(run, _reference(run["exact"])).mean()
    # Flips of single codes (fp32 sums differ in the last bit) keep this from being exact.
    assert float(plain) > 1e-3
    assert float(rounded) < 0.2 * float(plain)
