"""The training loop, which is the same for every method and can be resumed from every checkpoint.

Batches, learning rate and random draws are functions of the step number, so that a checkpoint need not contain them. A
run that is killed at any time and resumed is bit-identical to an uninterrupted run.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fp8pipe.core.errors import ConfigurationError
from fp8pipe.core.plan import enter_phase
from fp8pipe.models.compat import import_package
from pipeline.falqon.flush import FlushReport
from pipeline.finetune.batches import Batch, Batches
from pipeline.finetune.checkpoint import CheckpointStore, optimizer_tensors, restore_optimizer
from pipeline.finetune.compiled import compile_layers
from pipeline.finetune.config import FinetuneConfig, learning_rate_at
from pipeline.finetune.loss import answer_count, answer_loss, heldout_loss, model_inputs
from pipeline.finetune.method import Method

_LOG = logging.getLogger(__name__)
Metrics = dict[str, Any]


class Trainer:
    """Trains a model with one configuration.

    Args:
        config: the resolved configuration.
        model: the model, prepared by `method` and on its device.
        method: the training method (FALQON, LoRA or QLoRA).
        train: training batches.
        heldout: held-out batches.
        store: the store of the run's checkpoints.
        metrics_file: JSON Lines file with one line for each log line and each evaluation.

    Attributes:
        on_record: called with every line of metrics after it was written.
    """

    def __init__(
        self,
        config: FinetuneConfig,
        model: nn.Module,
        method: Method,
        train: Batches,
        heldout: Batches,
        store: CheckpointStore,
        metrics_file: Path,
    ) -> None:
        self.config, self.model, self.method = config, model, method
        self.train_batches, self.heldout_batches = train, heldout
        self.store, self.metrics_file = store, metrics_file
        self.names = {p: n for n, p in method.parameters().items()}
        self.optimizer = build_optimizer(config, list(self.names))
        self.compiled = compile_layers(model, exact_casts=method.exact_casts)
        self.step = 0
        self.history: list[Metrics] = []
        self.on_record: Callable[[Metrics], None] = lambda figures: None
        self._flushed: FlushReport | None = None

    def run(self, on_step: Callable[[Metrics], None] = lambda metrics: None) -> None:
        """Train from the current step to the last, with logging, evaluation and checkpoints.

        Args:
            on_step: called with the metrics of every step.

        Raises:
            ConfigurationError: loss or gradient became NaN or infinite; the last checkpoint is kept.
        """
        config = self.config

        def due(every: int) -> bool:
            return self.step == config.steps or bool(every and self.step % every == 0)

        if self.step == 0:
            self._evaluate()
        self.model.train()
        while self.step < config.steps:
            figures = self.one_step()
            on_step(figures)
            if due(config.log_every):
                self.record(figures | self._health())
            if due(config.evaluate_every):
                self._evaluate()
            if due(config.save_every):
                self.save()

    def one_step(self) -> Metrics:
        """Run one optimizer step and return its metrics."""
        enter_phase("step")
        config, started = self.config, time.perf_counter()
        rate = learning_rate_at(
            self.step,
            peak=config.learning_rate,
            steps=config.steps,
            warmup=config.warmup_steps,
            schedule=config.schedule,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        losses, answers, tokens = self.accumulate()
        norms = self.clip()
        # All values are read together, so that there is only one GPU synchronization.
        *parts, norm = torch.stack([*losses, norms]).cpu().tolist()
        loss = reduce(add, parts, 0.0)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise self._diverged(f"loss {loss}, gradient norm {norm}")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        will_log = (self.step + 1) % config.log_every == 0 or self.step + 1 == config.steps
        before_flush = time.perf_counter()
        self._flushed = self.method.after_step(self.step, measure=will_log)
        self.step += 1
        ended = time.perf_counter()
        seconds = ended - started
        return {
            "step": self.step, "loss": loss, "learning_rate": rate, "gradient_norm": norm,
            "answer_tokens": answers, "tokens_per_second": tokens / seconds,
            "flush_share": (ended - before_flush) / seconds,
        }  # fmt: skip

    def accumulate(self) -> tuple[list[Tensor], int, int]:
        """Run the forward and backward passes of the step's micro-batches.

        Returns:
            The contribution of each micro-batch to the step's mean loss (scalars), the number of answer tokens, and the
            number of all real tokens.
        """
        batches = self.micro_batches()
        answers = sum(answer_count(batch.labels) for batch in batches)
        losses = []
        for batch in batches:
            if answer_count(batch.labels) == 0:
                continue
            losses.append(self.backward(batch, answers))
        return losses, answers, sum(batch.tokens for batch in batches)

    def micro_batches(self) -> list[Batch]:
        """The micro-batches of the next step."""
        count = self.config.gradient_accumulation
        return [self.train_batches.at(self.step * count + i) for i in range(count)]

    def backward(self, batch: Batch, answers: int) -> Tensor:
        """Run one micro-batch of a step that has that many answer tokens; returns its detached loss."""
        with self.method.forward_context():
            inputs = model_inputs(batch, self.config.device)
            loss = answer_loss(self.model, inputs, batch.labels, float(answers))
        loss.backward()
        return loss.detach()

    def clip(self) -> Tensor:
        """Scale the gradients down to the norm limit, if they exceed it; returns their norm before that, a scalar."""
        return torch.nn.utils.clip_grad_norm_(list(self.names), self.config.clip_norm, foreach=True)

    def _health(self) -> Metrics:
        """Metrics of this step's flush, or, if there was none, of a hypothetical flush of the pending update."""
        report = self._flushed if self._flushed is not None else self.method.health(self.step)
        if report is None:
            return {}
        prefix = "flush" if self._flushed is not None else "pending"
        return {f"{prefix}_{key}": value for key, value in report.health().items()}

    def _evaluate(self) -> None:
        enter_phase("evaluate")
        self.record({"step": self.step, "heldout_loss": self.heldout_loss()})

    def heldout_loss(self) -> float:
        """The held-out loss of the model as it is, nats per answer token."""
        batches = (self.heldout_batches.at(i) for i in range(len(self.heldout_batches)))
        return heldout_loss(self.model, batches, self.config.device, self.method.forward_context())

    def record(self, figures: Metrics) -> None:
        """Append metrics, by name, to the history and to the metrics file, and log them."""
        self.history.append(figures)
        self.write_metrics([figures], "a")
        self.on_record(figures)
        _LOG.info("%s", "  ".join(f"{key} {_brief(value)}" for key, value in figures.items()))

    def write_metrics(self, lines: list[Metrics], mode: Literal["a", "w"]) -> None:
        """Append lines to the metrics file, or replace what is in it."""
        with self.metrics_file.open(mode) as handle:
            handle.write("".join(json.dumps(line) + "\n" for line in lines))

    def _diverged(self, observed: str) -> ConfigurationError:
        kept = self.store.steps()
        where = f"the checkpoint of step {kept[-1]} in {self.store.root} is kept" if kept else "no checkpoint yet"
        rate = self.optimizer.param_groups[0]["lr"]
        return ConfigurationError(
            f"training diverged at step {self.step + 1}",
            why=f"{observed} at learning rate {rate:.3g}; {where}",
            fix="lower --learning-rate, or raise the warm-up, and start anew",
        )

    def save(self) -> None:
        """Write a checkpoint of the current step.

        Raises:
            ConfigurationError: a parameter is NaN or infinite; such a state must not replace a good checkpoint.
        """
        enter_phase("save")
        if not self.finite():
            raise self._diverged("parameters that are not finite")
        self.write_checkpoint(self.method.step_state() | optimizer_tensors(self.optimizer, self.names))

    def finite(self) -> bool:
        """Whether no parameter is NaN or infinite."""
        return all(bool(torch.isfinite(parameter).all()) for parameter in self.names)

    def write_checkpoint(self, tensors: dict[str, Tensor]) -> None:
        """Write a checkpoint of these tensors."""
        self.store.save(self.step, tensors, {"history": self.history})

    def resume(self) -> bool:
        """Restore the newest checkpoint; returns False if there is none."""
        steps = self.store.steps()
        if not steps:
            self.write_metrics([], "w")
            return False
        tensors, state = self.store.load(steps[-1])
        self.restore(tensors)
        self.step, self.history = int(state["step"]), list(state["history"])
        self.write_metrics(self.history, "w")
        return True

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Restore the tensors of a checkpoint in place."""
        self.method.load_step_state({k: v for k, v in tensors.items() if not k.startswith("optimizer/")})
        restore_optimizer(self.optimizer, self.names, tensors)

    def calibration_inputs(self) -> Iterator[dict[str, Tensor]]:
        """Model inputs from the first training batches: about `final_merge_batches` sequences, for the final merge.

        They are made one batch at a time, as the pixel values of all would take much memory.
        """
        for batch in self._calibration_batches():
            yield model_inputs(batch, self.config.device)

    def calibration_losses(self) -> Iterator[Tensor]:
        """The loss of each batch of `calibration_inputs`, per answer token, with its autograd graph."""
        for batch in self._calibration_batches():
            inputs, answers = model_inputs(batch, self.config.device), max(1.0, answer_count(batch.labels))
            with self.method.forward_context():
                yield answer_loss(self.model, inputs, batch.labels, answers)

    def _calibration_batches(self) -> Iterator[Batch]:
        return (self.train_batches.at(index) for index in range(self.config.merge_batches))


def build_optimizer(config: FinetuneConfig, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW over `parameters`: torch's fused version, or bitsandbytes' 8-bit version to save optimizer memory.

    Raises:
        MissingCapabilityError: 8-bit AdamW is configured, but bitsandbytes is not installed.
    """
    options = {"lr": config.learning_rate, "betas": (0.9, config.beta2), "weight_decay": config.weight_decay}
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, fused=True, **options)  # type: ignore[arg-type]
    bitsandbytes = import_package("bitsandbytes", "the 8-bit AdamW needs bitsandbytes", "pip install 'fp8pipe[train]'")
    optimizer: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(parameters, **options)
    return optimizer


