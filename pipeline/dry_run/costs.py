"""A cost model of a training step on a GPU: estimates from shapes, counted kernels and data sheets.

No GPU has confirmed these estimates. `docs/cost-model.md` has the sources, the residuals, and what is left out.

A step's time is the sum of four parts. The time of each GEMM is that of its arithmetic or of its memory traffic,
whichever is longer (roofline model). The time of attention is that of its arithmetic. The time of elementwise kernels,
norms, rotary embeddings and casts is that of their memory traffic, which was counted operator by operator on a real
decoder layer, in bytes per token and feature. The time of the optimizer is that of its memory traffic. If the host
launches kernels more slowly than the GPU runs them, the launch time is the step's time. The same two achieved fractions
of data-sheet throughput, one for GEMMs and one for memory, are used for every device, format and method.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from pipeline.dry_run.devices import GEMM_SHARE, MEMORY_SHARE, Device

LAUNCH_SECONDS: Final = 5e-6  # host time to launch one eager operator, an assumption
# From Inductor's schedule of a FALQON decoder layer of LLaMA-7B with activation checkpointing: compilation reduces the
# elementwise traffic from 25.5 GB to 6.31 GB, and 215 kernels to 35 plus 16 inside the custom GEMM operators.
COMPILED_TRAFFIC: Final = 6.31 / 25.5
COMPILED_KERNELS: Final = 51 / 215
CONTEXT_BYTES: Final = 500_000_000  # CUDA context and cuBLAS workspaces, an assumption

_BF16: Final = 2  # bytes per bf16 value
_TRAINED_BYTES: Final = 16  # per trained value: the value, its gradient and AdamW's two moments, all in fp32
_OPTIMIZER_BYTES: Final = 40  # traffic per trained value and step: AdamW 28, norm and clipping of gradients 12
_ATTENTION_BACKWARD: Final = 2.5  # relative to forward: recomputed scores and four gradients (FlashAttention)


@dataclass(frozen=True, slots=True)
class Decoder:
    """The shapes of a decoder whose layers are all alike: attention with `query` and `key` features, and one MLP."""

    hidden: int
    intermediate: int
    query: int  # heads times head size
    key: int  # key heads times head size; values have the same number of features
    layers: int
    vocabulary: int
    tied: bool = False  # the output head shares the embedding's weights
    gated: bool = True  # the MLP has gate and up projections

    @classmethod
    def of_config(cls, settings: Any, linear: int | None = None) -> Decoder | None:
        """The shapes from a transformers configuration (of its text model, if it has several models).

        Args:
            settings: a `transformers.PretrainedConfig`.
            linear: the number of weights in the model's linear layers, without the output head. It determines whether
                the MLP is gated; if None, a gated MLP is assumed.

        Returns:
            The shapes, or None if the model is not such a decoder: the configuration lacks an attribute, or the shapes
            do not give `linear` weights (for instance because the model has experts or layers that differ).
        """
        text = settings.get_text_config(decoder=True)
        names = ("hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
        needed: list[Any] = [getattr(text, name, None) for name in names]
        hidden, heads, layers, vocabulary = needed
        if not all(isinstance(value, int) and value > 0 for value in needed):
            return None
        key_heads = getattr(text, "num_key_value_heads", None) or heads
        width = getattr(text, "head_dim", None) or hidden // heads
        intermediate = getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * hidden
        if not all(isinstance(value, int) for value in (key_heads, width, intermediate)):
            return None
        tied = bool(getattr(settings, "tie_word_embeddings", False) or getattr(text, "tie_word_embeddings", False))
        shapes = (hidden, intermediate, heads * width, key_heads * width, layers, vocabulary, tied)
        found = [cls(*shapes, gated=gated) for gated in (True, False)]
        return next((one for one in found if linear in (None, one.linear)), None)

    @property
    def stacks(self) -> tuple[tuple[tuple[int, ...], int], ...]:
        """The linear layers of one decoder layer, grouped by shared input: (`out_features` of each, `in_features`)."""
        mlp = (self.intermediate,) * (2 if self.gated else 1)
        return (
            ((self.query, self.key, self.key), self.hidden),
            ((self.hidden,), self.query),
            (mlp, self.hidden),
            ((self.hidden,), self.intermediate),
        )

    @property
    def linear(self) -> int:
        """Number of weights in all linear layers except the head."""
        return self.layers * sum(sum(outs) * into for outs, into in self.stacks)

    @property
    def others(self) -> int:
        """Number of weights in the embedding and the output head; counted once if the two are tied."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2)


