"""Images optimised through the frozen model until its attention looks like attention (MimiQ, arXiv 2407.20021).

Each step shows the model a view of every image and lowers the sum of the losses over the batch. Every loss is an
image's own, Adam works number by number, and all draws come from the image's own stream, so its neighbours in the batch
do not matter. (To the last bit this holds for equal batches: matrix products of other shapes may add in another
order. Which images of a batch finish early is decided by the images of that batch alone, so it is the same every time.)
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from calibration.batch import Batch
from calibration.canvas import open_canvas
from calibration.config import SynthesisConfig
from calibration.dead_leaves import dead_leaves
from calibration.image_set import ImageSet
from calibration.received_attention import draw_priors
from calibration.regions import draw_regions
from calibration.streams import image_stream, normal
from calibration.terms import Terms
from fp8pipe.core.errors import ConfigurationError
from fp8pipe.models.vision.sources import VisionModel
from fp8pipe.models.vision.structure import VitStructure

_RESTARTS = 3


class Synthesizer:
    """Optimises images.

    Args:
        vision: the frozen model.
        structure: of it.
        config: losses, views and steps.
        seed: with an image's number, decides everything about it.

    Raises:
        ConfigurationError: a model whose attentions show no maps, or one that an option does not fit.
    """

    def __init__(self, vision: VisionModel, structure: VitStructure, config: SynthesisConfig, seed: int) -> None:
        self.vision, self.structure, self.config, self.seed = vision, structure, config, seed
        self.terms = Terms(vision.model, structure, config)

    def batch(self, first: int, count: int, on_step: Callable[[int], None] = lambda step: None) -> ImageSet:
        """Images number `first` to `first + count - 1`; labels are the classes asked for, -1 throughout for a backbone.

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
        images = self.vision.preprocessing.to_uint8(pixels)
        return ImageSet(images, labels, "synthetic", self.seed, losses, notes)

    def _optimise(
        self, numbers: list[int], attempts: list[int], on_step: Callable[[int], None]
    ) -> tuple[Tensor, Tensor, dict[str, list[float]]]:
        """Finished pixels `(N, 3, H, W)` normalized, labels `(N,)`, and last losses by name, one per image."""
        config, batch = self.config, self._begin(numbers, attempts)
        labels, done = batch.labels, torch.empty(len(numbers), 3, *self.structure.image_size)
        found: dict[str, Tensor] = {}
        for step in range(config.steps):
            terms = self.terms(batch.scene(step))
            each = torch.stack(list(terms.values())).sum(0)
            batch.canvas.step(torch.autograd.grad(each.sum(), batch.canvas.parameters), self._rate(step))
            for name, term in terms.items():
                found.setdefault(name, torch.zeros(len(numbers)))[batch.rows] = term.detach()
            on_step(step + 1)
            stays = batch.plateau.going(each)
            if not bool(stays.all()):
                done[batch.rows[~stays]] = batch.canvas.pixels().detach()[~stays]
                batch.keep(stays)
                if not len(batch.rows):
                    break
        done[batch.rows] = batch.canvas.pixels().detach()
        return done, labels, {name: values.tolist() for name, values in found.items()}

    def _begin(self, numbers: list[int], attempts: list[int]) -> Batch:
        """Everything that images have of their own; what an option needs is drawn only with that option."""
        config, classes = self.config, self.structure.classes
        streams = [image_stream(self.seed, n, a) for n, a in zip(numbers, attempts, strict=True)]
        labels = self._labels(streams)
        canvas = open_canvas(self._start(numbers, streams), self.vision.preprocessing.valid_range(), config)
        regions = draw_regions(streams, labels, classes) if config.regions and classes is not None else None
        grid = self.structure.patch_grid
        depths, sites = self.terms.depths, self.terms.global_sites
        priors = draw_priors(streams, len(depths), sites[next(iter(depths))].heads, grid) if depths else None
        return Batch(config, grid, list(depths), streams, labels, canvas, regions, priors)

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

    def _lost(self, number: int) -> ConfigurationError:
        return ConfigurationError(
            f"image {number} became NaN in {_RESTARTS + 1} attempts",
            why=f"the losses diverge at learning rate {self.config.learning_rate}",
            fix="lower the synthesis learning rate, or use --calibration gaussian or images:DIR",
        )
