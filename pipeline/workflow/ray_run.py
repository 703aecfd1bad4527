"""Run a recipe on a Ray cluster: each stage is a task that runs `fp8pipe run --only STAGE` on the node Ray chooses.

So it is that command, on that node and in the directory that all nodes share, that decides whether the stage is up to
date, on which device it runs, from which checkpoint it continues, and what its gates say.
"""

from __future__ import annotations

import contextlib
import functools
import graphlib
import os
import signal
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from fp8pipe.artifact.runs import RunRecord, read_run
from fp8pipe.core.errors import (
    BadArtifactError,
    Fp8PipeError,
    InterruptedRunError,
    MissingCapabilityError,
    OutOfMemoryError,
    first_line,
    one_line,
)  # fmt: skip
from fp8pipe.core.ray_cluster import connect, described_error
from fp8pipe.core.version import __version__
from pipeline.workflow.locks import locked_run
from pipeline.workflow.ray_job import PROGRAM, STOP_S, Outcome, StageJob, run_job
from pipeline.workflow.recipe import StageSpec
from pipeline.workflow.runner import RECIPE_NAME, WorkflowRunner, write_recipe
from pipeline.workflow.state import STAGES, RunState

__all__ = ["RayRunner", "needs_of"]

_WAIT_S: Final = 1.0  # so that Ctrl-C is noticed
_LOSSES: Final = 3  # a stage whose node was lost this often is not started again


