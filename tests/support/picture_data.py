"""Training records about images: what is asked is the same in all, so that only the image tells the answer."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from PIL import Image

__all__ = ["about", "paint", "write_colours"]

_SIZES = ((56, 56), (84, 56), (56, 112))


def paint(file: Path, colour: tuple[int, int, int], size: tuple[int, int] = _SIZES[0]) -> Path:
    """An image of one colour (red, green, blue), of (width, height) pixels."""
    Image.new("RGB", size, colour).save(file)
    return file


def about(*parts: str | Path, answer: str = "yes") -> dict[str, Any]:
    """A record with one question, whose parts are texts and paths of images."""
    content = [
        {"type": "image_url", "image_url": {"url": part.name}} if isinstance(part, Path) else
        {"type": "text", "text": part} for part in parts
    ]  # fmt: skip
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]}


def write_colours(folder: Path, count: int, question: str = "Colour?") -> Path:
    """Data of `count` reddish and bluish images, in turn, and of three sizes; the answers are r and b."""
    drawn, rows = random.Random(0), []
    for number in range(count):
        red, bright = number % 2 == 0, drawn.randrange(190, 256)
        colour = (bright if red else drawn.randrange(60), drawn.randrange(60), drawn.randrange(60) if red else bright)
        image = paint(folder / f"{number}.png", colour, _SIZES[number // 2 % len(_SIZES)])
        rows.append(about(image, question, answer="r" if red else "b"))
    data = folder / "colours.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return data
