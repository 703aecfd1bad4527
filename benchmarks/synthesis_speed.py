"""Compare the speed of synthesizing calibration images with that of a plain implementation of the same losses.

The plain implementation follows the formulas literally: it computes a tensor over all pairs of heads, queries and keys,
also computes the gradients of the model's parameters, and uses fp32. Both take the same steps on the same images of the
same model (same terms, same views, same optimizer), a few steps at a time in turn, so that other load on the machine
affects both. The script prints medians of the time per step and of the ratio within a round.

    python benchmarks/synthesis_speed.py --model sample:vit-s --image-size 112 --batch 16 --rounds 7

With `--heads` it measures instead how much memory the loss keeps for its gradient, for 2 to 32 heads with the same
total number of channels.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from statistics import median

os.environ.setdefault("GOMP_SPINCOUNT", "5000")  # the same setting as in fp8pipe's commands (fp8pipe/core/machine.py)

import torch

from calibration.canvas import open_canvas
from calibration.config import SynthesisConfig
from calibration.generator import Synthesizer
from calibration.losses import class_prior, head_similarity, total_variation
from calibration.terms import Scene
from calibration.views import image_stream, view
from fp8pipe.core.config import build_config
from fp8pipe.models.vision.attention import explicit_attention, intercept_attention
from fp8pipe.models.vision.prepare import vision_outputs
from fp8pipe.models.vision.sources import load_vision_model
from fp8pipe.models.vision.structure import AttentionSite, read_structure
from fp8pipe.numerics.bf16 import widen_bf16_products


def pairwise(maps, site):
    """The mean of `1 - SSIM^2` over all ordered pairs of heads, computed from the maps of every pair.

    Args:
        maps: attention logits `(B, H, Q, K)`, where B is images times windows.
        site: the attention.

    Returns:
        The loss of each image.
    """
    patches = maps[:, :, site.prefix_tokens :, site.prefix_tokens :]
    low, high = patches.amin(-1, keepdim=True), patches.amax(-1, keepdim=True)
    scaled = (patches - low) / (high - low + 1e-8)
    a, b = torch.broadcast_tensors(scaled[:, :, None], scaled[:, None])  # (B, H, H, Q, K)
    mean_a, mean_b = a.mean(-1, keepdim=True), b.mean(-1, keepdim=True)
    covariance = ((a - mean_a) * (b - mean_b)).mean(-1)
    spread = ((a - mean_a) ** 2).mean(-1) + ((b - mean_b) ** 2).mean(-1)
    mean_a, mean_b = mean_a[..., 0], mean_b[..., 0]
    top = (2 * mean_a * mean_b + 0.01**2) * (2 * covariance + 0.03**2)
    ssim = top / ((mean_a**2 + mean_b**2 + 0.01**2) * (spread + 0.03**2))
    return (1 - ssim**2).flatten(1).mean(1).view(-1, site.windows).mean(1)


class Plain:
    """The plain implementation of the losses."""

    def __init__(self, vision, structure, config):
        self.vision, self.config, self.names = vision, config, structure.attention_names
        self.sites = {site.name: site for site in structure.attentions if not site.pools}
        vision.model.requires_grad_(True)

    def losses(self, pixels, shown, labels):
        """The sum over images of the terms of the default configuration.

        Args:
            pixels: the images `(N, 3, H, W)`.
            shown: the views of the images that the model gets.
            labels: the classes of the images; None for models without classes.
        """
        found = []

        def attend(name, q, k, v, mask, scale):
            return explicit_attention(q, k, v, mask, scale, on_logits=lambda maps: keep(name, maps))

        def keep(name, maps):
            found.append(pairwise(maps, self.sites[name]))
            return maps

        with intercept_attention(self.vision.model, self.names, attend):
            outputs = vision_outputs(self.vision.model, shown)
        terms = [self.config.similarity * torch.stack(found).mean(0), self.config.variation * total_variation(pixels)]
        if labels is not None:
            terms.append(self.config.class_weight * class_prior(outputs, labels))
        return sum(terms).sum()


def plain_step(plain, canvas, streams, labels, step):
    """One optimizer step of the plain implementation, with a complete backward pass (`loss.backward()`)."""
    pixels = canvas.pixels()
    total = plain.losses(pixels, view(pixels, streams, step, plain.config), labels)
    total.backward()
    canvas.step([p.grad for p in canvas.parameters], plain.config.learning_rate)
    for parameter in (*canvas.parameters, *plain.vision.model.parameters()):
        parameter.grad = None


def our_step(ours, canvas, streams, labels, step):
    """One optimizer step of fp8pipe's implementation."""
    pixels = canvas.pixels()
    shown = view(pixels, streams, step, ours.config)
    terms = ours.terms(Scene(pixels, shown, labels))
    total = torch.stack([term.sum() for term in terms.values()]).sum()
    canvas.step(torch.autograd.grad(total, canvas.parameters), ours.config.learning_rate)


