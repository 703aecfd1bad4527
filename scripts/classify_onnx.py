"""Classify pictures with an exported ONNX model: all that a service needs, in one file.

    python scripts/classify_onnx.py EXPORT picture.jpg ... [--top 5]
    python scripts/classify_onnx.py EXPORT FOLDER

FOLDER holds one folder of pictures a class, named as the model names it; then the accuracy is printed. It needs
onnxruntime, numpy and Pillow, and the files of the export; neither torch nor this project. Its preprocessing repeats
the training's bit for bit.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"}
BATCH = 64
FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}


def read_rgb(path: Path) -> Image.Image:
    """A picture of any mode as 8-bit RGB, turned as its EXIF data says."""
    try:
        image = ImageOps.exif_transpose(Image.open(path))
        image.load()
    except (OSError, SyntaxError, ValueError) as error:
        raise SystemExit(f"{path} cannot be read as a picture: {error}") from error
    if image.mode == "F":
        raise SystemExit(f"{path}: floating-point pixels have no known range")
    if image.mode.startswith("I"):  # 16-bit greys: their 8 high bits
        image = Image.fromarray((np.asarray(image).astype(np.int64).clip(0, 65535) >> 8).astype(np.uint8))
    return image.convert("RGB")


def preprocess(image: Image.Image, recipe: dict) -> np.ndarray:
    """(3, H, W) float32 of an RGB picture, by the export's preprocessing.json."""
    side = recipe["resize"]
    if isinstance(side, list):
        height, width = side
    elif image.height <= image.width:
        height, width = side, side * image.width // image.height
    else:
        height, width = side * image.height // image.width, side
    if (image.height, image.width) != (height, width):
        image = image.resize((width, height), FILTERS[recipe["interpolation"]])
    rows, columns = recipe["crop"]
    top, left = round((height - rows) / 2), round((width - columns) / 2)
    codes = np.asarray(image.crop((left, top, left + columns, top + rows))).transpose(2, 0, 1)
    mean, std = (np.array(recipe[key], np.float32).reshape(3, 1, 1) for key in ("mean", "std"))
    return (codes.astype(np.float32) / np.float32(recipe["divisor"]) - mean) / std


def open_model(export: Path) -> onnxruntime.InferenceSession:
    """The export's graph, under the settings that it was checked with (its manifest holds them)."""
    runtime = json.loads((export / "manifest.json").read_text(encoding="utf-8"))["runtime"]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    for key, value in runtime["session_entries"].items():
        options.add_session_config_entry(key, value)
    return onnxruntime.InferenceSession(
        str(export / "model.onnx"),
        options,
        disabled_optimizers=runtime["disabled_optimizers"],
        providers=["CPUExecutionProvider"],
    )


def classify(model: onnxruntime.InferenceSession, paths: list[Path], recipe: dict) -> np.ndarray:
    """(pictures, classes) logits."""
    pixels = np.stack([preprocess(read_rgb(path), recipe) for path in paths])
    return model.run(["logits"], {"pixels": pixels})[0]


def labelled(folder: Path, classes: list[str]) -> list[tuple[Path, int]]:
    """The pictures below `folder`, each with the index of its class."""
    folders = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    unknown = [path.name for path in folders if path.name not in classes]
    if unknown:
        raise SystemExit(f"{folder}: the model has no class {', '.join(unknown[:5])}; it has {', '.join(classes[:5])}")
    found = [
        (path, classes.index(sub.name))
        for sub in folders
        for path in sorted(sub.rglob("*"))
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()
    ]
    if not found:
        raise SystemExit(f"{folder} holds no folders of pictures")
    return found


def print_accuracy(model: onnxruntime.InferenceSession, folder: Path, classes: list[str], recipe: dict) -> None:
    """Top-1 and top-5 on all pictures of a folder."""
    pictures = labelled(folder, classes)
    first = five = 0
    for start in range(0, len(pictures), BATCH):
        chunk = pictures[start : start + BATCH]
        best = np.argsort(-classify(model, [path for path, _ in chunk], recipe), axis=1, kind="stable")[:, :5]
        right = best == np.array([label for _, label in chunk])[:, None]
        first, five = first + int(right[:, 0].sum()), five + int(right.any(1).sum())
    count = len(pictures)
    print(f"top-1 {first / count:.4f} ({first} of {count}), top-5 {five / count:.4f}")


def print_classes(
    model: onnxruntime.InferenceSession, path: Path, classes: list[str], recipe: dict, top: int, activation: str
) -> None:
    """The best classes of one picture with their probabilities; of a model of values, all of them."""
    logits = classify(model, [path], recipe)[0].astype(np.float64)
    if activation == "none":
        print(f"{path}: " + ", ".join(f"{name} {value:.6g}" for name, value in zip(classes, logits, strict=True)))
        return
    shares = np.exp(logits - logits.max()) if activation == "softmax" else 1 / (1 + np.exp(-logits))
    shares /= shares.sum() if activation == "softmax" else 1
    best = np.argsort(-shares, kind="stable")[:top]
    print(f"{path}: " + ", ".join(f"{classes[i]} {shares[i]:.1%}" for i in best))


def main() -> None:
    """Print the best classes of every picture, and the accuracy on every folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("export", type=Path)
    parser.add_argument("pictures", type=Path, nargs="+", help="pictures, or folders with one folder per class")
    parser.add_argument("--top", type=int, default=5, help="classes to print for a picture")
    arguments = parser.parse_args()
    if not (arguments.export / "classes.json").is_file():
        raise SystemExit(f"{arguments.export} is a backbone: its outputs are features, not classes")
    classes = json.loads((arguments.export / "classes.json").read_text(encoding="utf-8"))
    recipe = json.loads((arguments.export / "preprocessing.json").read_text(encoding="utf-8"))
    manifest = json.loads((arguments.export / "manifest.json").read_text(encoding="utf-8"))
    # Exports of before it was recorded are of classes that exclude each other.
    activation = manifest.get("details", {}).get("output", {}).get("activation", "softmax")
    model = open_model(arguments.export)
    for path in arguments.pictures:
        if path.is_dir():
            print_accuracy(model, path, classes, recipe)
        else:
            print_classes(model, path, classes, recipe, arguments.top, activation)


if __name__ == "__main__":
    main()