@dataclass(frozen=True, slots=True)
class Step:
    """One optimizer step: micro-batches of `batch` full sequences of `length` tokens."""

    batch: int
    length: int
    rank: int
    checkpointing: bool = False
    micro_batches: int = 1

    @property
    def tokens(self) -> int:
        """Tokens in a micro-batch; all are assumed to be answer tokens, which go through the head."""
        return self.batch * self.length

    @property
    def forwards(self) -> int:
        """Forward passes through the layers per micro-batch: two with activation checkpointing, otherwise one."""
        return 2 if self.checkpointing else 1


@dataclass(frozen=True, slots=True)
class Widths:
    """One coefficient, such as bytes per token and feature, for each kind of width in a decoder layer."""

    hidden: int
    query: int
    key: int
    intermediate: int
    rank: int = 0

    def over(self, shape: Decoder, rank: int) -> int:
        """The total for one token: each coefficient times its width in `shape` (or times the adapter rank), summed."""
        wide = self.hidden * shape.hidden + self.query * shape.query + self.key * shape.key
        return wide + self.intermediate * shape.intermediate + self.rank * rank


@dataclass(frozen=True, slots=True)
class Layers:
    """Counts for one Llama decoder layer: elementwise memory traffic and live memory, bytes per token and feature."""

    forward: Widths  # memory traffic of elementwise kernels in the forward pass
    backward: Widths  # the same in the backward pass
    kernels: tuple[int, int]  # number of kernels other than GEMMs in the forward and the backward pass
    saved: Widths  # activations kept from the forward to the backward pass
    peak: Widths  # peak of live memory in the backward pass


FALQON_LAYERS: Final = Layers(
    Widths(96, 26, 20, 16, 16), Widths(192, 42, 54, 38), (62, 91), Widths(10, 4, 6, 6, 8), Widths(12, 4, 4, 20, 8)
)
LORA_LAYERS: Final = Layers(
    Widths(164, 42, 40, 42), Widths(296, 54, 40, 44), (72, 94), Widths(20, 6, 4, 8, 14), Widths(28, 6, 4, 14, 14)
)
# Counts for the model's own operators only, without FALQON's casts. They give the live memory of compiled layers, as
# compiled casts create no temporary tensors.
MODEL_LAYERS: Final = Layers(
    Widths(84, 20, 20, 10), Widths(198, 32, 32, 18), (30, 52), Widths(10, 4, 4, 6), Widths(12, 4, 4, 12)
)


@dataclass(frozen=True, slots=True)
class Way:
    """The properties of a fine-tuning method that determine its costs.

    Attributes:
        name: display name.
        weight_bytes: bytes per weight of the linear layers.
        counted: elementwise memory traffic and live memory of a decoder layer.
        fp8: GEMMs with the weights run in FP8, and linear layers with the same input are stacked into one (FALQON);
            if False, all GEMMs run in bf16 (LoRA, QLoRA).
        live: B takes part in the forward pass (FALQON only).
        trains_a: A is trained, too (FALQON only; LoRA and QLoRA always train it).
        compiled: decoder layers are compiled, one by one.
        decoded: weights are dequantized to bf16 for each GEMM.
    """

    name: str
    weight_bytes: float
    counted: Layers
    fp8: bool = False
    live: bool = False
    trains_a: bool = False
    compiled: bool = False
    decoded: bool = False


