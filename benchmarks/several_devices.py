"""The cost model of a step on several GPUs, on paper: when sharding fits a model, and what the links cost.

    python benchmarks/several_devices.py

For each model, number of GPUs and kind of links: memory per GPU, seconds per step, and the share of one GPU's speed
that is left per GPU. The time of a micro-batch is that of `pipeline.dry_run.costs`, on one GPU. To it come the bytes
that `docs/distributed.md` counts: parameters are gathered for each forward and each backward pass, gradients of B are
sent after it. Inside a node they go over its own links, at the rate of the data sheet; between nodes over its network,
which all GPUs of a node share. Transfers overlap with computing, but for the first layer's. No GPU has confirmed this.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pipeline.dry_run.costs import (
    LIVE_COMPILED,
    LORA,
    Decoder,
    Step,
    Way,
    estimate,
    memory_bytes,
    static_bytes,
    trained_values,
)
from pipeline.dry_run.devices import DEVICES, Device

TOKENS, LENGTH, RANK, STEP_TOKENS = 8192, 512, 64, 64 * 8192  # per micro-batch, per sequence; of a step
NODE = 8  # GPUs
REPLICA_SHARE = 0.5  # of a GPU's memory, at most, for its part of a replica (`pipeline.finetune.distributed.machines`)
LINK_SHARE = 0.8  # part of a data sheet's rate that large transfers reach: an assumption


@dataclass(frozen=True)
class Links:
    """Links of a node of eight GPUs, in bytes/s per direction."""

    name: str
    device: str  # the GPU they connect, by its name in `DEVICES`
    inside: float  # of one GPU to the others of its node
    between: float  # of a node to the others


@dataclass(frozen=True)
class Model:
    """A model; `idle` weights, of experts that a token does not use, are held and gathered, but not computed with."""

    name: str
    shape: Decoder
    idle: int = 0


# NVLink 4: 450 GB/s per direction (H100 data sheet). PCIe 4 x16: 32 GB/s. Networks: 400 Gbit/s per GPU, 100 per node.
LINKS = (
    Links("H100, NVLink, InfiniBand", "H100 SXM", 450e9, 8 * 50e9),
    Links("H100, NVLink, Ethernet 100", "H100 SXM", 450e9, 12.5e9),
    Links("RTX 4090, PCIe, Ethernet 100", "RTX 4090", 32e9, 12.5e9),
)
MODELS = (
    Model("LLaMA-7B", Decoder(4096, 11008, 4096, 4096, 32, 32000)),
    Model("LLaMA-13B", Decoder(5120, 13824, 5120, 5120, 40, 32000)),
    Model("Llama-3-70B", Decoder(8192, 28672, 8192, 1024, 80, 128256)),
    # Llama-4-Maverick's sizes: 17 of 400 billion weights per token (a router's choice of 128 experts and a shared one).
    Model("MoE, 400B, 17B per token", Decoder(5120, 16384, 5120, 1024, 48, 202048), idle=383 * 10**9),
)
COUNTS = (1, 2, 4, 8, 16, 64)


def gathered_bytes(model: Model, way: Way) -> float:
    """Bytes of the parameters of all decoder layers: weights and the adapter in fp32."""
    values = 4 * trained_values(model.shape, RANK, way)
    return (model.shape.linear + model.idle) * way.weight_bytes + values


def static(model: Model, way: Way) -> float:
    """Bytes of all weights, gradients and moments."""
    return static_bytes(model.shape, RANK, way) + model.idle * way.weight_bytes


def shard_group(model: Model, way: Way, device: Device, count: int) -> int:
    """The number of GPUs among which the weights are divided: those of a node, if they fit, else all."""
    held = static(model, way) / NODE + _gathered(model, way)
    fits = held <= REPLICA_SHARE * device.memory_bytes
    return NODE if count > NODE and fits else count


def _gathered(model: Model, way: Way) -> float:
    """Bytes that each GPU holds whole for a while: embeddings and head, and two decoder layers."""
    return model.shape.others * 2 + 2 * gathered_bytes(model, way) / model.shape.layers


def memory_per_gpu(model: Model, way: Way, count: int) -> float:
    """Peak bytes on each of `count` GPUs among which the weights are divided.

    Shares of what is sharded, whole what is not, two gathered layers, activations.
    """
    step = Step(TOKENS // LENGTH, LENGTH, RANK, checkpointing=True)
    rest = memory_bytes(model.shape, step, way) - static_bytes(model.shape, RANK, way)
    if count == 1:
        return static(model, way) + rest
    return static(model, way) / count + _gathered(model, way) + rest


def transfer_seconds(received: float, links: Links, count: int) -> float:
    """Seconds in which every GPU receives this many bytes that are spread evenly over all."""
    nodes = math.ceil(count / NODE)
    inside = received * (count - 1) / count / (links.inside * LINK_SHARE)
    between = received * (nodes - 1) / nodes / (links.between * LINK_SHARE)
    return max(inside, between)


def step_seconds(model: Model, way: Way, device: Device, links: Links, count: int) -> float:
    """Seconds of an optimizer step of `STEP_TOKENS` tokens on `count` GPUs."""
    rounds = math.ceil(STEP_TOKENS / TOKENS / count)
    step = Step(TOKENS // LENGTH, LENGTH, RANK, checkpointing=True)
    found = estimate(model.shape, step, way, device)
    compute = found.seconds - found.optimizer
    if count == 1:
        return rounds * compute + found.optimizer
    weights = gathered_bytes(model, way)
    gradients = 4 * trained_values(model.shape, RANK, way)
    size = shard_group(model, way, device, count)
    moved = transfer_seconds(2 * weights + gradients, links, size)
    if size < count:  # sums go from node to node, and from the last one to all
        moved = max(moved, count // size * gradients / (links.between * LINK_SHARE))
    first = transfer_seconds(weights / model.shape.layers, links, size)
    norm = transfer_seconds(gradients, links, size)  # whole gradients are gathered once, to sum them in order
    return rounds * (max(compute, moved) + first) + norm + found.optimizer / size


def device_of(links: Links) -> Device:
    """The GPU that these links connect."""
    return next(one for one in DEVICES if one.name == links.device)


def _memory(model: Model, way: Way, links: Links, count: int) -> float:
    return memory_per_gpu(model, way, shard_group(model, way, device_of(links), count))


def main() -> None:
    """Print one table per model."""
    for model in MODELS:
        print(f"\n{model.name}: GB per GPU; seconds per step of {STEP_TOKENS} tokens (efficiency)\n")
        heads = [f"{links.name}, {name}" for links in LINKS for name in ("FP8", "bf16 LoRA")]
        print("| GPUs | " + " | ".join(["GB, FP8", "GB, bf16 LoRA", *heads]) + " |")
        print("|---" * (3 + len(heads)) + "|")
        for count in COUNTS:
            cells = [f"{_memory(model, way, LINKS[0], count) / 1e9:.1f}" for way in (LIVE_COMPILED, LORA)]
            for links in LINKS:
                device = device_of(links)
                for way in (LIVE_COMPILED, LORA):
                    seconds = step_seconds(model, way, device, links, count)
                    alone = step_seconds(model, way, device, links, 1)
                    fits = _memory(model, way, links, count) <= device.memory_bytes
                    cells.append(f"{seconds:.1f} ({alone / seconds / count:.0%})" if fits else "does not fit")
            print(f"| {count} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
