"""The benchmark against peers: turns, ratios, failures, memory, and the files it writes; real processes throughout."""

from __future__ import annotations

import json
import os
import sys
import time
import zipfile
from importlib import import_module
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import benchmark
from comparison.environments import Environment, Pins, install, peer
from comparison.harness import Command, Comparison, Contender, Settings, run_comparison, take_turns, worker
from comparison.page import render, write_page
from comparison.processes import WORKERS, ContenderError, run_measured
from comparison.results import SCHEMA_VERSION, Benchmark, Metric, Result, Row, Target, summarize

HERE = Environment("here", Path(sys.executable), ("numpy",))
SPEED = Metric(name="speed", label="images/s", better="higher")
SECONDS = Metric(name="seconds", label="seconds", better="lower")
SIZE = Metric(name="size", label="MB", better="none")
WORKER = f"""
import os, sys
sys.path.insert(0, {str(WORKERS)!r})
from protocol import serve
name, diary, ends = sys.argv[1], sys.argv[2], int(sys.argv[3])
rounds = 0
def work():
    global rounds
    rounds += 1
    print("a library prints this")
    if rounds == ends:
        sys.exit("no more | of `this`")
    with open(diary, "a") as out:
        out.write(name)
    return {{"speed": 10.0 * rounds, "process": os.getpid()}}
serve(work)
"""


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    (tmp_path / "work").mkdir()
    return Settings(tmp_path / "work", tmp_path / "peers", threads=1)


def _worker(folder: Path, name: str, ends: int = 0, *, ours: bool = False) -> Contender:
    """A worker that notes its name in a diary in every round, and fails in round `ends`."""
    script = folder / "worker.py"
    script.write_text(WORKER)
    return worker(name, HERE, script, [name, folder / "diary", str(ends)], folder / f"{name}.log", ours=ours)


def test_contenders_take_turns_in_processes_of_their_own(tmp_path: Path):
    rows = take_turns([_worker(tmp_path, name) for name in "ABC"], rounds=3, warmup=1)
    assert (tmp_path / "diary").read_text() == "ABC" * 4
    assert [row.samples["speed"] for row in rows] == [[20, 30, 40]] * 3  # without the warm-up
    processes = [set(row.samples["process"]) for row in rows]
    assert [len(one) for one in processes] == [1, 1, 1]
    assert len(set.union(*processes) | {os.getpid()}) == 4


def test_a_failing_peer_is_reported_and_the_others_go_on(tmp_path: Path):
    gone = Environment("gone", tmp_path / "nothing", ())
    contenders = [_worker(tmp_path, "A", ours=True), _worker(tmp_path, "B", ends=2),
                  worker("C", gone, tmp_path / "worker.py", [], tmp_path / "C.log")]  # fmt: skip
    rows = take_turns(contenders, rounds=3)
    assert (tmp_path / "diary").read_text() == "ABAA"
    assert rows[0].failure == ""
    assert rows[0].samples["speed"] == [10, 20, 30]
    assert rows[1].failure == "it ended with exit code 1: no more | of `this`"
    assert rows[2].failure == "the environment gone is not installed"
    assert rows[1].samples == rows[2].samples == {}
    found = summarize(rows, [SPEED], "A")
    assert [row.ratios for row in found] == [{}, {}, {}]
    result = _result(found)
    assert not result.broken
    page = render(result)
    assert "* B: it ended with exit code 1: no more / of 'this'" in page
    assert "* C: the environment gone is not installed" in page
    assert "| B | not measured |" in page
    assert _result([found[0].model_copy(update={"failure": "it is our own"}), *found[1:]]).broken


def _result(rows: list[Row], **more: object) -> Result:
    return Result(name="toy", title="Toys", about="What.", baseline=rows[0].name, rounds=3, seconds=1.0,
                  metrics=[SPEED], rows=rows, **more)  # fmt: skip


def test_medians_and_ratios():
    """By hand. The median of the ratios within a round is not the ratio of the medians."""
    ours = {"seconds": [1.0, 2.0, 4.0], "speed": [1.0, 2.0, 4.0], "size": [1.0, 1.0, 1.0]}
    peers = {"seconds": [8.0, 2.0, 6.0], "speed": [8.0, 2.0, 6.0], "size": [1.0, 1.0, 1.0]}
    rows = [
        Row(name=name, ours=name == "we", versions={}, samples=one) for name, one in (("we", ours), ("they", peers))
    ]
    first, second = summarize(rows, [SECONDS, SPEED, SIZE], "we")
    assert first.ratios == {}
    assert first.medians == {"seconds": 2, "speed": 2, "size": 1}
    assert second.medians == {"seconds": 6, "speed": 6, "size": 1}
    assert second.ratios["seconds"].model_dump() == {"median": 1.5, "low": 1.0, "high": 8.0}
    assert second.ratios["speed"].model_dump() == {"median": 4 / 6, "low": 1 / 8, "high": 1.0}
    assert "size" not in second.ratios


def test_nothing_is_compared_with_a_baseline_that_failed():
    rows = [Row(name="we", ours=True, versions={}, failure="no"),
            Row(name="they", ours=False, versions={}, samples={"speed": [1.0]})]  # fmt: skip
    found = summarize(rows, [SPEED], "we")
    assert found[1].medians == {"speed": 1}
    assert found[1].ratios == {}


def test_memory_of_children_counts(tmp_path: Path):
    """A process holds 64 MiB and its child 128: all is memory that is not of files; interpreters hold less than 32."""
    child = "import time; held = bytearray(128 << 20); time.sleep(0.5)"
    parent = f"import subprocess, sys; held = bytearray(64 << 20); subprocess.run([sys.executable, '-c', {child!r}])"
    done = run_measured([sys.executable, "-S", "-c", parent], tmp_path / "log")
    assert 192 << 20 <= done.anonymous_bytes < 224 << 20
    assert done.anonymous_bytes <= done.resident_bytes < 288 << 20
    assert done.seconds >= 0.5
    assert done.figures == {}


