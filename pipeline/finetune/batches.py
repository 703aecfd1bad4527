"""Batches as a function of the step number: a resumed run sees what an uninterrupted one would have seen.

No iterator, no state: ``at(step)`` depends on the examples, the seed and the step alone. Examples are
grouped into rows once (with packing: first fit, in an order drawn from the seed; without: one a row). Each
epoch takes all rows in an order drawn from (seed, epoch) and cuts them into ``len(batches)`` batches whose
sizes differ by one at most, so that no epoch ends with a batch of a few tokens.

Packing puts several short examples into one row. They must not see each other: their ``position_ids``
restart at zero, from which many classes of transformers build the block-diagonal causal mask, **but only
when attention_mask is None and the model makes no cache**: with ``use_cache=True``, the default of most
configurations, it silently lets the examples of a row attend to each other. Whoever calls the model passes
``use_cache=False``. Whether the model at hand does it is found out by ``packing.py``.

Rows are padded on the right to a multiple of 16 tokens (FP8 matrix products need that alignment). Under a
causal mask padding on the right cannot reach a real token, hence no attention mask; in a packed row it is a
segment of its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch

from fp8pipe.core.errors import ConfigurationError
from fp8pipe.models.language.text import IGNORED, Encoded

ALIGNMENT: Final = 16
# Streams of the seed: independent draws for the grouping and for the epochs.
_GROUPING, _EPOCH = 0, 1


def encoded_digest(*parts: Sequence[Encoded]) -> str:
    """The sha256, in hex, of the token ids and labels of several lists of examples, in their order."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{len(part)} examples".encode())
        for example in part:
            digest.update(np.asarray([len(example.input_ids), *example.input_ids, *example.labels], "<i8").tobytes())
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's input, on the CPU.

    Attributes:
        input_ids: (B, L) int64, padded with the pad id; L is a multiple of 16.
        labels: (B, L) int64, not shifted; -100 for prompts, padding and each example's first token.
        position_ids: (B, L) int64; restart at 0 with each packed example.
        tokens: real tokens (no padding).
        answer_tokens: tokens that the loss counts.
        examples: indices into the encoded examples, row after row.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    tokens: int
    answer_tokens: int
    examples: tuple[int, ...]


class Batches:
    """The batches of every epoch.

    Args:
        encoded: the examples, each at most ``sequence_length`` long.
        batch_size: rows of a batch at most.
        sequence_length: tokens of a row at most (before the padding to a multiple of 16).
        seed: any integer >= 0.
        packing: several examples a row.
        pad_id: token id of the padding.

    Raises:
        ConfigurationError: no examples, a size below one, or an example longer than a row.
    """

    def __init__(
        self, encoded: Sequence[Encoded], batch_size: int, sequence_length: int, seed: int, packing: bool, pad_id: int
    ) -> None:
        _check(encoded, batch_size, sequence_length, seed)
        self._encoded, self._seed, self._pad_id = encoded, seed, pad_id
        self._sequence_length, self._packing, self._batch_size = sequence_length, packing, batch_size
        self._rows = [[i] for i in range(len(encoded))]
        if packing:
            order = self._generator(_GROUPING).permutation(len(encoded)).tolist()
            self._rows = first_fit([len(e.input_ids) for e in encoded], order, sequence_length)
        self._steps = -(-len(self._rows) // batch_size)
        self._order: tuple[int, np.ndarray] | None = None  # the latest epoch's order; a cache, not state

    def __len__(self) -> int:
        """Steps of an epoch."""
        return self._steps

    @property
    def rows(self) -> int:
        """Rows of an epoch (packed or single)."""
        return len(self._rows)

    def unpacked(self) -> Batches:
        """The same examples, one a row."""
        return Batches(self._encoded, self._batch_size, self._sequence_length, self._seed, False, self._pad_id)

    def at(self, step: int) -> Batch:
        """The batch of a step, 0, 1, ...; epoch ``step // len(self)``."""
        if step < 0:
            raise ValueError(f"step {step} is negative")
        epoch, within = divmod(step, self._steps)
        order = self._epoch_order(epoch)
        first, last = (len(order) * (within + i) // self._steps for i in (0, 1))
        return self._batch([self._rows[row] for row in order[first:last]])

    def _generator(self, *stream: int) -> np.random.Generator:
        return np.random.default_rng([self._seed, *stream])

    def _epoch_order(self, epoch: int) -> np.ndarray:
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, self._generator(_EPOCH, epoch).permutation(len(self._rows)))
        return self._order[1]

    def _batch(self, rows: list[list[int]]) -> Batch:
        longest = max(sum(len(self._encoded[i].input_ids) for i in row) for row in rows)
        width = -(-longest // ALIGNMENT) * ALIGNMENT
        input_ids = torch.full((len(rows), width), self._pad_id, dtype=torch.int64)
        labels = torch.full((len(rows), width), IGNORED, dtype=torch.int64)
        position_ids = torch.zeros((len(rows), width), dtype=torch.int64)
        tokens = 0
        for r, row in enumerate(rows):
            at = 0
            for index in row:
                example = self._encoded[index]
                end = at + len(example.input_ids)
                input_ids[r, at:end] = torch.tensor(example.input_ids)
                # From the second token on: the first would be predicted from the example before it.
                labels[r, at + 1 : end] = torch.tensor(example.labels[1:], dtype=torch.int64)
                position_ids[r, at:end] = torch.arange(end - at)
                at = end
            tokens += at
            # Padding of a packed row is a segment of its own. Elsewhere counting on keeps the row one segment (no mask
            # to build), never beyond what the model has positions for.
            counted_on = torch.arange(at, width).clamp(max=self._sequence_length - 1)
            position_ids[r, at:] = torch.arange(width - at) if self._packing else counted_on
        examples = tuple(i for row in rows for i in row)
        return Batch(input_ids, labels, position_ids, tokens, int((labels != IGNORED).sum()), examples)


def first_fit(lengths: Sequence[int], order: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows of indices: each index, in ``order``, goes to the first row with room for it, or opens a new one.

    A maximum tree over the room left in each row finds that row in log n steps.
    """
    size = 1 << max(len(lengths) - 1, 0).bit_length()  # leaves: as many rows as can ever open
    room = [capacity] * (2 * size)
    rows: list[list[int]] = []
    for index in order:
        node = 1
        while node < size:
            node = 2 * node + (room[2 * node] < lengths[index])
        row = node - size
        if row == len(rows):
            rows.append([])
        rows[row].append(index)
        room[node] -= lengths[index]
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return rows


def _check(encoded: Sequence[Encoded], batch_size: int, sequence_length: int, seed: int) -> None:
    if not encoded:
        raise ConfigurationError("there is nothing to batch", why="no example is left", fix="give more data")
    numbers = {"batch_size": (batch_size, 1), "sequence_length": (sequence_length, 2), "seed": (seed, 0)}
    for name, (value, least) in numbers.items():
        if value < least:
            raise ConfigurationError(f"{name} is {value}", why=f"it must be at least {least}", fix=f"raise {name}")
    longest = max(len(e.input_ids) for e in encoded)
    if longest > sequence_length:
        raise ConfigurationError(
            f"an example has {longest} tokens",
            why=f"a row holds {sequence_length}",
            fix="encode with max_length at most sequence_length",
        )
    if any(not e.input_ids or len(e.input_ids) != len(e.labels) for e in encoded):
        raise ConfigurationError(
            "an example is empty or its labels differ in length",
            why="it cannot be learned from",
            fix="encode the data again",
        )
