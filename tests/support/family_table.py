"""The page of vision families that are taken all the way, written from the tests' registry: `docs/families.md`."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

from vit_families import FAMILIES, REFUSED, TO_TENSORRT, Family

__all__ = ["PAGE", "page"]

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
HEAD = """# Families of vision models

`quantize-vit` finds out what a model is made of by running it, so this list is not what is allowed, but what the tests
take all the way: quantized to 8 bits, exported to ONNX, validated in ONNX Runtime with the verdict `ACCEPT`, and where
the last column says so exported to TensorRT's graph. Each is a small member of its family with random weights.
What differs little from another is taken only by a long run of the tests (`FP8PIPE_TEST_BREADTH=long`).

Prefix tokens are class, distillation and register tokens. Constants are linears whose results are the same for all
pictures (nets that make position biases): they stay float, the artifact's warnings name them, and exports hold their
results.

This page is written by `python tests/support/family_table.py` from `tests/support/vit_families.py`; a test keeps the
two alike.

| family | built by | image | tokens | prefix | linears | constants | head | ONNX | TensorRT |
|---|---|---|---|---|---|---|---|---|---|
"""
REFUSALS = """
## Refused

Products outside of linears and torch's attention would stay in float without a word, so a model that has them is
refused, with the name of the module. These show which words to expect.

| family | built by | the refusal says |
|---|---|---|
"""


def page() -> str:
    """The whole page."""
    refused = (
        f"| {name} | {one.architecture.library} `{one.architecture.name}` | {one.says} |\n"
        for name, one in REFUSED.items()
    )
    return HEAD + "".join(map(_row, FAMILIES)) + REFUSALS + "".join(refused)


def _row(one: Family) -> str:
    tokens, prefix, *_ = one.first
    built = f"{one.architecture.library} `{one.architecture.name}`"
    image = "{}x{}".format(*one.architecture.image_size)
    head = ", ".join(f"`{name}`" for name in one.heads) or "none"
    last = "yes" if one.name in TO_TENSORRT else ""
    cells = (one.name, built, image, tokens, prefix, one.linears, one.constants or "", head, "yes", last)
    return f"| {' | '.join(map(str, cells))} |\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
