"""Batches as a function of the step number, so that a resumed run gets the same batches as an uninterrupted one.

There is no iterator and no state: ``at(step)`` depends only on the examples, the seed and the step. Examples are
assigned to rows once: with packing by first fit, in a random order drawn from the seed; without packing one per row.
Each epoch takes all rows in a random order drawn from (seed, epoch) and splits them into ``len(batches)`` batches whose
sizes differ by at most one, so that no epoch ends with a batch of only a few tokens.

Packing puts several short examples into one row. They must not attend to each other, so their ``position_ids`` restart
at zero. From that, many transformers models build a block-diagonal causal mask, **but only if attention_mask is None
and the model creates no cache**: with ``use_cache=True``, the default of most configurations, such a model silently
lets the examples of a row attend to each other. Callers of the model must therefore pass ``use_cache=False``.
``packing.py`` tests whether a given model isolates the examples of a row from each other.

Rows are padded on the right to a multiple of 16 tokens (FP8 GEMMs need that alignment). Under a causal mask no real
token attends to padding on its right, so no attention mask is needed. In a packed row the padding has positions that
start at zero, like another example.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import numpy as np
import torch

from fp8pipe.core.errors import ConfigurationError
from fp8pipe.models.language.text import IGNORED, Encoded, ImagePrompts

ALIGNMENT: Final = 16
# Combined with the seed, so that the assignment to rows and the order of each epoch use independent random streams.
_GROUPING, _EPOCH = 0, 1


def encoded_digest(*parts: Sequence[Encoded]) -> str:
    """The sha256, in hex, of the token ids, labels and images of several lists of examples, in the given order."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{len(part)} examples".encode())
        for example in part:
            digest.update(np.asarray([len(example.input_ids), *example.input_ids, *example.labels], "<i8").tobytes())
            if example.images is not None:
                digest.update("\n".join(["images", *example.images.digests]).encode())
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Batch:
    """The input of one step, on the CPU.

    Attributes:
        input_ids: (B, L) int64, padded with the pad id; L is a multiple of 16.
        labels: (B, L) int64, aligned with `input_ids` (not shifted); -100 for prompts, padding and the first token of
            each example.
        position_ids: (B, L) int64; restart at 0 with each packed example.
        tokens: number of real tokens (without padding).
        answer_tokens: number of tokens that enter the loss.
        examples: indices into the encoded examples, row by row.
        lengths: number of real tokens of each row.
        image_inputs: reads the images of the batch and returns the model's other inputs, on the CPU; None if it has no
            images.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    tokens: int
    answer_tokens: int
    examples: tuple[int, ...]
    lengths: tuple[int, ...] = ()
    image_inputs: Callable[[], dict[str, torch.Tensor]] | None = None


class Batches:
    """The batches of all epochs, computed on demand.

    Args:
        encoded: the examples, each at most ``sequence_length`` tokens long.
        batch_size: maximum number of rows per batch.
        sequence_length: maximum number of tokens per row (before padding to a multiple of 16).
        seed: determines the random order; at least 0.
        packing: put several examples into a row.
        pad_id: token id used for padding.
        images: the model's processor, if examples have images; these are not packed.

    Raises:
        ConfigurationError: no examples, a size below one, or an example longer than a row.
    """

    def __init__(
        self, encoded: Sequence[Encoded], batch_size: int, sequence_length: int, seed: int, packing: bool, pad_id: int,
        images: ImagePrompts | None = None,
    ) -> None:  # fmt: skip
        _check(encoded, batch_size, sequence_length, seed)
        self._encoded, self._seed, self._pad_id, self._images = encoded, seed, pad_id, images
        self._sequence_length, self._packing, self._batch_size = sequence_length, packing, batch_size
        self._rows = [[i] for i in range(len(encoded))]
        if packing:
            order = self._generator(_GROUPING).permutation(len(encoded)).tolist()
            self._rows = first_fit([len(e.input_ids) for e in encoded], order, sequence_length)
        self._steps = -(-len(self._rows) // batch_size)
        self._order: tuple[int, np.ndarray] | None = None  # the latest epoch's order; a cache, not state

    def __len__(self) -> int:
        """Steps per epoch."""
        return self._steps

    @property
    def rows(self) -> int:
        """Rows per epoch (packed or single)."""
        return len(self._rows)

    @property
    def has_images(self) -> bool:
        """Whether some example has images."""
        return any(example.images is not None for example in self._encoded)

    def unpacked(self) -> Batches:
        """Batches of the same examples without packing, one example per row."""
        sizes = self._batch_size, self._sequence_length
        return Batches(self._encoded, *sizes, self._seed, False, self._pad_id, self._images)

    def at(self, step: int) -> Batch:
        """The batch of `step` (from 0), which belongs to epoch ``step // len(self)``.

        Raises:
            ValueError: `step` is negative.
        """
        if step < 0:
            raise ValueError(f"step {step} is negative")
        epoch, within = divmod(step, self._steps)
        order = self._epoch_order(epoch)
        first, last = (len(order) * (within + i) // self._steps for i in (0, 1))
        return self._batch([self._rows[row] for row in order[first:last]])

    def only(self, *examples: int) -> Batch:
        """A batch of these examples, by their indices, one per row."""
        return self._batch([[example] for example in examples])

    def image_sample(self) -> Batch | None:
        """The first example with images, and beside it the longest other example; None if none has images."""
        first = next((i for i, example in enumerate(self._encoded) if example.images is not None), None)
        if first is None:
            return None
        others = (i for i in range(len(self._encoded)) if i != first)
        longest = max(others, key=lambda i: len(self._encoded[i].input_ids), default=None)
        return self.only(first) if longest is None else self.only(first, longest)

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
        lengths = []
        for r, row in enumerate(rows):
            at = 0
            for index in row:
                example = self._encoded[index]
                end = at + len(example.input_ids)
                input_ids[r, at:end] = torch.tensor(example.input_ids)
                # The first token is not a target, as it would be predicted from the preceding example.
                labels[r, at + 1 : end] = torch.tensor(example.labels[1:], dtype=torch.int64)
                position_ids[r, at:end] = torch.arange(end - at)
                at = end
            lengths.append(at)
            # In a packed row the padding has positions like another example. Otherwise positions continue, so that
            # models do not build a block-diagonal mask, but not beyond the last position that the model supports.
            counted_on = torch.arange(at, width).clamp(max=self._sequence_length - 1)
            position_ids[r, at:] = torch.arange(width - at) if self._packing else counted_on
        examples = tuple(i for row in rows for i in row)
        answers = int((labels != IGNORED).sum())
        pictured, read = [self._encoded[i].images for i in examples], None
        if self._images is not None and any(pictured):
            read = partial(self._images.inputs, pictured, width)
        return Batch(input_ids, labels, position_ids, sum(lengths), answers, examples, tuple(lengths), read)


def first_fit(lengths: Sequence[int], order: Sequence[int], capacity: int) -> list[list[int]]:
    """First-fit packing: each example is put into the first row with enough free space, or else into a new row.

    A tree of maxima over the rows' free space finds that row in O(log n).

    Args:
        lengths: length of each example, in tokens.
        order: the indices of the examples in the order in which they are placed.
        capacity: maximum length of a row, in tokens; no example may be longer.

    Returns:
        The indices of the examples in each row.
    """
    size = 1 << max(len(lengths) - 1, 0).bit_length()  # leaves: the maximum number of rows
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
