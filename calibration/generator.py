"""Images optimised through the frozen model until its attention looks like attention (MimiQ, arXiv 2407.20021).

Each step shows the model a view of every image and lowers the sum of the losses over the batch. Every loss is an
image's own, Adam works number by number, and all draws come from the image's own stream, so its neighbours in the batch
do not matter. (To the last bit this holds for equal batch sizes: matrix products of other shapes may add in another
order.)
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from calibration.canvas import open_canvas
from calibration.config import SynthesisConfig
from calibration.leaves import dead_leaves
from calibration.losses import class_prior, head_similarity, patch_entropy, total_variation
from calibration.streams import image_stream, normal
from calibration.views import view
from fp8pipe.errors import ConfigurationError
from fp8pipe.vision.attention import explicit_attention, intercept_attention
from fp8pipe.vision.outputs import vision_outputs
from fp8pipe.vision.sources import VisionModel
from fp8pipe.vision.structure import VitStructure

_RESTARTS = 3


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
        self._model = _halved(vision.model) if config.bf16 else vision.model
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
        canvas = open_canvas(self._start(numbers, streams), self.vision.preprocessing.valid_range(), config)
        terms: dict[str, Tensor] = {}
        for step in range(config.steps):
            pixels = canvas.pixels()
            terms = self._losses(pixels, view(pixels, streams, step, config), labels)
            total = torch.stack([term.sum() for term in terms.values()]).sum()
            canvas.step(torch.autograd.grad(total, canvas.parameters), self._rate(step))
            on_step(step + 1)
        pixels = canvas.pixels()
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

    def _rate(self, step: int) -> float:
        """Cosine from the peak to the final rate."""
        config = self.config
        share = 0.5 * (1 + math.cos(math.pi * step / config.steps))
        return config.final_rate + (config.learning_rate - config.final_rate) * share

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
            intercept_attention(self._model, self.structure.attention_names, attend),
        ):
            outputs = vision_outputs(self._model, view)
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

    def _lost(self, number: int) -> ConfigurationError:
        return ConfigurationError(
            f"image {number} became NaN in {_RESTARTS + 1} attempts",
            why=f"the losses diverge at learning rate {self.config.learning_rate}",
            fix="lower the synthesis learning rate, or use --calibration gaussian or images:DIR",
        )


def _halved(model: nn.Module) -> nn.Module:
    """A copy whose linears hold the bf16 weights that autocast would make of them anew at every step."""
    copied = copy.deepcopy(model)
    for module in copied.modules():
        if type(module) is nn.Linear:
            module.to(torch.bfloat16)
    return copied
