"""Optimises images through the frozen model, with losses on its attention maps (MimiQ, arXiv 2407.20021).

In each step the model gets a random view of every image, and the sum of the losses over the batch is minimised. Each
image has its own losses, Adam is elementwise, and all random numbers come from the image's own stream, so an image does
not depend on the others in its batch. (Results are bit-identical only for equal batches: GEMMs of other shapes may sum
in another order.)

With a plateau configured, an image whose loss has stopped falling is finished early. As every step uses another random
view, losses fluctuate, so the means over two windows of steps are compared: an image is finished if the mean over the
latest window is not lower than that over the window before by at least the relative tolerance. This depends only on
the image's own losses, so an interrupted and resumed run stops each image at the same step. (The host must know which
images are finished, so a plateau costs a GPU synchronization per step; without it there is none.)

Images are made on the model's device. On a GPU, batches are as large as the estimate in `memory` allows, and are halved
if memory runs out. The last bits differ between runs on a GPU, as the gradient of a view is summed in no fixed order.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from calibration.canvas import Canvas, open_canvas
from calibration.config import SynthesisConfig
from calibration.dead_leaves import dead_leaves
from calibration.image_set import ImageSet
from calibration.memory import images_at_once
from calibration.terms import Scene, Terms
from calibration.views import image_stream, normal, view
from fp8pipe.core.devices import to_device
from fp8pipe.core.errors import ConfigurationError
from fp8pipe.models.vision.sources import VisionModel
from fp8pipe.models.vision.structure import VitStructure

_LOG = logging.getLogger(__name__)
_RESTARTS = 3


class Synthesizer:
    """Makes synthetic images for one model.

    Args:
        vision: the frozen model.
        structure: the model's structure.
        config: losses, views and steps.
        seed: determines all images, each together with its number.

    Raises:
        ConfigurationError: the model has no attention maps to compare, or does not support a configured option.
    """

    def __init__(self, vision: VisionModel, structure: VitStructure, config: SynthesisConfig, seed: int) -> None:
        self.vision, self.structure, self.config, self.seed = vision, structure, config, seed
        self.terms = Terms(vision.model, structure, config)
        self.device = next(vision.model.parameters()).device
        self.at_once = images_at_once(structure, config, self.device)  # maximum batch size; None: no limit

    def batch(self, first: int, count: int, on_step: Callable[[int], None] = lambda step: None) -> ImageSet:
        """Make images `first` to `first + count - 1`; labels are their target classes, all -1 for a backbone.

        `on_step` is called after every optimizer step with its number, starting at 1.

        Raises:
            ConfigurationError: an image became NaN in every attempt.
            torch.OutOfMemoryError: not even a single image fits into the GPU's memory.
        """
        parts: list[ImageSet] = []
        while (done := sum(len(part.images) for part in parts)) < count:
            size = min(count - done, self.at_once or count)
            try:
                parts.append(self._together(list(range(first + done, first + done + size)), on_step))
            except torch.OutOfMemoryError:
                if size == 1:
                    raise
                self.at_once = size // 2
                _LOG.warning("%d images at once did not fit the GPU's memory; going on with %d", size, self.at_once)
        return ImageSet.joined(parts)

    def _together(self, numbers: list[int], on_step: Callable[[int], None]) -> ImageSet:
        """Make the images with these numbers in one batch."""
        attempts, notes = [0] * len(numbers), []
        pixels, labels, losses = self._optimise(numbers, attempts, on_step)
        finite = torch.isfinite(pixels).flatten(1).all(1).tolist()
        for index in range(len(numbers)):
            while not finite[index]:
                attempts[index] += 1
                if attempts[index] > _RESTARTS:
                    raise ConfigurationError(
                        f"image {numbers[index]} became NaN in {_RESTARTS + 1} attempts",
                        why=f"the losses diverge at learning rate {self.config.learning_rate}",
                        fix="lower the synthesis learning rate, or use --calibration gaussian or images:DIR",
                    )
                notes.append(f"image {numbers[index]} became NaN and was restarted")
                again = self._optimise([numbers[index]], [attempts[index]], on_step)
                pixels[index], labels[index] = again[0][0], again[1][0]
                finite[index] = bool(torch.isfinite(pixels[index]).all())
                for name in losses:
                    losses[name][index] = again[2][name][0]
        images = self.vision.preprocessing.to_uint8(pixels).cpu()
        return ImageSet(images, labels, "synthetic", self.seed, losses, notes)

    def _optimise(
        self, numbers: list[int], attempts: list[int], on_step: Callable[[int], None]
    ) -> tuple[Tensor, Tensor, dict[str, list[float]]]:
        """Optimise one batch of images.

        Args:
            numbers: the images' numbers.
            attempts: how often each image has been restarted already.
            on_step: see `batch`.

        Returns:
            Pixels `(N, 3, H, W)`, normalized, on the device; labels `(N,)`, and the images' final losses by name, on
            the host.
        """
        config, batch = self.config, self._begin(numbers, attempts)
        labels, done = batch.labels, torch.empty(len(numbers), 3, *self.structure.image_size, device=self.device)
        found: dict[str, Tensor] = {}
        for step in range(config.steps):
            terms = self.terms(batch.scene(step))
            each = torch.stack(list(terms.values())).sum(0)
            cosine = 0.5 * (1 + math.cos(math.pi * step / config.steps))
            rate = config.final_rate + (config.learning_rate - config.final_rate) * cosine
            batch.canvas.step(torch.autograd.grad(each.sum(), batch.canvas.parameters), rate)
            for name, term in terms.items():
                found.setdefault(name, torch.zeros(len(numbers), device=self.device))[batch.places] = term.detach()
            on_step(step + 1)
            if batch.plateau.watches and not bool((stays := batch.plateau.going(each)).all()):
                leaving = to_device((~stays).nonzero().flatten(), self.device)
                done[batch.places[leaving]] = batch.canvas.pixels().detach()[leaving]
                batch.keep(stays)
                if not len(batch.rows):
                    break
        done[batch.places] = batch.canvas.pixels().detach()
        return done, labels, {name: values.tolist() for name, values in found.items()}

    def _begin(self, numbers: list[int], attempts: list[int]) -> Batch:
        """Draw all random numbers that a batch starts with."""
        config, classes = self.config, self.structure.classes
        streams = [image_stream(self.seed, n, a) for n, a in zip(numbers, attempts, strict=True)]
        drawn = [-1 if classes is None else int(torch.randint(classes, (), generator=stream)) for stream in streams]
        labels = torch.tensor(drawn)
        canvas = open_canvas(self._start(numbers, streams), self.vision.preprocessing.valid_range(), config)
        return Batch(config, streams, labels, canvas, self.device)

    def _start(self, numbers: list[int], streams: list[torch.Generator]) -> Tensor:
        size = self.structure.image_size
        if self.config.start == "noise":
            return to_device(normal(streams, 3, *size), self.device)
        pictures = torch.cat([dead_leaves(self.seed, n, 1, size) for n in numbers])
        return to_device(self.vision.preprocessing.normalize((pictures * 255).round().to(torch.uint8)), self.device)


@dataclass(slots=True)
class Batch:
    """A batch of images that is being optimised."""

    config: SynthesisConfig  # determines the views
    streams: list[torch.Generator]  # the random streams of the remaining images
    labels: Tensor  # `(N,)` int64, of all images of the initial batch, on the host
    canvas: Canvas  # the remaining images, on the device
    device: torch.device  # the model's device
    rows: Tensor = field(init=False)  # `(n,)` int64: indices of the remaining images in the initial batch, on the host
    places: Tensor = field(init=False)  # the same on the device
    plateau: Plateau = field(init=False)

    def __post_init__(self) -> None:
        self.rows = torch.arange(len(self.streams))
        self.places = to_device(self.rows, self.device)
        self.plateau = Plateau(self.config.plateau, self.config.plateau_window)

    def scene(self, step: int) -> Scene:
        """Make the input of step number `step`, starting at 0; advances the random streams."""
        pixels = self.canvas.pixels()
        shown = view(pixels, self.streams, step, self.config)
        return Scene(pixels, shown, to_device(self.labels[self.rows], self.device))

    def keep(self, stays: Tensor) -> None:
        """Keep only the images for which the boolean mask `(n,)`, on the host, is true."""
        staying = to_device(stays.nonzero().flatten(), self.device)
        self.rows, self.places = self.rows[stays], self.places[staying]
        self.canvas.keep(staying)
        self.streams = [stream for stream, here in zip(self.streams, stays.tolist(), strict=True) if here]


class Plateau:
    """Detects images whose loss has stopped falling.

    Args:
        tolerance: smallest relative decrease from window to window for an image to continue; 0 turns this off.
        window: number of steps in a window.
    """

    def __init__(self, tolerance: float, window: int) -> None:
        self._tolerance, self._window = tolerance, window
        self.watches = tolerance > 0
        self._history: list[Tensor] = []

    def going(self, losses: Tensor) -> Tensor:
        """Decide which images continue to be optimised; the others are removed from the history.

        Args:
            losses: `(N,)`, this step's losses of the remaining images. An image with a NaN loss continues.

        Returns:
            A boolean mask `(N,)` on the host.
        """
        self._history = [*self._history, losses.detach().clone()][-2 * self._window :]
        if not self._tolerance or len(self._history) < 2 * self._window:
            return torch.ones(len(losses), dtype=torch.bool)
        before = torch.stack(self._history[: self._window]).mean(0)
        fall = before - torch.stack(self._history[self._window :]).mean(0)
        # Not `fall >= ...`: comparisons with NaN are false, and images with NaN are left to the synthesizer's restart.
        stays = ~(fall < self._tolerance * before.abs()).cpu()
        if not bool(stays.all()):
            staying = to_device(stays.nonzero().flatten(), losses.device)
            self._history = [past[staying] for past in self._history]
        return stays
