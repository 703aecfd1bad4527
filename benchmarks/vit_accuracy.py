"""Compare the accuracy of quantized vision transformers by precision and calibration images, over several seeds.

Every run writes an artifact with `quantize-vit`, and evaluates the quantized model and the original (its teacher) on
held-out images. Runs of the same precision and seed differ only in their calibration images; transforms, rounding and
distillation are the same. `--sources` selects the calibration images (docs/mimiq.md describes the methods):

    synthetic   images synthesized with the default settings
    published   images synthesized with MimiQ's settings (initialized with white noise, optimized as pixels, randomly
                shifted at each step), with the default number of steps
    similarity  like `published`, but the loss has PSAQ-ViT's patch-similarity entropy instead of MimiQ's inter-head
                similarity
    leaves      the "dead leaves" images from which the default synthesis starts, not optimized
    gaussian    white noise
    real        images of the training set

The following sources are like `synthetic`, with some settings changed:

    plateau     an image is finished when its mean loss over 10 steps is less than 2 % below that of the 10 steps before

    python scripts/write_digits.py runs/digits-train --part train; python scripts/write_digits.py runs/digits-test
    python benchmarks/vit_accuracy.py --model sample:vit-digits --train runs/digits-train --test runs/digits-test \\
        --bits w8a8 w4a4 --output runs/vit-digits.jsonl

The output has one line of JSON per run; runs that it already contains are not repeated. The summary table is printed
last.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

from fp8pipe.artifact.kinds import VitDetails

os.environ.setdefault("GOMP_SPINCOUNT", "5000")  # the same setting as in fp8pipe's commands (fp8pipe/core/machine.py)

import torch

from fp8pipe.core.config import build_config
from fp8pipe.models.vision.image_folder import read_image_folder
from pipeline.vit.config import QuantizeVitConfig
from pipeline.vit.stage import quantize_vit

PUBLISHED = {
    "start": "noise", "canvas": "pixels", "views": "shifts", "learning_rate": 0.1, "variation": 2.5e-5,
}  # fmt: skip
SOURCES = {
    "synthetic": ("synthetic", {}),
    "published": ("synthetic", PUBLISHED),
    "similarity": ("synthetic", PUBLISHED | {"similarity": 0.0, "entropy": 1.0}),
    "leaves": ("synthetic", {"steps": 0}),
    "plateau": ("synthetic", {"plateau": 0.02}),
    "gaussian": ("gaussian", {}),
    "real": ("images:", {}),
}


def thin(folder, count, seed, place):
    """Draw a random subset of an image folder, with at most `count` images per class, and write it as symbolic links.

    Args:
        folder: the image folder to draw from.
        count: maximum number of images per class.
        seed: seed of the random choice.
        place: the image folder to write.

    Returns:
        `place`.
    """
    found = read_image_folder(folder)
    order = torch.randperm(len(found.files), generator=torch.Generator().manual_seed(seed)).tolist()
    taken = defaultdict(int)
    for row in order:
        label = found.labels[row]
        taken[label] += 1
        if taken[label] <= count:
            into = place / found.classes[label]
            into.mkdir(parents=True, exist_ok=True)
            (into / found.files[row].name).symlink_to(found.files[row].resolve())
    return place


def run(source, bits, seed, images_of, options, scratch):
    """Quantize a model and evaluate it. Calibration images are generated once per source and seed, for all precisions.

    Args:
        source: a key of `SOURCES`.
        bits: the precision, for example "w4a8", or "w4a4:sensitivity" for that allocation of bits.
        seed: seed of the calibration images and of the quantization.
        images_of: maps (source, seed) to an artifact that already contains these images; this run adds its own artifact
            if there is none.
        options: the parsed command line, with `test_part`, the image folder to evaluate on.
        scratch: directory in which the artifact is written.

    Returns:
        One line of the output, as a dictionary: settings, top-1 accuracies (0 to 1), and times in seconds.
    """
    method, synthesis = SOURCES[source]
    precision, _, allocation = bits.partition(":")
    made = images_of.get((source, seed))
    calibration = f"artifact:{made}" if made else method + (str(options.train) if method == "images:" else "")
    config = build_config(
        QuantizeVitConfig,
        {
            "model": options.model, "bits": precision, "allocation": allocation or "even",
            "calibration": calibration, "images": options.images, "seed": seed,
            "synthesis": synthesis, "evaluate": str(options.test_part),
            "distill": {"steps": options.distill_steps, "save_every": 0},
        },
    )  # fmt: skip
    artifact = quantize_vit(config, scratch / f"{source}-{bits.replace(':', '-')}-{seed}")
    images_of.setdefault((source, seed), artifact.root)
    found = artifact.manifest.details_of(VitDetails)
    return {
        "model": options.model, "source": source, "bits": bits, "seed": seed, "images": options.images,
        "distill_steps": options.distill_steps, "test_images": found.accuracy.images,
        "teacher": found.accuracy.teacher.top1, "quantized": found.accuracy.quantized.top1,
        "seconds_an_image": None if made else found.seconds_per_image,
        "seconds_training": found.seconds["training"], "threads": torch.get_num_threads(),
        "torch": torch.__version__, "machine": platform.machine(),
    }  # fmt: skip


def summary(lines):
    """A Markdown table of top-1 accuracy in percent over seeds: one row per source, one column per precision."""
    scores, cost = defaultdict(list), defaultdict(list)
    for line in lines:
        scores[line["source"], line["bits"]].append(100 * line["quantized"])
        if line["seconds_an_image"] is not None:
            cost[line["source"]].append(line["seconds_an_image"])
    columns = sorted({bits for _, bits in scores}, reverse=True)
    shown = [f"teacher {100 * lines[0]['teacher']:.1f} on {lines[0]['test_images']} images"]
    shown.append("| images | s an image | " + " | ".join(columns) + " |")
    shown.append("|---" * (2 + len(columns)) + "|")
    for source in [name for name in SOURCES if any(name == row for row, _ in scores)]:
        cells = [_cell(scores[source, bits]) for bits in columns]
        each = f"{mean(cost[source]):.2f}" if cost[source] else ""
        shown.append(f"| {source} | {each} | " + " | ".join(cells) + " |")
    return "\n".join(shown)


def _cell(values):
    if not values:
        return ""
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f} ({len(values)})" if len(values) > 1 else " (1)")


def main():
    """Make the runs that are not in the output yet, and print the summary table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--train", type=Path, required=True, help="image folder that `real` draws from")
    parser.add_argument("--test", type=Path, required=True, help="image folder of held-out images")
    parser.add_argument("--test-images", type=int, default=100, help="largest number of images per class")
    parser.add_argument("--bits", nargs="+", help="PRECISION[:ALLOCATION]", default=["w8a8", "w4a8", "w4a4"])
    parser.add_argument("--sources", nargs="+", choices=SOURCES, default=list(SOURCES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--distill-steps", type=int, default=100)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    done = [json.loads(line) for line in options.output.read_text().splitlines()] if options.output.is_file() else []
    key = ("source", "bits", "seed", "model", "images", "distill_steps")
    known = {tuple(line[name] for name in key) for line in done}
    with tempfile.TemporaryDirectory(dir=options.output.parent) as place, options.output.open("a") as output:
        scratch, images_of = Path(place), {}
        options.test_part = thin(options.test, options.test_images, 0, scratch / "test")
        for seed in options.seeds:
            for source in options.sources:
                for bits in options.bits:
                    if (source, bits, seed, options.model, options.images, options.distill_steps) in known:
                        continue
                    done.append(run(source, bits, seed, images_of, options, scratch))
                    output.write(json.dumps(done[-1]) + "\n")
                    output.flush()
                    print(json.dumps(done[-1]), flush=True)
    print(summary(done))


if __name__ == "__main__":
    main()
