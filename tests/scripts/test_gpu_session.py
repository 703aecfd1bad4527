"""The measuring session for GPUs, on a CPU at tiny shapes: all of its code but the kernels and the clock."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from script_modules import load_script

from fp8pipe.core.errors import BadArtifactError
from pipeline.dry_run.costs import LIVE, Decoder, estimate
from pipeline.dry_run.devices import DEVICES

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
SCRIPT = SCRIPTS / "gpu_session.py"
# What a bare machine has: these, and what they need. Everything else is as if it were not installed.
BARE = """
import importlib.metadata as metadata, os, re, runpy, sys
from importlib.machinery import PathFinder
wanted, found = ["torch", "transformers", "pydantic"], {"fp8pipe"}
while wanted:
    name = re.sub(r"[-_.]+", "-", re.match(r"[\\w.-]+", wanted.pop())[0]).lower()
    try:
        needs = metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        continue
    if name not in found:
        found.add(name)
        wanted += [one for one in needs if "extra ==" not in one]
owners = metadata.packages_distributions()
foreign = {module for module, names in owners.items() if not {re.sub(r"[-_.]+", "-", n).lower() for n in names} & found}
class Bare(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in foreign else PathFinder.find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = Bare
assert {"timm", "peft", "onnx", "datasets"} <= foreign and "torch" not in foreign
sys.argv = sys.argv[1:]
sys.path[0] = os.path.dirname(sys.argv[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def parts() -> SimpleNamespace:
    """The session's modules, by name."""
    if str(SCRIPTS) not in sys.path:
        sys.path.insert(0, str(SCRIPTS))
    names = ("context", "correctness", "layers", "lora", "oracle", "record", "session", "steps", "table", "timing")
    return SimpleNamespace(**{name: importlib.import_module(f"gpu_parts.{name}") for name in names})


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, str]:
    """The record and the output of a whole session, run as a bare machine would."""
    output = tmp_path_factory.mktemp("session") / "record.json"
    command = [sys.executable, "-c", BARE, str(SCRIPT), "--device", "cpu", "--tiny", "--output", str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=output.parent, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(output.read_text()), done.stdout


def test_every_part_runs_without_what_a_bare_machine_lacks(session, parts):
    record, _ = session
    assert list(record["parts"]) == list(parts.session.PARTS)
    assert {name: part["status"] for name, part in record["parts"].items()} == dict.fromkeys(
        parts.session.PARTS, "done"
    )
    # A CPU has no row-wise FP8 product of its own; nothing else may fail.
    rows = [row for part in record["parts"].values() for row in part["rows"]]
    assert [row for row in rows if "error" in row and "fp8 by" not in row["name"]] == []
    left_out = {row["name"] for row in rows if "left_out" in row}
    assert {"gpu", "state", "qlora, 1 layers"} <= left_out


def test_a_cpu_agrees_with_itself(session):
    rows = session[0]["parts"]["correctness"]["rows"]
    assert len(rows) > 12
    assert [row["name"] for row in rows if not row["passed"]] == []
    for row in rows:
        if row["name"].startswith("training"):
            assert row["codes_agreeing"] == 1.0
            assert row["loss_difference"] == 0.0
            assert 0 < row["codes_changed"] < 1


def test_steps_and_images_have_their_figures(session):
    parts = session[0]["parts"]
    steps = {row["name"]: row for row in parts["steps"]["rows"] if "seconds" in row}
    (profiled,) = (row for row in parts["steps"]["rows"] if "kernels" in row)
    assert profiled["launched"] >= sum(one["calls"] for one in profiled["kernels"]) > 100
    assert profiled["busy_seconds"] >= sum(one["seconds"] for one in profiled["kernels"]) > 0
    assert set(steps) == {"live, 1 layers", "released, 1 layers", "lora, 1 layers"}
    assert steps["lora, 1 layers"]["method"] == "own LoRA, peft is absent"
    for row in [*steps.values(), *(row for row in parts["vision"]["rows"])]:
        assert 0 < row["seconds"] < 60
    assert all(row["tokens_per_second"] == row["tokens"] / row["seconds"] for row in steps.values())


def test_the_table_is_printed_from_the_record_again(session, parts, tmp_path):
    record, printed = session
    assert parts.table.table(record) == printed.rstrip("\n")
    for name in ("## correctness", "| live, 1 layers |", "profile, live, 1 layers: ", "| synthesis |", "left out"):
        assert name in printed
    stored = tmp_path / "record.json"
    stored.write_text(json.dumps(record))
    assert parts.table.table(parts.record.Record.read(stored).data) == printed.rstrip("\n")


@pytest.mark.parametrize("text", ["", "[]", '{"schema": 99}'])
def test_what_is_no_record_is_refused(parts, text, tmp_path):
    (tmp_path / "record.json").write_text(text)
    with pytest.raises(BadArtifactError, match=r"record\.json"):
        parts.record.Record.read(tmp_path / "record.json")


def test_failing_parts_cost_nothing_but_their_own_rows(parts, tmp_path, monkeypatch):
    def good(context):
        context.row("first", lambda: {"seconds": 1.0})
        context.row("second", lambda: 1 // 0)
        context.row("third", lambda: {"seconds": 2.0}, needs=1e9)

    def raises(context):
        context.row("before", lambda: {"seconds": 1.0})
        raise RuntimeError("of its own")

    def dies(context):
        context.row("before", lambda: {"seconds": 1.0})
        os.kill(os.getpid(), signal.SIGKILL)

    def hangs(context):
        time.sleep(60)

    found = {"raises": raises, "dies": dies, "hangs": hangs, "good": good}
    for name, run in found.items():
        module = ModuleType(f"gpu_parts.{name}")
        module.run = run
        monkeypatch.setitem(sys.modules, f"gpu_parts.{name}", module)
    monkeypatch.setattr(parts.session, "PARTS", {"raises": 1.0, "dies": 1.0, "hangs": 0.02, "good": 1.0})
    path = tmp_path / "record.json"
    record = parts.record.Record.begin(path, {"device": "cpu"})
    began = time.monotonic()
    assert not parts.session.run_session(record, list(found), "cpu", tiny=True, minutes=1.0, began=began)
    stored = json.loads(path.read_text())
    assert stored == record.data
    done = stored["parts"]
    assert (
        [row["name"] for row in done["raises"]["rows"]] == [row["name"] for row in done["dies"]["rows"]] == ["before"]
    )
    assert (done["raises"]["status"], done["raises"]["error"]) == ("failed", "RuntimeError: of its own")
    assert (done["dies"]["status"], done["dies"]["error"]) == ("ended", "its process ended with exit code -9")
    assert (done["hangs"]["status"], done["hangs"]["error"]) == ("ended", "its time was up")
    first, second, third = done["good"]["rows"]
    assert (done["good"]["status"], first["seconds"]) == ("done", 1.0)
    assert second["error"].startswith("ZeroDivisionError")
    assert "were left" in third["left_out"]
    printed = parts.table.table(stored)
    assert "RuntimeError: of its own" in printed
    assert "second: **failed**" in printed


@pytest.fixture
def main(parts, monkeypatch, tmp_path):
    """`main("--table", path)` runs the command in this process, in a folder of its own; its exit code."""
    module = load_script(SCRIPT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(parts.session, "STARTS", ("fork", "fork"))

    def call(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
        monkeypatch.setattr(module, "BEGAN", time.monotonic())
        return module.main()

    return call


def test_the_command_prints_a_stored_table_and_refuses_mistakes(main, session, capsys):
    record, printed = session
    Path("gpu-session.json").write_text(json.dumps(record))
    assert main("--table", "gpu-session.json") == 0
    assert capsys.readouterr().out == printed
    assert main("--device", "cpu", "--tiny") == 10  # a record is never written over
    assert "already exists" in capsys.readouterr().err
    assert json.loads(Path("gpu-session.json").read_text()) == record
    assert main("--table", "none.json") == 12
    with pytest.raises(SystemExit, match="2"):
        main("--minutes", "0")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(main, capsys):
    assert main("--minutes", "1") == 11
    assert "no CUDA device can be used" in capsys.readouterr().err
    (part,) = json.loads(Path("gpu-session.json").read_text())["parts"].values()
    assert part["status"] == "no device"


class Differing:
    """A function that every other call changes the result of, as a device would that computes otherwise."""

    def __init__(self, function, change):
        self.function, self.change, self.calls = function, change, 0

    def __call__(self, *args, **kwargs):
        result, self.calls = self.function(*args, **kwargs), self.calls + 1
        return result if self.calls % 2 else self.change(result, *args)


def _another_code(result, *args):
    result[0].view(torch.uint8)[0, 0] ^= 1
    return result


def _another_row(result, layer, *args):
    layer.codes.view(torch.uint8)[0, 0] ^= 1
    return result


def test_a_device_that_differs_by_one_code_or_scale_fails(parts, monkeypatch):
    correctness, cpu = parts.correctness, torch.device("cpu")
    grid, rule = correctness.E4M3, correctness.ScaleRule.POWER_OF_TWO
    assert correctness._codes(cpu, grid, rule)["passed"]
    monkeypatch.setattr(correctness, "quantize", Differing(correctness.quantize, _another_code))
    assert correctness._codes(cpu, grid, rule)["differing"] == 4  # one in each of the matrices
    assert not correctness._codes(cpu, grid, rule)["passed"]
    assert correctness._flush("accumulate-stochastic", cpu)["passed"]
    monkeypatch.setattr(correctness, "flush_rows", Differing(correctness.flush_rows, _another_row))
    assert not correctness._flush("accumulate-stochastic", cpu)["passed"]
    assert correctness._scales(cpu)["passed"]
    doubled = Differing(correctness.amax_scale, lambda scale, amax, grid: 2 * scale)
    monkeypatch.setattr(correctness, "amax_scale", doubled)
    found = correctness._scales(cpu)
    assert (found["passed"], found["differing"]) == (
        False,
        found["of"] // 2 - 2,
    )  # of infinity: twice as much is no more


@pytest.mark.parametrize("form", range(4))
@pytest.mark.parametrize("fp8_cores", [False, True])
def test_the_oracle_takes_a_right_layer_and_no_other(parts, form, fp8_cores):
    case = parts.layers.Case(*parts.layers.FORMS[form], 48, 64, 8, 24)
    layer, x, grad = parts.layers.make(case)
    truth = parts.oracle.expected(layer, x, grad, fp8_cores)

    def worst(change=lambda value: value):
        read = x.clone().requires_grad_()
        layer.zero_grad()
        y = layer(read)
        y.backward(grad)
        results = {"y": y.detach(), "dx": read.grad, "db": layer.lora_B.grad}
        results |= {} if layer.lora_A is None else {"da": layer.lora_A.grad}
        assert results.keys() == truth.keys()
        found = {name: change(value) for name, value in results.items()}
        return {name: truth[name].compare(value)["of_bound"] for name, value in found.items()}

    assert max(worst().values()) <= 1.0
    # Half of every sum, the neighbour's row, and one token's row on another scale: each in each of the outputs.
    for wrong in (lambda t: t / 2, lambda t: t.roll(1, 0), lambda t: torch.cat([2 * t[:1], t[1:]])):
        assert min(worst(wrong).values()) > 1.0
    layer.lora_B.data.mul_(-1)
    if layer.live:
        assert min(worst()[name] for name in ("y", "dx")) > 1.0


def test_exact_updates_are_exact_in_any_order(parts):
    layer, _, _ = parts.layers.make(parts.layers.Case(*parts.layers.FORMS[0], 64, 96, 64, 1))
    parts.layers.exact_updates(layer)
    b, a = layer.lora_B.detach(), layer.adapter_codes.float()
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    summed = sum(b[:, [i]] * a[[i]] for i in order.tolist())
    assert torch.equal(summed.double(), b.double() @ a.double())


def test_lora_without_peft_is_pefts(parts):
    from pipeline.finetune.method import LoraMethod

    results = []
    for kind in (LoraMethod, parts.lora.PlainLoraMethod):
        torch.manual_seed(0)
        model = parts.steps.build_model(parts.steps._TINY, 2, torch.device("cpu"))
        method = kind(rank=4, alpha=8, seed=0, quantized=False)
        method.prepare(model)
        trained = list(method.parameters().values())
        for index, parameter in enumerate(trained):
            torch.manual_seed(index)
            parameter.data = torch.randn_like(parameter) / 8
        with method.forward_context():
            logits = model(input_ids=torch.arange(24).view(2, 12), use_cache=False).logits
        logits.float().square().mean().backward()
        results.append([logits.detach(), *(parameter.grad for parameter in trained)])
    assert len(results[0]) == 1 + 2 * 2 * 7
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_step_is_compared_with_the_estimate_of_the_cost_model(parts):
    steps = parts.steps
    device = DEVICES[3]
    found = steps.beside_model(steps.Run("live", 32), steps._LLAMA_7B, steps._STEP, 1.2, 16 * 10**9, device)
    shape = Decoder(4096, 11008, 4096, 4096, 32, 32000)
    expected = estimate(shape, steps._STEP, LIVE, device)
    assert found["seconds_over_estimate"] == 1.2 / expected.seconds
    assert found["memory_over_estimate"] == 16 * 10**9 / expected.memory_bytes
    assert steps.beside_model(steps.Run("released", 32), steps._LLAMA_7B, steps._STEP, 1.2, None, device) == {}
    assert steps.beside_model(steps.Run("live", 32), steps._LLAMA_7B, steps._STEP, 1.2, None, None) == {}


def test_timing_counts_the_rounds_that_it_says(parts):
    calls = []
    found = parts.timing.timed(lambda: calls.append(None), torch.device("cpu"), rounds=3, warmup=2, calls=4)
    assert len(calls) == (3 + 2) * 4
    assert found["rounds"] == 3
    assert 0 <= found["least"] <= found["seconds"] <= found["most"]