def test_a_command_that_hangs_is_ended_with_its_children(tmp_path: Path):
    marker = tmp_path / "alive"
    child = f"import time, pathlib; time.sleep(2); pathlib.Path({str(marker)!r}).touch()"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-S', '-c', {child!r}])"
    with pytest.raises(ContenderError, match=r"longer than 0\.5 s"):
        run_measured([sys.executable, "-S", "-c", parent], tmp_path / "log", timeout_s=0.5)
    time.sleep(2)
    assert not marker.exists()


def test_what_pip_says_is_the_reason(settings: Settings, monkeypatch: pytest.MonkeyPatch):
    """A requirement that needs no network to fail; pip is asked once, though two contenders want the environment."""
    from comparison import environments

    monkeypatch.setitem(environments.PEERS, "toy", Pins(("./no-such-folder",), ("toy",)))
    where = peer("toy", settings.environments)
    with pytest.raises(ContenderError, match=r"pip cannot install \./no-such-folder: .*no-such-folder"):
        where.python()
    (settings.environments / "toy" / "pip.log").unlink()
    with pytest.raises(ContenderError, match="no-such-folder"):
        where.python()
    assert not (settings.environments / "toy" / "pip.log").exists()
    assert where.versions() == {}


def test_an_environment_is_kept_until_its_pins_change(tmp_path: Path):
    wheels = [_wheel(tmp_path, version) for version in ("1.0", "2.0")]
    folder, (first, second) = tmp_path / "peer", [Pins((str(one),), ("toy",)) for one in wheels]
    where = Environment("toy", folder / "bin" / "python", ("toy", "numpy"), pins=first)
    where.python()
    assert where.versions() == {"toy": "1.0"}  # and nothing of this environment
    (folder / "mine").touch()
    install(folder, first)
    assert (folder / "mine").exists()
    install(folder, second)
    assert not (folder / "mine").exists()
    assert where.versions() == {"toy": "2.0"}


def _wheel(folder: Path, version: str) -> Path:
    """The smallest wheel that pip installs, so that no network is needed."""
    path, inner = folder / f"toy-{version}-py3-none-any.whl", f"toy-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"{inner}/METADATA", f"Metadata-Version: 2.1\nName: toy\nVersion: {version}\n")
        wheel.writestr(f"{inner}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{inner}/RECORD", "")
    return path


def test_the_files_of_a_run(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """JSON that the schema accepts, a page with tables, ratios and targets, and a chart; a failed preparation, too."""

    def toys(given: Settings) -> Comparison:
        log = given.work / "python.log"
        command = Contender("python", HERE, lambda: Command([sys.executable, "-S", "-c", "pass"], log), ours=True)
        slow = Contender("slow", HERE, lambda: Command([sys.executable, "-S", "-c", "import time; time.sleep(1)"], log))
        targets = (Target(contender="slow", metric="seconds", at_least=1.01),
                   Target(contender="slow", metric="seconds", at_least=1e6))  # fmt: skip
        return Comparison("Toys", "Of wood.", (SECONDS,), (command, slow), "python", 2, targets=targets)

    def broken(given: Settings) -> Comparison:
        raise ContenderError("the sample is not installed")

    module = type(sys)("toy_comparisons")
    module.toys, module.broken = toys, broken  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "toy_comparisons", module)
    for name in ("toys", "broken"):
        monkeypatch.setitem(benchmark.COMPARISONS, name, f"toy_comparisons:{name}")
    found = benchmark.run(["toys", "broken"], settings, tmp_path)
    text = (tmp_path / "benchmark.json").read_text()
    assert Benchmark.model_validate_json(text) == found
    document = json.loads(text)
    assert document["schema_version"] == SCHEMA_VERSION
    assert set(document) == set(Benchmark.model_json_schema()["properties"])
    assert document["machine"]["processor"]
    assert document["results"][0]["rows"][1]["versions"]["numpy"]
    slower = found.results[0].rows[1]
    assert slower.ratios["seconds"].low > 1
    page = (tmp_path / "benchmark.md").read_text()
    ratio = slower.ratios["seconds"]
    assert f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})" in page
    assert f"seconds, 1.01 times better than slow: reached, {ratio.median:.2f} times" in page
    assert f"seconds, 1e+06 times better than slow: missed, {ratio.median:.2f} times" in page
    assert "Not measured: the sample is not installed" in page
    assert "![toys-seconds](toys-seconds.svg)" in page
    assert (tmp_path / "toys-seconds.svg").read_text().count("slow") >= 1
    assert [one.broken for one in found.results] == [False, True]
    assert write_page(found, tmp_path).read_text() == page


def test_quick_sizes_are_marked(settings: Settings, tmp_path: Path):
    found = benchmark.run([], Settings(settings.work, settings.environments, 1, quick=True), tmp_path)
    assert "its figures mean nothing" in write_page(found, tmp_path).read_text()


def test_a_preparation_that_fails_ends_one_comparison(settings: Settings):
    def build(given: Settings) -> Comparison:
        raise ContenderError("no disk")

    assert run_comparison("toy", build, settings).failure == "no disk"


@pytest.mark.parametrize("name", benchmark.COMPARISONS)
def test_every_comparison_is_there(name: str):
    module, _, function = benchmark.COMPARISONS[name].partition(":")
    assert callable(getattr(import_module(module), function))