class RayRunner:
    """Runs the stages of a recipe as tasks of a Ray cluster.

    Args:
        state: the recipe and the directory of the run, which all nodes must share under the same path, as they must the
            working directory.
        show: called with a stage's name and a line for the user.
        address: the cluster, see `RayPool`.
        quiet: whether what the stages print is not shown.
    """

    def __init__(self, state: RunState, show: Callable[[str, str], None], address: str, *, quiet: bool = False) -> None:
        self.state, self._show, self._address, self._quiet = state, show, address, quiet
        self._ray: Any = None
        self._running: dict[Any, str] = {}  # stages by Ray's reference to the task
        self._losses: dict[str, int] = {}
        self._needs: dict[str, dict[str, float]] = {}
        self._shared = ""  # a file in the run's directory, by which nodes know that they share it
        self._failed = False

    def run(self) -> RunRecord:
        """Run the stages that are not up to date, in order; the same as `WorkflowRunner.run`.

        Raises:
            MissingCapabilityError: Ray or the cluster is missing, no node has what a stage needs, a node does not
                share the directory or has another fp8pipe, or is lost again and again.
            OutOfMemoryError: Ray ended a stage because its node ran out of memory.
            ConfigurationError, Fp8PipeError, InterruptedRunError: as for `WorkflowRunner.run`.
        """
        state = self.state
        WorkflowRunner(state, self._show).check(state.wanted())
        tell = functools.partial(self._show, "run")
        with locked_run(state.directory, shared=True, tell=tell), self._connected() as self._ray:
            nodes = [node for node in self._ray.nodes() if node["Alive"]]
            self._needs = {spec.name: needs_of(spec, nodes) for spec in self._submitted()}
            self._require_room(nodes)
            write_recipe(state)
            try:
                with tempfile.NamedTemporaryFile(prefix=".shared-", dir=state.directory / STAGES) as file:
                    self._shared = file.name
                    self._schedule()
            except KeyboardInterrupt as error:
                names = ", ".join(self._running.values()) or "nothing"
                raise InterruptedRunError(
                    "interrupted", why=f"while running {names}", fix="run the same command again to continue from there"
                ) from error
            finally:
                self._stop()
        return read_run(state.directory)

    @contextlib.contextmanager
    def _connected(self) -> Iterator[Any]:
        handler = signal.getsignal(signal.SIGTERM)
        ray = connect(self._address, quiet=self._quiet)
        signal.signal(
            signal.SIGTERM, handler
        )  # Ray's own would end this process and leave the stages to the supervisors
        try:
            yield ray
        finally:
            ray.shutdown()

    def _require_room(self, nodes: Sequence[Mapping[str, Any]]) -> None:
        """Raise an error for a stage that no node can run: Ray would wait for such a node for ever."""
        for name, needs in self._needs.items():
            if not any(all(node["Resources"].get(kind, 0) >= needs[kind] for kind in needs) for node in nodes):
                offers = [_in_words({kind: node["Resources"].get(kind, 0) for kind in needs}) for node in nodes]
                raise MissingCapabilityError(
                    f"no node of the Ray cluster {self._address} can run the stage {name}",
                    why=f"it needs {_in_words(needs)}; the nodes offer {' / '.join(offers) or 'nothing'}",
                    fix=f"add such a node, or change what the stage needs: --set {name}.resources.cpus=N",
                )

    def _schedule(self) -> None:
        names = [spec.name for spec in self._submitted()]
        sorter = graphlib.TopologicalSorter(
            {name: [other for other in self.state.recipe.stage(name).needs if other in names] for name in names}
        )
        sorter.prepare()
        ready: list[str] = []
        while self._running or (sorter.is_active() and not self._failed):
            ready = sorted([*ready, *sorter.get_ready()], key=names.index)
            while ready and len(self._running) < self.state.options.jobs and not self._failed:
                self._submit(ready.pop(0))
            done, _ = self._ray.wait(list(self._running), timeout=_WAIT_S)
            for reference in done:
                name = self._running.pop(reference)
                if self._ended(name, reference):
                    sorter.done(name)

    def _submitted(self) -> list[StageSpec]:
        """The stages to submit; those before `--from` are used as they are."""
        wanted = list(self.state.wanted())
        first = self.state.options.first
        names = [spec.name for spec in self.state.recipe.stages]
        return [spec for spec in wanted if first is None or names.index(spec.name) >= names.index(first)]

    def _submit(self, name: str) -> None:
        needs = self._needs[name]
        force = ["--force", name] if name in self.state.options.force else []
        job = StageJob(
            name, self._arguments(name, force), str(Path.cwd()), os.path.abspath(self._shared), __version__,
            gpus=int(needs["GPU"]), threads=os.environ.get("OMP_NUM_THREADS"),
            program=PROGRAM,
        )  # fmt: skip
        options: dict[str, Any] = {"num_cpus": needs["CPU"], "num_gpus": needs["GPU"]}
        if "memory" in needs:
            options["memory"] = needs["memory"]
        # No retries by Ray, which would also repeat, without end, what runs out of memory.
        task = self._ray.remote(run_job).options(name=name, max_retries=0, **options)
        self._show(name, f"submitted to Ray: {_in_words(needs)}")
        self._running[task.remote(job)] = name

    def _arguments(self, name: str, more: Sequence[str]) -> tuple[str, ...]:
        directory = self.state.directory
        recipe = directory / RECIPE_NAME
        return ("run", str(recipe), "--output", str(directory), "--only", name, "--json", *more)

    def _ended(self, name: str, reference: Any) -> bool:
        """Whether a stage is done; if not, it has failed, or runs again because its node was lost.

        Raises:
            Fp8PipeError: it failed for a reason that is no verdict.
        """
        lost = self._ray.exceptions
        try:
            outcome: Outcome = self._ray.get(reference)
        except lost.OutOfMemoryError as error:
            raise OutOfMemoryError(
                f"the stage {name} was ended because its node ran out of memory", why=_shown(error),
                fix=f"give it more: --set {name}.resources.memory=64GiB",
            ) from error  # fmt: skip
        except lost.RayTaskError as error:
            raise MissingCapabilityError(
                f"a node of the Ray cluster cannot run the stage {name}", why=_last_line(error),
                fix="install the same fp8pipe in the Python environment of every node",
            ) from error  # fmt: skip
        except lost.RayError as error:
            self._restart(name, error)
            return False
        if outcome.error:
            raise described_error(outcome.error, f"a node of the Ray cluster, for the stage {name}")
        if outcome.code == InterruptedRunError.exit_code:  # not by this command, which would no longer be here
            self._restart(name, InterruptedRunError("the stage was interrupted on its node, as by a shutdown"))
            return False
        return self._judged(name, outcome)

    def _restart(self, name: str, error: Exception) -> None:
        count = self._losses[name] = self._losses.get(name, 0) + 1
        if count == _LOSSES:
            raise MissingCapabilityError(
                f"the process or node that ran the stage {name} was lost {count} times", why=_shown(error),
                fix="see the logs of the nodes; the same command continues from the last checkpoint",
            ) from error  # fmt: skip
        self._show(name, f"its process or node was lost, and it is started again: {_shown(error)}")
        self._submit(name)

    def _judged(self, name: str, outcome: Outcome) -> bool:
        document = outcome.document
        stages = {stage["name"]: stage for stage in document.get("run", {}).get("stages", ())}
        if "verdict" in document:  # a failed gate is a verdict, and no error
            self._show(name, f"{stages.get(name, {}).get('verdict', document['verdict'])}")
            self._failed |= outcome.code != 0
            return outcome.code == 0
        if outcome.code == 0:
            raise BadArtifactError(
                f"the job of the stage {name} says nothing of its result", why="its output is no JSON document",
                fix="see its log: the Python environment of the node may print, too; the same command continues",
            )  # fmt: skip
        error = document.get("error", {})
        what = error.get("what") or f"the job of the stage {name} ended with exit code {outcome.code}"
        found = Fp8PipeError(what, why=str(error.get("why", "")), fix=str(error.get("fix") or "see the log of the run"))
        found.exit_code = int(error.get("exit_code", 1))  # type: ignore[misc]
        raise found

    def _stop(self) -> None:
        """Interrupt the stages that are running, and wait for them."""
        for reference in self._running:
            self._ray.cancel(reference)
        if self._running:
            self._ray.wait(list(self._running), num_returns=len(self._running), timeout=STOP_S)


def needs_of(spec: StageSpec, nodes: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What a stage needs of a node, by the names of Ray's resources (`memory` in bytes).

    A stage that does not say how many GPUs it needs gets one if the cluster has any, unless its `device` is the CPU.

    Args:
        spec: the stage.
        nodes: what `ray.nodes()` returns.
    """
    wanted, device = spec.resources, spec.settings.get("device")
    gpus = wanted.gpus
    if gpus is None:
        some = device == "cuda" or any(node["Resources"].get("GPU", 0) >= 1 for node in nodes)
        gpus = int(some and device != "cpu")
    needs: dict[str, float] = {"CPU": wanted.cpus or 1, "GPU": gpus}
    return needs if wanted.memory is None else {**needs, "memory": wanted.memory}


def _in_words(needs: Mapping[str, float]) -> str:
    gib = [f"{needs['memory'] / 2**30:.1f} GiB"] if "memory" in needs else []
    return ", ".join([f"{needs['CPU']:g} CPUs", f"{needs['GPU']:g} GPUs", *gib])


def _shown(error: Exception) -> str:
    """The message of an error of Ray, on one line: its first one alone says little."""
    return one_line(error)


def _last_line(error: Exception) -> str:
    """The last line of the traceback that Ray gives as the message: what was raised on the node."""
    lines = str(error).strip().splitlines()
    return lines[-1][:300] if lines else first_line(error)
