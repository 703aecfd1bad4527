"""FALQON inside a training loop that is not this project's: convert a model, step, merge, save an artifact.

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

With transformers' Trainer, `falqon.callback()` makes the calls. A converted model is saved by `save` alone: its modules
are not those of its class any more.
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
from fp8pipe.models.checkpoint.tensors import model_parent
from fp8pipe.models.checkpoint.values import refuse_not_finite
from fp8pipe.models.language.ending import GENERATION_FILE, read_ending
from fp8pipe.models.language.experts import unstack_experts
from fp8pipe.models.language.sources import check_unquantized, resolve_model
from fp8pipe.models.language.structure import read_structure
from fp8pipe.numerics.bf16 import widen_bf16_products
from pipeline.falqon.flush import FlushReport
from pipeline.falqon.method import FalqonMethod
from pipeline.falqon.observed import Losses
from pipeline.falqon.rules import DEFAULT_RULE, FinalMerge, Initialisation, update_rule
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
    """Replace the linear layers of a causal language model by FALQON layers, in place.

    Args:
        model: as transformers loads it, in bf16 or fp32, on its device.
        rank: rows of A in every layer.
        update_rule_name: how updates enter the FP8 codes.
        rows: rows flushed per layer and step, by rules that flush; the rank when None.
        initialisation: where A comes from; when None, `gradient` where `losses` is given, else `randomized-svd`.
        seed: of initialisation and stochastic rounding.
        losses: called for an iterable over losses of a few training batches, for the `gradient` initialisation.

    Returns:
        The handle of the converted model; only its `parameters()` train.

    Raises:
        ConfigurationError: an unknown rule or initialisation, a rank that does not fit, nothing to convert, or a model
            that is quantized already or not finite.
    """
    rule = update_rule(update_rule_name)
    how = initialisation or (Initialisation.RANDOMIZED_SVD if losses is None else Initialisation.GRADIENT)
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


class Falqon:
    """A converted model.

    Attributes:
        model: the model, changed in place.
        method: its layers and their rule.
        records: one per linear layer, converted or left out with the reason.
        steps: optimizer steps so far.
    """

    def __init__(self, model: nn.Module, method: FalqonMethod, records: list[Any]) -> None:
        self.model, self.method, self.records = model, method, records
        self.steps = 0
        self._merged: dict[str, FlushReport] | None = None

    def parameters(self) -> list[nn.Parameter]:
        """What the optimizer trains: B of every layer."""
        return list(self.method.parameters().values())

    def after_step(self) -> FlushReport | None:
        """Flush as the update rule says; to be called after every optimizer step. None where the rule waits."""
        report = self.method.after_step(self.steps, measure=False)
        self.steps += 1
        return report

    def final_merge(self, batches: Iterable[dict[str, Tensor]] = ()) -> dict[str, FlushReport]:
        """Merge what is left in B into the codes; afterwards the codes alone are the model.

        Args:
            batches: inputs of the model, some 32 training sequences: rounding is compensated for them.

        Returns:
            What the merge did, by layer.

        Raises:
            ConfigurationError: the update rule rounds for the layers' inputs, and there are no batches.
        """
        held = [{name: value for name, value in batch.items() if name != "labels"} for batch in batches]
        if self.method.rule.final is FinalMerge.COMPENSATED and not held:
            raise ConfigurationError(
                f"the final merge of the rule {self.method.rule.name!r} needs batches",
                why="it rounds for the inputs that layers see",
                fix="give some training batches, or convert with live-nearest",
            )  # fmt: skip
        training = self.model.training
        self.model.eval()
        with torch.no_grad():
            self._merged = self.method.finish(self.model, lambda: held)
        self.model.train(training)
        return self._merged

    def save(self, base: str | Path, output: str | Path, *, force: bool = False) -> Artifact:
        """Write the artifact that `fp8pipe export` takes: the base checkpoint with the trained codes in place.

        Args:
            base: what the model was loaded from: a directory, a hub id, a .gguf file or sample:NAME.
            output: the artifact's directory.
            force: replace an existing artifact.

        Raises:
            ConfigurationError: B is not merged yet, or the base is not the model's.
        """
        if self._merged is None:
            raise ConfigurationError(
                "nothing to save yet", why="B is not merged into the codes", fix="call final_merge"
            )
        source = resolve_model(str(base))
        check_unquantized(source.path)
        rule = self.method.rule
        names = checkpoint_names(source.path, read_structure(source.path).naming, self.method.names)
        with ArtifactWriter(output, kind=TUNED_KINDS[0], stage="own training loop", force=force) as writer:
            weights, adapter = self.method.deployed_weights(), self.method.adapter()
            transposed = write_deployed(writer, source.path, weights, adapter, names)
            ending = read_ending(source.path)
            if ending.settings is not None:
                (writer.root / GENERATION_FILE).write_text(ending.text, encoding="utf-8")
            for warning in ending.warnings():
                writer.warn(warning)
            return writer.commit(
                config={"method": "falqon", "update_rule": rule.name, "rank": self.method.rank, "steps": self.steps},
                seed=self.method.seed,
                parents=[model_parent(source.path, source.origin)],
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
        """A `TrainerCallback` for transformers' Trainer that calls `after_step`; merging and saving stay with you."""
        from transformers import TrainerCallback

        falqon = self

        class FalqonCallback(TrainerCallback):
            """Flushes after every optimizer step."""

            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                falqon.after_step()

        return FalqonCallback()
