"""Estimates the memory of each phase of a fine-tuning run from its shapes.

Counted is what must be in memory: what the run allocates. Weights that are mapped from files are not part of it,
because the system drops them when memory is short; `mapped_bytes` states them separately.

Each term is what the code of that phase holds at the same time, for the largest layer where layers come one after the
other. `docs/planning.md` compares the sums with real runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from pipeline.dry_run.workload import Group, Workload
from pipeline.falqon.base_files import SHARD_BYTES
from pipeline.falqon.final_merge import held_moments, merge_groups

_FP32: Final = 4  # bytes
_STATES: Final = 4 * _FP32  # per trained value: itself, its gradient, AdamW's two moments
_NF4: Final = 4.127 / 8  # bytes per weight, with double quantization (arXiv 2305.14314)
_PACKED: Final = 0.5  # without the scales
_BF16: Final = 2
_NVFP4: Final = 9 / 16  # bytes per weight, with block scales
_SPILLED: Final = 1 << 28  # merged weights of LoRA in memory until they are written
_LOSS_CHUNKS: Final = 3 * (1 << 25)  # copies of a chunk of fp32 logits in the loss
_SKETCH: Final = 3  # columns of the gradient's sketch, in units of the rank
# Bytes per weight of the largest layer while it is converted: stacked in bf16 (2), its error in fp32 (4), the codes and
# a block in fp32 (2); a full SVD also holds a copy and both factors.
_CONVERSION, _SVD = 8, 12
# Compensated rounding: H in fp32, reordered, then in fp64 with its factor and its inverse, per input squared; and
# target, work, result and their transposed copies in fp32, per weight.
_SOLVER, _ROUNDED = 4 + 3 * 8, 6 * _FP32
_GATHERED: Final = 3  # decoder layers: one that is used, the next one, and the buffer that it is received in
_MERGE: Final = 3 * _FP32  # LoRA: a layer's weight, its change and their sum


def phase_bytes(work: Workload) -> Mapping[str, int]:
    """Peak bytes that each phase allocates, in addition to the packages and the text that are in memory before it."""
    largest = max(work.groups, key=lambda group: group.weights)
    if work.processes > 1:
        return _shared_phases(work, largest) if work.method == "falqon" else _shared_baseline(work, head=_head(work))
    base, head = _base(work, work.flushes), _head(work)
    # The codes change, or the layers in NVFP4 are beside them.
    merged = base + int(_NVFP4 * work.weights) if work.packed else _base(work, True)
    optimizer = (_STATES - _FP32) * work.trained  # without gradients
    moments = held_moments([group.width for group in work.groups]) if work.compensated else 0
    return {
        "prepare": _prepare(work, largest, head),
        "step": base + _STATES * work.trained + _pass(work, head),
        "final merge": optimizer + moments + max(_merge(work, merged), merged + work.tower),
        "write": optimizer + (merged if work.method == "falqon" else work.itemsize * work.weights) + work.shard,
    }


def _shared_phases(work: Workload, largest: Group) -> Mapping[str, int]:
    """`phase_bytes` of FALQON in the main one of several processes, which holds the most; codes are mapped until they
    are shared.

    The final merge first sends the inputs of a group of layers to the processes that will round them, and then rounds.
    """
    from pipeline.finetune.distributed.moments import TOGETHER  # not in a plan for one process, whose memory it takes

    held, head = shares(work), _head(work)
    static, gathered = held["sharded_weights_bytes"], held["gathered_bytes"]
    layers = [group.width for group in work.groups]
    optimizer = held["sharded_adapter_bytes"] - _FP32 * work.trained // work.shards
    moments = held_moments(layers, work.processes) if work.compensated else 0
    inputs = max(sum(work.groups[place].share * layers[place] for place in each) for each in merge_groups(layers))
    sent = 2 * sum(sorted((group.share * group.width for group in work.groups), reverse=True)[:TOGETHER])
    collected = gathered + int(work.itemsize * work.tokens * (inputs + sent)) if work.compensated else 0
    owned = max(sum(_codes_and_b(work, work.groups[place]) for place in each) for each in merge_groups(layers))
    rounded = max(owned // work.processes, _codes_and_b(work, largest)) + _merge(work, 0)
    adapter = work.codes - work.weights + _FP32 * work.trained
    spilled = min(SHARD_BYTES, work.codes) + 2 * _codes_and_b(work, largest)
    return {
        "prepare": _prepare(replace(work, filed=True), largest, head),
        "step": static + held["sharded_adapter_bytes"] + gathered + _pass(work, head),
        "final merge": static + optimizer + moments + max(collected, rounded, work.tower),
        "write": static + optimizer + adapter + max(spilled, work.shard),
    }


def _shared_baseline(work: Workload, head: int) -> Mapping[str, int]:
    """`phase_bytes` of LoRA and QLoRA in the main one of several processes.

    Merged weights are not kept: a forward pass merges each layer for itself, and the artifact collects one after the
    other, in files.
    """
    held = shares(work)
    packed = int(_PACKED * work.weights) if work.method == "qlora" and not work.packed_on_host else 0
    scales = _block_scales(work)
    static, gathered = held["sharded_weights_bytes"], held["gathered_bytes"]
    largest = max(max(group.outs) * group.width for group in work.groups)
    optimizer = held["sharded_adapter_bytes"] - _FP32 * work.trained // work.shards
    merged = (_MERGE + work.itemsize) * largest
    spilled = min(_SPILLED, _BF16 * work.weights) + gathered // work.layers + merged
    return {
        "prepare": _loaded(work) + packed + scales + _FP32 * work.trained,
        "step": static + held["sharded_adapter_bytes"] + gathered + _pass(work, head),
        "final merge": static + optimizer + gathered + merged,
        "write": static + optimizer + max(spilled, work.shard),
    }


def _frozen(work: Workload) -> int:
    """Bytes of what is frozen in the trained layers: codes, NF4 or plain weights."""
    if work.method == "falqon":
        return work.codes
    return int(_PACKED * work.weights) if work.method == "qlora" else work.itemsize * work.weights


def _block_scales(work: Workload) -> int:
    return int((_NF4 - _PACKED) * work.weights) if work.method == "qlora" else 0


def _codes_and_b(work: Workload, group: Group) -> int:
    return group.weights + work.rank * (group.width + _FP32 * group.rows)  # a trained A stays sharded


def static_bytes(work: Workload) -> int:
    """Bytes of all parameters, gradients and moments, on however many devices they are."""
    return _frozen(work) + work.others + _STATES * work.trained


def shares(work: Workload) -> Mapping[str, int]:
    """What one of several processes holds during training, beside its micro-batch, in bytes by name.

    `sharded_weights_bytes` is its part of codes (or NF4, or plain weights), embeddings, norms and output head, and for
    NF4 all block scales, which are not sharded; `sharded_adapter_bytes` its part of what is trained, the gradient and
    the moments, and `gathered_bytes` what it gets from others for a while: embeddings, norms and
    head for a whole pass, and decoder layers one after the other. Before the model is converted, it holds
    `loaded_bytes`, the base model for the packing test, unless that is mapped or streamed.
    """
    layer = (_frozen(work) + _FP32 * work.trained) // work.layers
    owners = work.shards if work.moments == 2 * _FP32 else work.processes  # 8-bit moments have no replicas
    return {
        "sharded_weights_bytes": (_frozen(work) + work.others) // work.shards + _block_scales(work),
        "sharded_adapter_bytes": 2 * _FP32 * work.trained // work.shards + work.moments * work.trained // owners,
        "gathered_bytes": work.others + _GATHERED * layer,
        "loaded_bytes": _loaded(work),
    }


def mapped_bytes(work: Workload) -> int:
    """Bytes of files that stay mapped: in memory as long as nothing else needs it."""
    return (sum(work.stored) if work.mapped else 0) + (work.codes if work.filed else 0)


def _base(work: Workload, changed: bool) -> int:
    """The weights while the adapter is trained; codes that are mapped from files are copied once they are changed."""
    others = 0 if work.mapped else work.others
    if work.method == "falqon":
        return others + (work.codes if changed or not work.filed else 0)
    if work.method == "qlora":
        return int(_NF4 * work.weights) + others
    return others + (0 if work.mapped else work.itemsize * work.weights)


def activation_bytes(work: Workload) -> int:
    """What the forward pass keeps for the backward pass, without the output head."""
    rank = work.rank * work.itemsize * work.tokens * sum(group.share for group in work.groups)
    inputs = 0.0
    if work.method != "falqon":  # peft casts and keeps each layer's input
        inputs = work.itemsize * work.tokens * sum(g.share * len(g.outs) * g.width for g in work.groups)
    elif work.trains_a:  # rounded to FP8, but in the dtype of activations on a CPU
        inputs = work.itemsize * work.tokens * sum(g.share * g.width for g in work.groups)
    whole = work.layers * work.saved + int(rank + inputs)
    if not work.checkpointing:
        return whole
    return work.layers * work.tokens * work.hidden * work.itemsize + whole // work.layers


def _pass(work: Workload, head: int) -> int:
    """Forward and backward pass of the decoder, or before it the vision tower, which keeps nothing but its features."""
    return max(activation_bytes(work) + max(head, _layer(work)), work.tower)


def _head(work: Workload) -> int:
    """Logits and their gradient, and the fp32 chunks of the loss."""
    logits = work.answers * work.vocabulary
    return 2 * work.itemsize * logits + min(_LOSS_CHUNKS, 3 * _FP32 * logits)


def _layer(work: Workload) -> int:
    """The largest product in the backward pass: decoded weights, gradients, casts; of one layer, or of all experts."""
    return max(
        work.itemsize
        * g.together
        * (g.weights + work.rank * g.width + int(work.tokens * g.share) * (2 * g.rows + g.width))
        for g in work.groups
    )


def _stack(work: Workload) -> int:
    """Codes and B of the largest projection of all experts, beside those of its layers, of which they are copies."""
    stacks = [g for g in work.groups if g.together > 1]
    return max((g.together * (g.weights + work.rank * (g.width + _FP32 * g.rows)) for g in stacks), default=0)


def _loaded(work: Workload) -> int:
    """The model as it is loaded, without what is mapped from files or on the host."""
    elsewhere = work.mapped or work.streamed
    return (0 if work.mapped else work.others) + (0 if elsewhere else work.itemsize * work.weights)


def _prepare(work: Workload, largest: Group, head: int) -> int:
    """Gradients of the unconverted model, layer by layer; then its conversion, layer by layer."""
    elsewhere, loaded = work.mapped or work.streamed, _loaded(work)
    if work.method != "falqon":
        return loaded + (_base(work, False) if work.method == "qlora" else 0) + _FP32 * work.trained
    inputs = work.layers * work.tokens * work.hidden * work.itemsize
    observed = 2 * work.saved + head + inputs if work.gradients else 0
    observed += work.itemsize * largest.weights if work.streamed else 0
    per_weight = _CONVERSION if work.gradients else _CONVERSION + _SVD
    result = _base(work, False) + _FP32 * work.trained
    converted = result + work.directions + per_weight * largest.weights
    converted += min(SHARD_BYTES, work.codes) if work.filed else 0
    converted = converted if elsewhere else loaded + converted // 2
    seen = max(observed, work.tower if work.gradients else 0)
    return max(loaded + seen + work.directions, converted, result + _stack(work))


def _merge(work: Workload, base: int) -> int:
    if work.method != "falqon":
        largest = max(max(group.outs) * group.width for group in work.groups)
        base += work.itemsize * work.weights
        if not work.packed:
            return base + _MERGE * largest
    if not work.compensated:
        return base + _ROUNDED * max(group.weights for group in work.groups)
    solver = max(max(_SOLVER * g.width**2, 8 * g.width**2 + _ROUNDED * g.weights) for g in work.groups)
    return base + solver


def sums_bytes(work: Workload) -> int:
    """Bytes of the temporary file of the gradient initialisation (`pipeline.falqon.sums`)."""
    if not work.gradients:
        return 0
    columns = _SKETCH * work.rank
    inputs = sum((len(g.outs) + 1) * g.width * min(columns, g.width) for g in work.groups)
    return _FP32 * (inputs + sum(g.rows * min(columns, g.width) for g in work.groups))
