"""Images optimised through the frozen model until its attention looks like attention (MimiQ, arXiv 2407.20021).

The pixels are the parameters. Each step shows the model a shifted, mirrored, recoloured view and lowers the sum of the
losses over the batch. Every loss is an image's own, Adam works pixel by pixel, and all draws come from the image's own
stream, so its neighbours in the batch do not matter. (To the last bit this holds for equal batch sizes: matrix
products of other shapes may add in another order.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from calibration.config import SynthesisConfig
from calibration.leaves import dead_leaves
from calibration.losses import class_prior, head_similarity, patch_entropy, total_variation
from calibration.streams import image_stream, normal, uniform
from fp8pipe.errors import ConfigurationError
from fp8pipe.vision.attention import explicit_attention, intercept_attention
from fp8pipe.vision.outputs import vision_outputs
from fp8pipe.vision.sources import VisionModel
from fp8pipe.vision.structure import VitStructure

_RESTARTS = 3
_BETA1, _BETA2, _EPSILON, _DECAY = 0.9, 0.999, 1e-8, 1e-6


@dataclass(frozen=True, slots=True)
class Synthesized:
    """A finished batch.

    Attributes:
        images: `(n, 3, H, W)` uint8.
        labels: `(n,)` int64, the classes asked for; -1 throughout for a backbone.
        losses: last value of each term, by name, an image each.
        notes: what went wrong on the way, in words.
    """

    images: Tensor
    labels: Tensor
    losses: dict[str, list[float]]
    notes: list[str]


class Synthesizer:
    """Optimises images.

    Args:
        vision: the frozen model.
        structure: of it.
        config: losses, views and steps.
        seed: with an image's number, decides everything about it.

    Raises:
        ConfigurationError: a model whose attentions show no maps.
    """

    def __init__(self, vision: VisionModel, structure: VitStructure, config: SynthesisConfig, seed: int) -> None:
        self.vision, self.structure, self.config, self.seed = vision, structure, config, seed
        self.sites = {site.name: site for site in structure.attentions if not site.pools and site.heads > 1}
        if not self.sites and config.similarity > 0:
            raise ConfigurationError(
                "this model has no attention with several heads",
                why="the synthesis compares the maps of different heads",
                fix="use --calibration gaussian or images:DIR",
            )

    def batch(self, first: int, count: int, on_step: Callable[[int], None] = lambda step: None) -> Synthesized:
        """Images number `first` to `first + count - 1`.

        Raises:
            ConfigurationError: an image became NaN in every attempt.
        """
        numbers, attempts, notes = list(range(first, first + count)), [0] * count, []
        pixels, labels, losses = self._optimise(numbers, attempts, on_step)
        for index in range(count):
            while not bool(torch.isfinite(pixels[index]).all()):
                attempts[index] += 1
                if attempts[index] > _RESTARTS:
                    raise self._lost(numbers[index])
                notes.append(f"image {numbers[index]} became NaN and was begun again")
                again = self._optimise([numbers[index]], [attempts[index]], on_step)
                pixels[index], labels[index] = again[0][0], again[1][0]
                for name in losses:
                    losses[name][index] = again[2][name][0]
        return Synthesized(self.vision.preprocessing.to_uint8(pixels), labels, losses, notes)

    def _optimise(
        self, numbers: list[int], attempts: list[int], on_step: Callable[[int], None]
    ) -> tuple[Tensor, Tensor, dict[str, list[float]]]:
        config = self.config
        streams = [image_stream(self.seed, n, a) for n, a in zip(numbers, attempts, strict=True)]
        labels = self._labels(streams)
        pixels = self._start(numbers, streams).requires_grad_()
        first, second = torch.zeros_like(pixels), torch.zeros_like(pixels)
        low, high = self.vision.preprocessing.valid_range()
        terms: dict[str, Tensor] = {}
        for step in range(config.steps):
            terms = self._losses(pixels, self._view(pixels, streams, step), labels)
            (grad,) = torch.autograd.grad(torch.stack([term.sum() for term in terms.values()]).sum(), pixels)
            with torch.no_grad():
                self._adam(pixels, grad, first, second, step)
                if config.clamp:
                    pixels.clamp_(low, high)
            on_step(step + 1)
        found = {name: term.detach().tolist() for name, term in terms.items()}
        return pixels.detach(), labels, found

    def _labels(self, streams: list[torch.Generator]) -> Tensor:
        classes = self.structure.classes
        if classes is None:
            return torch.full((len(streams),), -1)
        return torch.tensor([int(torch.randint(classes, (), generator=stream)) for stream in streams])

    def _start(self, numbers: list[int], streams: list[torch.Generator]) -> Tensor:
        size = self.structure.image_size
        if self.config.start == "noise":
            return normal(streams, 3, *size)
        pictures = torch.cat([dead_leaves(self.seed, n, 1, size) for n in numbers])
        return self.vision.preprocessing.normalize((pictures * 255).round().to(torch.uint8))

    def _view(self, pixels: Tensor, streams: list[torch.Generator], step: int) -> Tensor:
        """What the model is shown: each image shifted, mirrored and recoloured in its own way."""
        config, draws = self.config, uniform(streams, 3)
        reach = config.jitter * (1 if step < config.steps / 2 else 2)
        shifts = torch.floor(draws[:, :2] * (2 * reach + 1)).long() - reach
        views = []
        for image, (dy, dx), turn in zip(pixels, shifts.tolist(), draws[:, 2].tolist(), strict=True):
            shown = image.roll((dy, dx), (1, 2)) if reach else image
            views.append(shown.flip(2) if config.mirror and turn < 0.5 else shown)
        view = torch.stack(views)
        if not config.colour:
            return view
        offset = normal(streams, 3, 1, 1) * 0.5 * (config.steps - 1 - step) / config.steps
        change = 2 * uniform(streams, 2, 3, 1, 1) - 1
        return (view + offset - change[:, 0]) / change[:, 1].exp()

    def _losses(self, pixels: Tensor, view: Tensor, labels: Tensor) -> dict[str, Tensor]:
        config, similarities, entropies = self.config, [], []
        absolute = config.similarity_form == "absolute"

        def attend(name: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
            site = self.sites.get(name)

            def compare(maps: Tensor) -> Tensor:
                if site is not None and config.similarity:
                    similarities.append(head_similarity(maps, site, absolute=absolute))
                return maps

            hook = {"on_logits" if config.maps == "logits" else "on_probs": compare}
            output = explicit_attention(q, k, v, mask, scale, **hook)
            if site is not None and config.entropy:
                entropies.append(patch_entropy(output, site))
            return output

        with (
            torch.autocast("cpu", torch.bfloat16, enabled=config.bf16),
            intercept_attention(self.vision.model, self.structure.attention_names, attend),
        ):
            outputs = vision_outputs(self.vision.model, view)
        terms = {}
        if similarities:
            terms["similarity"] = config.similarity * torch.stack(similarities).mean(0)
        if entropies:
            terms["entropy"] = config.entropy * torch.stack(entropies).mean(0)
        if self.structure.classes is not None and config.class_weight:
            terms["class"] = config.class_weight * class_prior(outputs, labels)
        if config.variation:
            terms["variation"] = config.variation * total_variation(pixels)
        return terms

    def _adam(self, pixels: Tensor, grad: Tensor, first: Tensor, second: Tensor, step: int) -> None:
        """AdamW (arXiv 1711.05101) on the pixels, which are its only parameter."""
        config = self.config
        share = 0.5 * (1 + math.cos(math.pi * step / config.steps))
        rate = config.final_rate + (config.learning_rate - config.final_rate) * share
        first.lerp_(grad, 1 - _BETA1)
        second.mul_(_BETA2).addcmul_(grad, grad, value=1 - _BETA2)
        divisor = (second / (1 - _BETA2 ** (step + 1))).sqrt_().add_(_EPSILON)
        pixels.mul_(1 - rate * _DECAY).addcdiv_(first, divisor, value=-rate / (1 - _BETA1 ** (step + 1)))

    def _lost(self, number: int) -> ConfigurationError:
        return ConfigurationError(
            f"image {number} became NaN in {_RESTARTS + 1} attempts",
            why=f"the losses diverge at learning rate {self.config.learning_rate}",
            fix="lower the synthesis learning rate, or use --calibration gaussian or images:DIR",
        )
