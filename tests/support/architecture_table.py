"""The page that says what becomes of each language architecture, written from the table of the tests."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

from language_models import ARCHITECTURES, Architecture

__all__ = ["PAGE", "page"]

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
HEAD = """# Language architectures

Any causal language model that transformers implements can be tuned: the model itself is asked which linears its text
decoder calls. What the tests try, on tiny random models, from the plan to an export that is reopened and verified, is
the table below; a cell that says `refused` is a refusal with that rule, told by the plan and before the first step, and
`--format bf16` remains. What vLLM does with the exports is another question, which `fp8pipe validate` answers.
Rows marked * are tried in a long run of the tests (`FP8PIPE_TEST_BREADTH=long`), the others in every run.

* Trained are linears of the text decoder that a pass of text calls. Output heads, vision towers and projectors keep
  their weights, and so do a linear whose weight the model reads without calling it, and one with a side of less than
  16 (a gate), which FP8 kernels cannot take, and which would bound the rank of all others; plan and manifest name each.
* Experts are trained one by one where checkpoints store them one by one (Mixtral, Qwen-MoE, DeepSeek and their like:
  [falqon.md](falqon.md#experts)). Where a checkpoint holds them stacked (gpt-oss, Granite-MoE, Llama 4) they keep their
  dtype. Routers keep theirs in every family; they are known by their place, beside the experts, with one row for each.
* Checkpoints keep their own tensor names through every stage, also where transformers renames or joins tensors when it
  loads them (GPT-NeoX, Gemma 3 and Qwen2.5-VL with images, experts).
* `unknown-matrix`: matrices that belong to no linear layer or embedding (experts that a checkpoint holds stacked,
  states and convolutions of Mamba, patch embeddings): how an engine holds them in an FP8 checkpoint is not known.

This page is written by `python tests/support/architecture_table.py` from `tests/support/language_models.py`;
`tests/pipeline/finetune/test_architectures.py` keeps the two alike, and runs every row.

| architecture | class | linears trained | left out | FP8, w8a16 | bf16 |
|---|---|---|---|---|---|
"""


def page() -> str:
    """The whole page."""
    return HEAD + "".join(_row(name, architecture) for name, architecture in ARCHITECTURES.items())


def _row(name: str, one: Architecture) -> str:
    reasons = dict.fromkeys(one.left_out.values())
    ends = {why: ", ".join(f"`{end}`" for end, given in one.left_out.items() if given == why) for why in reasons}
    left_out = "; ".join(f"{names}: {why}" for why, names in ends.items()) or "head"
    refused = f"refused: `{one.refused}`" if one.refused else "OK"
    return f"| {name}{'*' if one.rare else ''} | `{one.kind}` | {one.trained} | {left_out} | {refused} | OK |\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
