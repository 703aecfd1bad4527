"""What a fine-tuning run works on, as numbers: the input of the estimates of its memory, disk space and time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.dry_run.costs import Product


@dataclass(frozen=True, slots=True)
class Group:
    """Linear layers that read the same input.

    Attributes:
        outs: `out_features` of each.
        width: their common `in_features`.
        share: fraction of the tokens that reach them; below 1 for experts.
        together: experts of one layer, all like these, whose products are one (`pipeline.falqon.grouped`); else 1.
    """

    outs: tuple[int, ...]
    width: int
    share: float = 1.0
    together: int = 1

    @property
    def rows(self) -> int:
        """Rows of the stacked weights."""
        return sum(self.outs)

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.rows * self.width


@dataclass(frozen=True, slots=True)
class Workload:
    """A run's shapes and choices.

    Attributes:
        method: falqon, lora or qlora.
        groups: the trained linear layers; with LoRA and QLoRA, too, by shared input.
        rank: of the adapter.
        gradients: FALQON initialises A from gradients.
        trains_a: FALQON trains A, too.
        compensated: FALQON's final merge compensates rounding errors.
        flushes: FALQON's codes change in every step, so checkpoints hold them.
        layers: decoder layers.
        hidden: width of the residual stream.
        query: total width of the queries of a layer.
        vocabulary: rows of the output head.
        itemsize: bytes per activation.
        stored: bytes of the base checkpoint as plain tensors: trained weights, and all others.
        mapped: the base's weights stay mapped from its files until they are converted.
        streamed: they stay on the host until then, and are copied to the GPU for each use.
        filed: FALQON's codes are mapped from the base's files until they are changed.
        shard: bytes of the largest weight file of the output.
        tokens, length, answers: of the largest micro-batch: tokens with padding, the row's length, answer tokens.
        saved: bytes that one decoder layer saves for the backward pass in that micro-batch.
        checkpointing: decoder layers are recomputed in the backward pass.
        processes: number of processes that train the model together.
        shards: number of processes among which each copy of the parameters is divided.
        moments: bytes of the optimizer's two moments per trained value; counted in several processes only.
        tower: bytes that the images of a micro-batch take while a frozen vision tower computes their features.
        packed_on_host: QLoRA's weights are on the host from their quantization until they are sharded.
        packed: the final merge writes NVFP4.
    """

    method: Literal["falqon", "lora", "qlora"]
    groups: tuple[Group, ...]
    rank: int
    gradients: bool
    compensated: bool
    flushes: bool
    layers: int
    hidden: int
    query: int
    vocabulary: int
    itemsize: int
    stored: tuple[int, int]
    mapped: bool
    streamed: bool
    filed: bool
    shard: int
    tokens: int
    length: int
    answers: int
    saved: int
    checkpointing: bool
    processes: int = 1
    shards: int = 1
    moments: int = 8
    packed_on_host: bool = False
    tower: int = 0
    packed: bool = False
    trains_a: bool = False

    @property
    def weights(self) -> int:
        """Number of trained layers' weights."""
        return sum(group.weights for group in self.groups)

    @property
    def codes(self) -> int:
        """Bytes of FALQON's codes, with those of A."""
        return self.weights + self.rank * sum(group.width for group in self.groups)

    @property
    def directions(self) -> int:
        """Bytes of the directions that the gradient initialisation stores beside the base; 0 without it."""
        return 4 * self.rank * sum(group.width for group in self.groups) if self.gradients else 0

    @property
    def trained(self) -> int:
        """Number of values that the optimizer updates: B, and A if it is trained, of which LoRA has one per layer."""
        a = 0
        if self.method != "falqon":
            a = sum(len(group.outs) * group.width for group in self.groups)
        elif self.trains_a:
            a = sum(group.width for group in self.groups)
        return self.rank * (a + sum(group.rows for group in self.groups))

    @property
    def others(self) -> int:
        """Bytes of what is not trained, as stored: embedding, output head, norms."""
        return self.stored[1]

    def products(self, rank: int, gradient: bool) -> Sequence[Product]:
        """The matrix products of one pass of a micro-batch through all trained layers: forward, or the gradient's.

        `rank` columns of the adapter take part: 0 before the model is converted.
        """
        found = []
        for group in self.groups:
            tokens, rows = max(1, int(self.tokens * group.share)), group.rows + rank
            found.append(Product(tokens, rows, group.width, 1) if gradient else Product(tokens, group.width, rows, 1))
            if rank:
                found.append(Product(tokens, rank, group.rows, 2 if gradient else 1))
            if rank and gradient and self.trains_a:
                found.append(Product(rank, tokens, group.width, 1))
        return found