def serve_side(side, options, config, pipe):
    """The main function of one implementation's process.

    For every true value received it takes `options.steps` steps and sends back the mean seconds per step.

    Args:
        side: `ours` or `plain`.
        options: the command line.
        config: the configuration of the synthesis.
        pipe: connection to the parent process.
    """
    widen_bf16_products()
    size = None if options.image_size is None else (options.image_size, options.image_size)
    vision = load_vision_model(options.model, size)
    structure = read_structure(vision.model, vision.architecture.image_size)
    ours = Synthesizer(vision, structure, config, 0)
    streams = [image_stream(0, number) for number in range(options.batch)]
    labels = ours._labels(streams)
    start = ours._start(list(range(options.batch)), streams)
    canvas = open_canvas(start, vision.preprocessing.valid_range(), config)
    plain = Plain(vision, structure, config) if side == "plain" else None
    known = labels if structure.classes is not None else None
    step = 0
    while pipe.recv():
        begun = time.perf_counter()
        for _ in range(options.steps):
            if plain is None:
                our_step(ours, canvas, streams, labels, step)
            else:
                plain_step(plain, canvas, streams, known, step)
            step += 1
        pipe.send((time.perf_counter() - begun) / options.steps)


def compare(options):
    """Time both implementations in turn; print the time per step, images per second, and the ratio.

    Each runs in its own process, as the large tensors of the plain one change the behaviour of the memory allocator.
    """
    config = build_config(SynthesisConfig, {})
    context, pipes, seconds = multiprocessing.get_context("spawn"), {}, {"ours": [], "plain": []}
    for side in seconds:
        pipes[side], end = context.Pipe()
        context.Process(target=serve_side, args=(side, options, config, end), daemon=True).start()
    for turn in range(options.rounds + 1):
        for side, times in seconds.items():
            pipes[side].send(True)
            taken = pipes[side].recv()
            if turn:  # the first round warms up
                times.append(taken)
    for side, times in seconds.items():
        pipes[side].send(False)
        rate = options.batch / (median(times) * config.steps)
        print(f"{side:6} {1000 * median(times):8.1f} ms a step of {options.batch} images, {rate:.3f} images/s")
    ratios = [b / a for a, b in zip(seconds["ours"], seconds["plain"], strict=True)]
    print(f"ratio  {median(ratios):8.2f}  ({min(ratios):.2f} to {max(ratios):.2f})")


def memory(options):
    """Print the memory that both losses keep for the gradient, in MiB, for different numbers of heads."""
    print("heads  logits  ours  pairwise   MiB kept for the gradient, 4 images, 196 patches")
    for heads in (2, 4, 8, 16, 32):
        site = AttentionSite("a", heads, 768 // heads, 196, 0, (14, 14), 1, False, 196)
        maps = torch.randn(4, heads, 196, 196)
        kept = [_kept(lambda m, f=f, s=site: f(m, s), maps) for f in (head_similarity, pairwise)]
        print(f"{heads:5}  {maps.numel() * 4 / 2**20:6.1f}  {kept[0]:4.1f}  {kept[1]:8.1f}")


def _kept(function, maps):
    """MiB of tensors that autograd saves when `function` is called with `maps`; each storage is counted once."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        held = function(maps.clone().requires_grad_())
    del held
    return sum(storages.values()) / 2**20


def main():
    """Parse the command line and run one of the two measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sample:vit-s")
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=4, help="steps of a side in a round")
    parser.add_argument("--heads", action="store_true", help="memory of the loss instead")
    options = parser.parse_args()
    (memory if options.heads else compare)(options)


if __name__ == "__main__":
    main()