LIVE: Final = Way("falqon, live", 1.0, FALQON_LAYERS, fp8=True, live=True)
LIVE_COMPILED: Final = Way("falqon, live, compiled", 1.0, FALQON_LAYERS, fp8=True, live=True, compiled=True)
BOTH: Final = Way("falqon, live, A and B", 1.0, FALQON_LAYERS, fp8=True, live=True, trains_a=True)
BOTH_COMPILED: Final = Way(
    "falqon, live, A and B, compiled", 1.0, FALQON_LAYERS, fp8=True, live=True, trains_a=True, compiled=True
)
MERGED: Final = Way("falqon, B outside the forward pass", 1.0, FALQON_LAYERS, fp8=True)
MERGED_COMPILED: Final = Way("falqon, B outside, compiled", 1.0, FALQON_LAYERS, fp8=True, compiled=True)
LORA: Final = Way("bf16 LoRA", 2.0, LORA_LAYERS)
# NF4 with double quantization: 4.127 bits per weight (arXiv 2305.14314).
QLORA: Final = Way("QLoRA", 4.127 / 8, LORA_LAYERS, decoded=True)


@dataclass(frozen=True, slots=True)
class Product:
    """A GEMM (rows, inner) x (inner, cols) with bf16 output, executed `times` times per micro-batch."""

    rows: int
    inner: int
    cols: int
    times: int
    fp8: bool = False

    @property
    def operations(self) -> int:
        """Floating-point operations of all `times` executions."""
        return 2 * self.rows * self.inner * self.cols * self.times

    def seconds(self, device: Device) -> float:
        """Seconds for all `times` executions: arithmetic or memory traffic, whichever takes longer."""
        operand = 1 if self.fp8 else _BF16
        moved = operand * self.inner * (self.rows + self.cols) + _BF16 * self.rows * self.cols
        arithmetic = self.operations / ((device.fp8_rate if self.fp8 else device.bf16_rate) * GEMM_SHARE)
        return max(arithmetic, self.times * moved / (device.bandwidth * MEMORY_SHARE))


@dataclass(frozen=True, slots=True)
class Estimate:
    """The estimated time of a step, its parts (all in seconds) and the peak memory; none of it is measured."""

    seconds: float
    products: float
    attention: float
    elementwise: float
    optimizer: float
    host: float  # time in which the host launches the kernels, concurrently with their execution
    memory_bytes: int


def products_of(shape: Decoder, step: Step, way: Way) -> Iterator[Product]:
    """Yield the GEMMs of one micro-batch, forward and backward: first the decoder layers, then the output head."""
    tokens, rank, again, once = step.tokens, step.rank, step.forwards * shape.layers, shape.layers
    beside = rank if way.fp8 else 0  # FALQON stacks the rows of A below those of W in one matrix
    for outs, into in shape.stacks:
        for out in (sum(outs),) if way.fp8 else outs:
            yield Product(tokens, into, out + beside, again, way.fp8)  # Y = X W^T, for FALQON X [W; A]^T
            yield Product(tokens, out, into, once, way.fp8)  # dX = G W
            yield Product(out, tokens, rank, once)  # dB = G^T O
            if not way.fp8:
                yield Product(tokens, into, rank, again)  # O = X A^T
            if not way.fp8 or way.trains_a:
                yield Product(rank, tokens, into, once)  # dA
            if not way.fp8 or way.live:
                yield Product(tokens, rank, out, again)  # O B^T
                yield Product(tokens, out, rank, once)  # G B
                yield Product(tokens, rank, into, once)  # (G B) A
    yield Product(tokens, shape.hidden, shape.vocabulary, 1)
    yield Product(tokens, shape.vocabulary, shape.hidden, 1)


def trained_values(shape: Decoder, rank: int, way: Way) -> int:
    """Number of adapter values that the optimizer updates: those of B, and of A where it is trained."""
    a = [0 if way.fp8 and not way.trains_a else into if way.fp8 else len(outs) * into for outs, into in shape.stacks]
    return shape.layers * rank * sum(sum(outs) + width for (outs, _), width in zip(shape.stacks, a, strict=True))


