"""FALQON for custom training loops: convert a model, train it, merge the update, and save an artifact for export.

```python
falqon = fp8pipe.falqon.convert(model, rank=64)
optimizer = torch.optim.AdamW(falqon.parameters(), lr=1e-3)
for batch in batches:
    model(**batch).loss.backward()
    optimizer.step(); optimizer.zero_grad()
    falqon.after_step()
falqon.final_merge(calibration_batches)
falqon.save("base/checkpoint", "tuned")          # fp8pipe export tuned --target vllm ...
```

With transformers' Trainer, `falqon.callback()` calls `after_step`. Save a converted model with `save`, not with
`save_pretrained`: its linear layers have been replaced, so its state dict no longer fits the model's class.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fp8pipe.artifact import Artifact, ArtifactWriter, NumberFormat
from fp8pipe.artifact.kinds import TUNED_KINDS, TunedDetails
from fp8pipe.core.errors import ConfigurationError
from fp8pipe.models.checkpoint.names import checkpoint_names
from fp8pipe.models.checkpoint.quantized.base import read_base
from fp8pipe.models.checkpoint.tensors import model_parent
from fp8pipe.models.checkpoint.values import refuse_not_finite
from fp8pipe.models.language.ending import GENERATION_FILE, read_ending
from fp8pipe.models.language.sources import resolve_model
from fp8pipe.models.language.structure import read_structure
from fp8pipe.models.language.unstacking import unstack_experts
from fp8pipe.numerics.bf16 import widen_bf16_products
from pipeline.falqon.flush import FlushReport
from pipeline.falqon.method import FalqonMethod
from pipeline.falqon.observed import Losses
from pipeline.falqon.rules import DEFAULT_RULE, FinalMerge, Initialisation, UpdateRule, update_rule
from pipeline.finetune.weights import merge_facts, renamed, write_deployed

__all__ = ["Falqon", "convert"]


def convert(
    model: nn.Module,
    *,
    rank: int = 64,
    update_rule_name: str = DEFAULT_RULE,
    rows: int | None = None,
    initialisation: str | None = None,
    seed: int = 0,
    losses: Losses | None = None,
) -> Falqon:
    """Replace the linear layers of a causal language model with FALQON layers, in place.

    Args:
        model: a transformers model in bf16 or fp32, on the device on which it will be trained.
        rank: adapter rank, the number of rows of A in every layer.
        update_rule_name: name of the rule by which updates are merged into the FP8 codes.
        rows: rows of B that are flushed per layer and step, for rules that flush every step; default: `rank`.
        initialisation: how A is initialised; default: `gradient` if `losses` is given, else the update rule's, and
            `randomized-svd` for rules whose own is `gradient`.
        seed: seed of the initialisation and of stochastic rounding.
        losses: a function that returns an iterable over the losses of a few training batches, each a scalar with its
            autograd graph; called twice. Needed by the `gradient` initialisation.

    Returns:
        A handle to the converted model; pass only its `parameters()` to the optimizer.

    Raises:
        ConfigurationError: unknown rule or initialisation, rank larger than a layer's smaller dimension, no layer to
            convert, or a model that is quantized already or has weights that are NaN or infinite.
    """
    rule = update_rule(update_rule_name)
    how = initialisation or (_without_losses(rule) if losses is None else Initialisation.GRADIENT)
    try:
        chosen = Initialisation(how)
    except ValueError:
        known = ", ".join(Initialisation)
        raise ConfigurationError(
            f"unknown initialisation {how!r}", why=f"choose from {known}", fix="pick one"
        ) from None
    if chosen is Initialisation.GRADIENT and losses is None:
        raise ConfigurationError("the gradient initialisation needs losses", why="none were given", fix="give losses")
    refuse_not_finite(model.named_parameters(), type(model).__name__)
    widen_bf16_products()
    unstack_experts(model)
    method = FalqonMethod(rule, rank=rank, rows=rows, initialisation=chosen, seed=seed)
    return Falqon(model, method, method.prepare(model, losses=losses))


def _without_losses(rule: UpdateRule) -> Initialisation:
    gradient = rule.initialisation is Initialisation.GRADIENT
    return Initialisation.RANDOMIZED_SVD if gradient else rule.initialisation


class Falqon:
    """A handle to a model that `convert` has converted.

    Attributes:
        model: the converted model, the same object that was passed in.
        method: the training method, with the FALQON layers and their update rule.
        records: one record per linear layer: converted, or skipped with the reason.
        steps: number of completed optimizer steps.
    """

    def __init__(self, model: nn.Module, method: FalqonMethod, records: list[Any]) -> None:
        self.model, self.method, self.records = model, method, records
        self.steps = 0
        self._merged: dict[str, FlushReport] | None = None

    def parameters(self) -> list[nn.Parameter]:
        """The trainable parameters: B of every layer, `(out, rank)`, and A `(rank, in)` if the rule trains it."""
        return list(self.method.parameters().values())

    def after_step(self) -> FlushReport | None:
        """Round a trained A to its codes, and flush rows of B if the rule does; call this after every optimizer step.

        Returns:
            A report of the flush without measurements (all zeros), or None if the rule does not flush every step.
        """
        report = self.method.after_step(self.steps, measure=False)
        self.steps += 1
        return report

    def final_merge(self, batches: Iterable[dict[str, Tensor]] = ()) -> dict[str, FlushReport]:
        """Merge the update that is still in B into the codes, after which B is zero.

        Args:
            batches: keyword arguments of the model, about 32 training sequences in all. Rounding errors are compensated
                for their layer inputs, with GPTQ's solver.

        Returns:
            A report for each layer: the number of changed codes, and the applied relative to the intended change.

        Raises:
            ConfigurationError: the update rule compensates rounding errors on layer inputs, but `batches` is empty.
        """
        inputs = [{name: value for name, value in batch.items() if name != "labels"} for batch in batches]
        if self.method.rule.final is FinalMerge.COMPENSATED and not inputs:
            raise ConfigurationError(
                f"the final merge of the rule {self.method.rule.name!r} needs batches",
                why="it compensates rounding errors on the inputs of each layer",
                fix="give some training batches, or convert with live-nearest",
            )  # fmt: skip
        training = self.model.training
        self.model.eval()
        with torch.no_grad():
            self._merged = self.method.finish(self.model, lambda: inputs)
        self.model.train(training)
        return self._merged

    def save(self, base: str | Path, output: str | Path, *, force: bool = False) -> Artifact:
        """Write an artifact for `fp8pipe export`: the base checkpoint with the trained FP8 codes in place of weights.

        Args:
            base: the checkpoint that the model was loaded from: a directory, a hub id, a .gguf file or sample:NAME.
            output: directory of the artifact.
            force: replace an existing artifact.

        Raises:
            ConfigurationError: `final_merge` was not called, or `base` is not the checkpoint of this model.
        """
        if self._merged is None:
            raise ConfigurationError(
                "nothing to save yet", why="B is not merged into the codes", fix="call final_merge"
            )
        source = resolve_model(str(base))
        checkpoint = read_base(source.path)
        rule = self.method.rule
        names = checkpoint_names(source.path, read_structure(source.path).naming, self.method.names)
        with ArtifactWriter(output, kind=TUNED_KINDS[0], stage="own training loop", force=force) as writer:
            weights, adapter = self.method.deployed_weights(), self.method.adapter()
            transposed = write_deployed(writer, source.path, weights, adapter, names)
            ending = read_ending(source.path)
            if ending.settings is not None:
                (writer.root / GENERATION_FILE).write_text(ending.text, encoding="utf-8")
            for warning in [*checkpoint.warnings(), *ending.warnings()]:
                writer.warn(warning)
            return writer.commit(
                config={"method": "falqon", "update_rule": rule.name, "rank": self.method.rank, "steps": self.steps},
                seed=self.method.seed,
                parents=[model_parent(source.path, source.origin, checkpoint.stored)],
                number_format=NumberFormat(name="e4m3", granularity="per-tensor"),
                runtime={"device": str(next(self.model.parameters()).device)},
                layers=renamed(self.records, names),
                details=TunedDetails(
                    adapter="flushed", rule=rule.name, rank=self.method.rank, transposed=transposed,
                    stop_token_added=ending.added,
                    **merge_facts(self._merged, names),
                ),
            )  # fmt: skip

    def callback(self) -> Any:
        """A `TrainerCallback` for transformers' Trainer that calls `after_step` after every optimizer step.

        It does not call `final_merge` and `save`, which must be called after training.
        """
        from transformers import TrainerCallback

        falqon = self

        class FalqonCallback(TrainerCallback):
            """Calls `after_step` after every optimizer step."""

            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                falqon.after_step()

        return FalqonCallback()
