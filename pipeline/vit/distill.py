"""Distillation: train the student to reproduce its teacher's outputs and attention outputs on calibration images.

The outputs of the models are compared by the temperature-softened KL divergence (arXiv 1503.02531), and the outputs of
attention heads (softmax probabilities times values) by MimiQ's head-wise structural loss (arXiv 2407.20021, section 4):
for each head and channel, the contrast-and-structure part of SSIM over the patch tokens. It penalizes a wrong pattern
over the tokens, but not a constant shift. The outputs of transformer blocks are compared by their relative squared
error, which does: it gives every block a nearby target, where outputs only constrain a few numbers per image.

Learning rates of weights, and of biases, norms and embeddings, are in units of the mean code step: the coarser the
codes, the more there is to correct. That of biases is a hundred times larger. With such a rate, weights would change
more codes than a few hundred steps can correct; with the rate of weights, biases would hardly move.

Teacher and student get the same augmented images (`augment`), as synthetic images have more fine detail and stronger
colours than photographs: ranges and weights trained on unchanged ones would suit photographs poorly. MimiQ also blurs,
jitters and mirrors.

Training runs on the student's device. Images stay on the host, and a step does not synchronize with a GPU: losses are
read together every few steps, so on a GPU a diverging run is stopped a few steps late.

The images of a step and their augmentation depend only on the seed and the step number, so a run that is killed and
resumed is bit-identical to an uninterrupted run. The model after the last step is reported and deployed: selecting the
best step would need labelled data.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from fp8pipe.core.devices import to_device
from fp8pipe.core.errors import ConfigurationError
from fp8pipe.core.plan import enter_phase
from fp8pipe.models.vision.attention import intercept_attention
from fp8pipe.models.vision.prepare import vision_outputs
from fp8pipe.models.vision.sources import VisionModel
from fp8pipe.models.vision.structure import VitStructure
from pipeline.finetune.checkpoint import CheckpointStore, optimizer_tensors, restore_optimizer
from pipeline.finetune.config import Schedule, learning_rate_at
from pipeline.vit.augment import augment
from pipeline.vit.config import DistillConfig
from pipeline.vit.losses import block_distance, head_structure, output_distance
from pipeline.vit.student import Student

_LOG = logging.getLogger(__name__)
Figures = dict[str, float]
_FIGURES: Final = ("loss", "answer", "structure", "block")
_READ_EVERY: Final = 10  # number of steps whose losses are read together on a GPU
_ORDER, _AUGMENTATION = 0, 1  # combined with the seed to get independent random streams


class Distiller:
    """Trains a student to reproduce the outputs of its teacher.

    Args:
        student: the student; trained in place.
        teacher: the float model.
        structure: the structure of both models.
        pixels: normalized calibration images `(N, 3, H, W)` fp32, on the host.
        config: options such as steps, learning rates and loss weights.
        seed: seed of image order and augmentation.
        store: the store of checkpoints; None to write none.
    """

    def __init__(
        self,
        student: Student,
        teacher: VisionModel,
        structure: VitStructure,
        pixels: Tensor,
        config: DistillConfig,
        seed: int,
        store: CheckpointStore | None = None,
    ) -> None:
        self.student, self.teacher, self.structure = student, teacher, structure
        self.pixels, self.config, self.seed, self.store = pixels, config, seed, store
        self.device = next(student.parameters()).device
        self.names = {p: n for n, p in student.named_parameters() if p.requires_grad}
        unit = student.mean_step()
        groups = [
            {"params": student.trained_weights(), "peak": config.learning_rate * unit},
            {"params": student.trained_vectors(), "peak": config.vector_learning_rate * unit},
            {"params": student.trained_steps(), "peak": config.step_learning_rate},
        ]
        on_gpu = self.device.type == "cuda"
        how: dict[str, Any] = {"fused": True} if on_gpu else {"foreach": True}
        self.optimizer = torch.optim.Adam(groups, lr=config.learning_rate, betas=(0.9, 0.999), **how)
        self.read_every = _READ_EVERY if on_gpu else 1  # number of steps whose losses are read together
        self.step = 0
        self.history: list[Figures] = []
        self._prefix = {site.name: site.prefix_tokens for site in structure.attentions if not site.pools}
        self._blocks = block_names(self._prefix) if config.block_weight else ()

    def run(self, on_step: Callable[[Figures], None] = lambda figures: None) -> list[Figures]:
        """Train from the current step to the last.

        Args:
            on_step: called with the metrics of every step; on a GPU for several steps at a time.

        Returns:
            The metrics of every step from the first on: `step`, `loss` and its terms `answer` (outputs),
            `structure` (attention outputs) and `block` (block outputs; 0 if its weight is).

        Raises:
            ConfigurationError: the loss became NaN or infinite; the last checkpoint is kept.
        """
        unread: list[Tensor] = []
        while self.step < self.config.steps:
            unread.append(self.one_step())
            due = self.config.save_every and self.step % self.config.save_every == 0
            last = self.step == self.config.steps
            if due or last or len(unread) == self.read_every:
                for figures in self._read(unread):
                    self.history.append(figures)
                    on_step(figures)
                unread = []
            if self.store is not None and (due or last):
                self.save(self.store)
        return self.history

    def _read(self, unread: list[Tensor]) -> Iterator[Figures]:
        """Yield the metrics of the last steps; raises ConfigurationError if a loss is NaN or infinite."""
        first = self.step - len(unread) + 1
        for step, values in enumerate(torch.stack(unread).tolist(), first):
            figures = {"step": step, **dict(zip(_FIGURES, values, strict=True))}
            if not math.isfinite(figures["loss"]):
                kept = self.store.steps() if self.store is not None else []
                raise ConfigurationError(
                    f"distillation diverged at step {step}",
                    why=f"loss {figures['loss']}; "
                    + (f"the checkpoint of step {kept[-1]} is kept" if kept else "no checkpoint yet"),
                    fix="lower --learning-rate and start anew",
                )
            yield figures

    def one_step(self) -> Tensor:
        """Run one optimizer step.

        Returns:
            The loss, its output term and its (unweighted) structure and block terms: `(4,)` fp32, on the device.
        """
        enter_phase("step")
        config = self.config
        factor = learning_rate_at(
            self.step, peak=1.0, steps=config.steps, warmup=config.warmup_steps, schedule=Schedule.COSINE
        )
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        pixels = self._batch()
        answers, maps, blocks = self._teach(pixels)
        found: dict[str, Tensor] = {}
        ours: dict[str, Tensor] = {}
        self.student.on_attention = found.__setitem__
        with self._autocast(), _watch(self.student.model, self._blocks, ours):
            outputs = self.student(pixels)
        self.student.on_attention = None
        answer = self._distance(outputs, answers)
        parts = [head_structure(found[name], maps[name], prefix) for name, prefix in self._prefix.items()]
        structure = torch.stack(parts).mean() if parts else answer.new_zeros(())
        parts = [block_distance(ours[name], blocks[name]) for name in ours]
        block = torch.stack(parts).mean() if parts else answer.new_zeros(())
        loss = answer + config.structure_weight * structure + config.block_weight * block
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(self.names), config.clip_norm, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return torch.stack([loss.detach(), answer.detach(), structure.detach(), block.detach()])

    def _distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        activation = self.teacher.architecture.activation
        return output_distance(student, teacher, activation, self.structure.is_backbone, self.config.temperature)

    @torch.no_grad()
    def _teach(self, pixels: Tensor) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """The teacher's outputs, the output `(B, H, N, d)` of every attention, and that of every block, by name."""
        maps: dict[str, Tensor] = {}
        blocks: dict[str, Tensor] = {}
        fused = functional.scaled_dot_product_attention

        def keep(name: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
            maps[name] = fused(q, k, v, attn_mask=mask, scale=scale)
            return maps[name]

        names = self.structure.attention_names
        model = self.teacher.model
        with self._autocast(), intercept_attention(model, names, keep), _watch(model, self._blocks, blocks):
            return vision_outputs(model, pixels), maps, blocks

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.bf16)

    def _batch(self) -> Tensor:
        """The images of this step, each with its own augmentation."""
        generator = torch.Generator().manual_seed(hash((self.seed, self.step, _AUGMENTATION)) & 0x7FFFFFFF)
        count, size = self.pixels.shape[0], min(self.config.batch_size, self.pixels.shape[0])
        epoch, within = divmod(self.step * size, count)
        order = torch.cat([_order(self.seed, epoch, count), _order(self.seed, epoch + 1, count)])
        chosen = to_device(self.pixels[order[within : within + size]], self.device)
        return augment(chosen, generator, self.config) if self.config.augment else chosen

    def save(self, store: CheckpointStore) -> None:
        """Write a checkpoint of the current step."""
        enter_phase("save")
        tensors = {f"student/{n}": p.detach() for p, n in self.names.items()}
        store.save(self.step, tensors | optimizer_tensors(self.optimizer, self.names), {"history": self.history})

    def resume(self) -> bool:
        """Restore the newest checkpoint; returns False if there is none."""
        if self.store is None or not (steps := self.store.steps()):
            return False
        tensors, state = self.store.load(steps[-1])
        with torch.no_grad():
            for parameter, name in self.names.items():
                parameter.copy_(tensors[f"student/{name}"])
        restore_optimizer(self.optimizer, self.names, tensors)
        self.step, self.history = int(state["step"]), list(state["history"])
        return True


def _order(seed: int, epoch: int, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(hash((seed, epoch, _ORDER)) & 0x7FFFFFFF)
    return torch.randperm(count, generator=generator)


def block_names(attentions: Iterable[str]) -> tuple[str, ...]:
    """The numbered modules (transformer blocks) that contain these attentions, innermost ones, in the same order.

    An attention outside of a numbered module has none.
    """
    found: dict[str, None] = {}
    for name in attentions:
        parts = name.split(".")
        numbered = [index for index, part in enumerate(parts) if part.isdigit()]
        if numbered:
            found[".".join(parts[: numbered[-1] + 1])] = None
    return tuple(found)


def _watch(model: nn.Module, names: Iterable[str], found: dict[str, Tensor]) -> ExitStack:
    """A context in which the outputs of these modules are put into `found`; transformers' blocks return tuples."""

    def keep(name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        found[name] = output if isinstance(output, Tensor) else output[0]

    hooks = ExitStack()
    for name in names:
        hooks.enter_context(model.get_submodule(name).register_forward_hook(partial(keep, name)))
    return hooks