def estimate(shape: Decoder, step: Step, way: Way, device: Device) -> Estimate:
    """Estimate time and peak memory of one optimizer step on one GPU."""
    listed = list(products_of(shape, step, way))
    bandwidth = device.bandwidth * MEMORY_SHARE
    products = sum(product.seconds(device) for product in listed)
    # FLOP of a forward pass, without the saving from the causal mask: attention kernels are less efficient than GEMMs.
    scores = 4 * step.tokens * step.length * shape.query * shape.layers
    attention = scores * (step.forwards + _ATTENTION_BACKWARD) / (device.bf16_rate * GEMM_SHARE)
    elementwise = _moved(shape, step, way) / bandwidth
    optimizer = _OPTIMIZER_BYTES * trained_values(shape, step.rank, way) / bandwidth
    forward, backward = way.counted.kernels
    kernels = shape.layers * (step.forwards * forward + backward) * (COMPILED_KERNELS if way.compiled else 1)
    host = step.micro_batches * (kernels + sum(product.times for product in listed)) * LAUNCH_SECONDS
    products, attention, elementwise = (step.micro_batches * part for part in (products, attention, elementwise))
    seconds = max(products + attention + elementwise + optimizer, host)
    return Estimate(seconds, products, attention, elementwise, optimizer, host, memory_bytes(shape, step, way))


def _moved(shape: Decoder, step: Step, way: Way) -> float:
    """Memory traffic of a micro-batch outside GEMMs and attention, in bytes."""
    counted, rank = way.counted, step.rank
    layer = step.forwards * counted.forward.over(shape, rank) + counted.backward.over(shape, rank)
    moved = step.tokens * shape.layers * layer * (COMPILED_TRAFFIC if way.compiled else 1)
    if way.trains_a:  # the codes of X are decoded for dA
        moved += (1 + _BF16) * step.tokens * shape.layers * sum(into for _, into in shape.stacks)
    if way.fp8:
        return moved + 2 * shape.linear  # reads and writes the 1-byte codes once, to transpose them for dX
    return moved + ((way.weight_bytes + _BF16) * (step.forwards + 1) * shape.linear if way.decoded else 0)


def static_bytes(shape: Decoder, rank: int, way: Way) -> int:
    """GPU memory that is in use throughout training, in bytes: weights, adapter, gradients and optimizer moments."""
    below = shape.layers * rank * sum(into for _, into in shape.stacks) if way.fp8 else 0  # codes of FALQON's A
    weights = int(shape.linear * way.weight_bytes) + below + shape.others * _BF16
    return weights + _TRAINED_BYTES * trained_values(shape, rank, way)


def memory_bytes(shape: Decoder, step: Step, way: Way) -> int:
    """Peak GPU memory of a step, in bytes; it occurs in the backward pass of the last layer or in the output head."""
    counted = MODEL_LAYERS if way.compiled else way.counted
    saved, peak = (step.tokens * widths.over(shape, step.rank) for widths in (counted.saved, counted.peak))
    if way.trains_a:  # the codes of X, which every stack of layers saves; and in bf16 for dA, one after the other
        inputs = [into for _, into in shape.stacks]
        saved += step.tokens * sum(inputs)
        peak += step.tokens * (sum(inputs) + _BF16 * max(inputs))
    boundary = _BF16 * step.tokens * shape.hidden
    kept = boundary if step.checkpointing else saved
    copies = 0  # temporary copies of weights: transposed codes, dequantized NF4
    if way.fp8:
        copies = max(sum(outs) * into for outs, into in shape.stacks)
    elif way.decoded:
        copies = _BF16 * max(max(outs) * into for outs, into in shape.stacks)
    head = 2 * _BF16 * step.tokens * shape.vocabulary  # logits and their gradient
    last = peak if step.checkpointing else peak - saved
    return (
        static_bytes(shape, step.rank, way) + shape.layers * kept + max(last + copies + boundary, head) + CONTEXT_BYTES
    )