def _brief(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def plot_run(history: list[dict[str, Any]], path: Path, title: str) -> None:
    """Plot a run's training and held-out loss, and below them the metrics of its flushes, if any, to a PNG file.

    Args:
        history: the lines of metrics of the run.
        path: the PNG file.
        title: title of the plot.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    health = sorted({key for line in history for key in line if key.startswith(("flush_", "pending_"))})
    figure, axes = pyplot.subplots(2 if health else 1, 1, figsize=(8, 6 if health else 3.5), squeeze=False, sharex=True)
    top = axes[0][0]
    _curve(top, history, "loss", "training, answer tokens")
    _curve(top, history, "heldout_loss", "held out", marker="o")
    top.set_ylabel("loss (nats a token)")
    top.set_title(title)
    top.legend()
    if health:
        bottom = axes[1][0]
        for key in health:
            _curve(bottom, history, key, key.replace("_", " "))
        bottom.set_ylim(-0.05, 1.25)
        bottom.set_ylabel("share, ratio, cosine")
        bottom.legend()
    axes[-1][0].set_xlabel("optimizer step")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _curve(axis: Any, history: list[dict[str, Any]], key: str, label: str, marker: str = "") -> None:
    points = [(line["step"], line[key]) for line in history if key in line]
    if points:
        axis.plot(*zip(*points, strict=True), label=label, marker=marker)
