"""Distillation: the student learns its teacher's answers and head outputs on calibration images.

The answers are compared by the temperature-softened KL divergence (arXiv 1503.02531), the head outputs by MimiQ's
head-wise structural loss (arXiv 2407.20021, section 4): for each head and channel of attn.v, the contrast-and-structure
part of SSIM over the patch tokens. A constant shift costs nothing, a wrong pattern does.

Both see the same augmented images. Few images are seen many times each. Mirrored and cropped they stay new; blurred and
relit they also cover what their maker left out: synthetic images have more fine detail and stronger colours than
pictures do, and ranges and weights learned on those alone fit pictures badly. MimiQ blurs, jitters and mirrors too.

Which images a step takes and how they are changed follows from the seed and the step alone, so a run killed and resumed
ends with the same bits as one left alone. The last step is what is reported and deployed: choosing the best one by
labelled data would not be data-free.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from calibration.views import resample
from fp8pipe.core.errors import ConfigurationError
from fp8pipe.core.plan import enter_phase
from fp8pipe.models.vision.answers import ranks
from fp8pipe.models.vision.attention import intercept_attention
from fp8pipe.models.vision.prepare import vision_outputs
from fp8pipe.models.vision.sources import VisionModel
from fp8pipe.models.vision.structure import VitStructure
from pipeline.finetune.checkpoint import CheckpointStore, optimizer_tensors, restore_optimizer
from pipeline.finetune.config import Schedule, learning_rate_at
from pipeline.vit.config import DistillConfig
from pipeline.vit.student import Student

_LOG = logging.getLogger(__name__)
Figures = dict[str, float]
_ORDER, _AUGMENTATION = 0, 1  # streams of the seed
_C2 = 0.03**2  # SSIM's second constant


class Distiller:
    """Trains a student.

    Args:
        student: changed in place.
        teacher: the float model.
        structure: of both.
        pixels: normalized calibration images `(N, 3, H, W)` fp32.
        config: steps, rates, weights of the losses.
        seed: of the order of images and of augmentation.
        store: where checkpoints go; None keeps none.
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
        self.names = {p: n for n, p in student.named_parameters() if p.requires_grad}
        groups = [
            {"params": student.trained_weights(), "peak": config.learning_rate * student.mean_step()},
            {"params": student.trained_steps(), "peak": config.step_learning_rate},
        ]
        self.optimizer = torch.optim.Adam(groups, lr=config.learning_rate, betas=(0.9, 0.999), foreach=True)
        self.step = 0
        self.history: list[Figures] = []
        self._prefix = {site.name: site.prefix_tokens for site in structure.attentions if not site.pools}

    def run(self, on_step: Callable[[Figures], None] = lambda figures: None) -> list[Figures]:
        """Train to the last step; returns the figures of every step.

        Raises:
            ConfigurationError: the loss stopped being finite; the last checkpoint remains.
        """
        while self.step < self.config.steps:
            figures = self._one_step()
            self.history.append(figures)
            on_step(figures)
            due = self.config.save_every and self.step % self.config.save_every == 0
            if self.store is not None and (due or self.step == self.config.steps):
                self.save(self.store)
        return self.history

    def _one_step(self) -> Figures:
        enter_phase("step")
        config = self.config
        factor = learning_rate_at(
            self.step, peak=1.0, steps=config.steps, warmup=config.warmup_steps, schedule=Schedule.COSINE
        )
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        pixels = self._batch()
        answers, maps = self._teach(pixels)
        found: dict[str, Tensor] = {}
        self.student.on_attention = found.__setitem__
        with self._autocast():
            outputs = self.student(pixels)
        self.student.on_attention = None
        answer = self._distance(outputs, answers)
        parts = [head_structure(found[name], maps[name], prefix) for name, prefix in self._prefix.items()]
        structure = torch.stack(parts).mean() if parts else answer.new_zeros(())
        loss = answer + config.structure_weight * structure
        if not math.isfinite(float(loss.detach())):
            kept = self.store.steps() if self.store is not None else []
            raise ConfigurationError(
                f"distillation diverged at step {self.step + 1}",
                why=f"loss {float(loss.detach())}; "
                + (f"the checkpoint of step {kept[-1]} is kept" if kept else "no checkpoint yet"),
                fix="lower --learning-rate and start anew",
            )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(self.names), config.clip_norm, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        figures = {"loss": loss, "answer": answer, "structure": structure}
        return {"step": self.step, **{name: float(value.detach()) for name, value in figures.items()}}

    def _distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        """What the answers are apart, by what they mean."""
        if self.structure.is_backbone:
            return feature_distance(student, teacher)
        activation = self.teacher.architecture.activation
        if ranks(activation, teacher.shape[1]):
            return distillation(student, teacher, self.config.temperature)
        if activation == "sigmoid":
            return label_distillation(student, teacher, self.config.temperature)
        return value_distance(student, teacher)

    @torch.no_grad()
    def _teach(self, pixels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The teacher's output, and attn.v of every attention, from its fused kernel."""
        maps: dict[str, Tensor] = {}
        fused = functional.scaled_dot_product_attention

        def keep(name: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
            maps[name] = fused(q, k, v, attn_mask=mask, scale=scale)
            return maps[name]

        names = self.structure.attention_names
        with self._autocast(), intercept_attention(self.teacher.model, names, keep):
            return vision_outputs(self.teacher.model, pixels), maps

    def _autocast(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.config.bf16)

    def _batch(self) -> Tensor:
        """The images of this step, each changed in its own way."""
        generator = torch.Generator().manual_seed(hash((self.seed, self.step, _AUGMENTATION)) & 0x7FFFFFFF)
        count, size = self.pixels.shape[0], min(self.config.batch_size, self.pixels.shape[0])
        epoch, within = divmod(self.step * size, count)
        order = torch.cat([_order(self.seed, epoch, count), _order(self.seed, epoch + 1, count)])
        chosen = self.pixels[order[within : within + size]]
        return augment(chosen, generator, self.config) if self.config.augment else chosen

    def save(self, store: CheckpointStore) -> None:
        """Write a checkpoint of the current step."""
        enter_phase("save")
        tensors = {f"student/{n}": p.detach() for p, n in self.names.items()}
        store.save(self.step, tensors | optimizer_tensors(self.optimizer, self.names), {"history": self.history})

    def resume(self) -> bool:
        """Continue from the newest checkpoint, if there is one."""
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


def distillation(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """`T^2 KL(softmax(teacher/T) || softmax(student/T))`, mean over images; both `(N, C)`, fp32 result."""
    soft = functional.log_softmax(student.float() / temperature, dim=1)
    target = functional.log_softmax(teacher.float() / temperature, dim=1)
    return functional.kl_div(soft, target, reduction="batchmean", log_target=True) * temperature**2


def label_distillation(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """The same of labels that hold each by itself, `T^2 KL` of their Bernoulli distributions: sum over the labels."""
    s, t = student.float() / temperature, teacher.float() / temperature
    log_t, log_not_t = functional.logsigmoid(t), functional.logsigmoid(-t)
    divergence = log_t.exp() * (log_t - functional.logsigmoid(s))
    divergence = divergence + log_not_t.exp() * (log_not_t - functional.logsigmoid(-s))
    return divergence.sum(1).mean() * temperature**2


def value_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared error of values `(N, C)` over the variance of the teacher's between images (of one image: its square)."""
    s, t = student.float(), teacher.float()
    varying = t - t.mean(0) if len(t) > 1 else t
    return (s - t).square().mean() / varying.square().mean().clamp(min=1e-12)


def feature_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """`1 - cosine`, mean over images, for backbones that give features `(N, C)` instead of logits."""
    return (1 - functional.cosine_similarity(student.float(), teacher.float(), dim=1)).mean()


def head_structure(student: Tensor, teacher: Tensor, prefix_tokens: int) -> Tensor:
    """`1 - mean S` with `S = (2 cov + C2) / (var_t + var_s + C2)` over patch tokens.

    Args:
        student: attn.v `(B, H, N, d)`; B counts windows too.
        teacher: the same of the teacher; gets no gradient.
        prefix_tokens: leading tokens that are not patches, left out.

    Returns:
        fp32 scalar: 0 for equal or shifted maps, about 1 for independent, about 2 for negated ones.
    """
    s = student[:, :, prefix_tokens:].float()
    t = teacher.detach()[:, :, prefix_tokens:].float()
    s, t = s - s.mean(2, keepdim=True), t - t.mean(2, keepdim=True)
    covariance = (s * t).mean(2)
    similarity = (2 * covariance + _C2) / (s.square().mean(2) + t.square().mean(2) + _C2)
    return 1 - torch.mean(similarity)


_REACH = 3  # standard deviations a blur looks to either side
_FIRST_VIEWS = 2  # a stream of the seed; a step's own are the distiller's
_SHARPEST = 0.05  # standard deviation, in pixels, below which a blur changes nothing


def first_views(pixels: Tensor, config: DistillConfig, seed: int) -> Tensor:
    """One view of each made image `(N, 3, H, W)`, from which ranges, first codes and transforms are measured.

    Measured on made images as they are, they fit a fine detail that pictures do not have. Pictures are measured as
    they are. With `augment` off these are the images themselves.
    """
    generator = torch.Generator().manual_seed(hash((seed, _FIRST_VIEWS)) & 0x7FFFFFFF)
    return augment(pixels, generator, config) if config.augment else pixels


def augment(pixels: Tensor, generator: torch.Generator, config: DistillConfig) -> Tensor:
    """Each of the normalized images `(N, 3, H, W)` changed in its own way, at the same size."""
    shown = crop(pixels, torch.rand(len(pixels), 4, generator=generator), config.smallest_crop)
    if config.blur:
        side = min(pixels.shape[-2:])
        shown = blur(shown, config.blur * side * torch.rand(len(pixels), generator=generator))
    if config.colour:
        shown = relight(shown, config.colour * (2 * torch.rand(len(pixels), 3, generator=generator) - 1))
    return shown


def crop(pixels: Tensor, draws: Tensor, smallest: float) -> Tensor:
    """Mirror and crop `(N, 3, H, W)`, back to the same size.

    Args:
        pixels: the images.
        draws: `(N, 4)` in [0, 1): size, mirror (below a half), place across and down.
        smallest: side of the smallest crop, as a share of the image's; 1 does not crop.
    """
    scale = smallest + (1 - smallest) * draws[:, 0]
    mirror = torch.where(draws[:, 1] < 0.5, -1.0, 1.0)
    theta = torch.zeros(len(pixels), 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = scale * mirror, scale
    theta[:, :, 2] = (1 - scale)[:, None] * (2 * draws[:, 2:4] - 1)
    return resample(pixels, theta)


def blur(pixels: Tensor, deviations: Tensor) -> Tensor:
    """Convolve each image `(N, 3, H, W)` with its own Gaussian; `deviations` `(N,)` in pixels, edges mirrored."""
    count, channels, height, width = pixels.shape
    reach = min(math.ceil(_REACH * float(deviations.max())), height - 1, width - 1)
    if reach < 1:
        return pixels
    at = torch.arange(-reach, reach + 1)
    kernels = torch.exp(-(at**2) / (2 * deviations.clamp(min=_SHARPEST)[:, None] ** 2))
    kernels = (kernels / kernels.sum(1, keepdim=True)).repeat_interleave(channels, 0)[:, None, :]
    flat = functional.pad(pixels.reshape(1, count * channels, height, width), (reach,) * 4, mode="reflect")
    flat = functional.conv2d(flat, kernels[:, :, :, None], groups=count * channels)
    return functional.conv2d(flat, kernels[:, :, None, :], groups=count * channels).view_as(pixels)


def relight(pixels: Tensor, changes: Tensor) -> Tensor:
    """Change each image's contrast, brightness and colourfulness; `changes` `(N, 3)`, 0 changes nothing."""
    contrast, brightness, colourfulness = (changes[:, i, None, None, None] for i in range(3))
    mean = pixels.mean((1, 2, 3), keepdim=True)
    shown = (pixels - mean) * (1 + contrast) + mean + brightness
    grey = shown.mean(1, keepdim=True)
    return grey + (shown - grey) * (1 + colourfulness)
