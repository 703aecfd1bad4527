"""Test, before the first step, that a model computes examples with images as training assumes; a few forward passes.

Batches with images are passed without an attention mask and without positions: models build both themselves, each in
its own way, from what the processor says about the tokens. Training assumes two things. The logits of an example are
those of the example alone, whatever the other rows of the batch are, and although it is padded. And they depend on
earlier tokens only: models that let a prompt attend in both directions must not do so in answers, or they would be
trained to copy what they see. Both differences are measured relative to the effect of a prompt's last token.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn

from fp8pipe.core.errors import ConfigurationError
from fp8pipe.models.language.text import IGNORED
from pipeline.finetune.batches import Batch, Batches
from pipeline.finetune.compiled import uncompiled
from pipeline.finetune.loss import head_on_rows, model_inputs

# Tolerances, relative to the effect of a prompt's last token. What must not matter changes nothing but the last bits of
# results (by other shapes, other groups of experts), which bf16 has few of; what does matter has an effect of its size.
_MOST: Final = {torch.float32: 1e-3}
_MOST_IN_HALF: Final = 0.1


def check_images(model: nn.Module, batches: Batches) -> None:
    """Run an example with images beside the longest other example, and variants of this batch.

    Args:
        model: the model as loaded, on its device; unchanged on return.
        batches: the training batches.

    Raises:
        ConfigurationError: logits depend on other rows, on padding, or on later tokens.
    """
    batch = batches.image_sample()
    if batch is None:
        return
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), uncompiled():
            later, apart = _influences(model, batches, batch)
    finally:
        model.train(training)
    most = _MOST.get(next(model.parameters()).dtype, _MOST_IN_HALF)
    if not (later <= most and apart <= most):  # also if one is NaN
        raise ConfigurationError(
            f"{type(model).__name__} cannot be tuned on images",
            why=f"relative to the effect of a prompt's last token, logits change by {later:.2g} with a later token and "
            f"by {apart:.2g} with the other examples of the batch; both must be 0, up to {most:.2g} of rounding",
            fix="give text without image parts, or another model",
        )


def _influences(model: nn.Module, batches: Batches, batch: Batch) -> tuple[float, float]:
    """The largest changes of logits by each row's last token, and by other rows and padding, relative to `own`.

    `own` is the largest change of logits when the last token of each prompt is replaced.
    """
    device = next(model.parameters()).device
    inputs, ids, ends = model_inputs(batch, device), batch.input_ids, torch.tensor(batch.lengths) - 1
    # The positions whose logits predict an answer token, all before the last token of their row.
    targets = nn.functional.pad(batch.labels[:, 1:], (0, 1), value=IGNORED) != IGNORED
    places, prompts = targets.reshape(-1).nonzero().squeeze(1), targets.int().argmax(1)
    rows = torch.arange(len(ids))
    pool = torch.cat([ids[rows, prompts], ids[rows, ends]]).unique()  # of no image
    if len(pool) == 1:
        pool = torch.cat([pool, pool - 1 if pool > 0 else pool + 1])  # in the vocabulary

    def replaced(at: Tensor) -> Tensor:
        changed = ids.clone()
        changed[rows, at] = torch.where(ids[rows, at] == pool[0], pool[1], pool[0])
        return _logits(model, inputs | {"input_ids": changed.to(device)}, places)

    whole = _logits(model, inputs, places)
    own, later = ((replaced(at) - whole).abs().max() for at in (prompts, ends))
    row = int(ends.argmin())  # the one that is padded most
    alone = _logits(model, model_inputs(batches.only(batch.examples[row]), device), targets[row].nonzero().squeeze(1))
    apart = (alone - whole[(places // ids.shape[1] == row).to(device)]).abs().max()
    return float(later / own), float(apart / own)


def _logits(model: nn.Module, inputs: dict[str, Tensor], places: Tensor) -> Tensor:
    """Logits, fp32 `(len(places), V)`, at places of the flattened `(B, L)` input."""
    with head_on_rows(model, places.to(next(model.parameters()).device)):
        output = model(**inputs, use_cache=False)
    logits: Tensor = output.logits.float().flatten(0, -2)
    return logits
