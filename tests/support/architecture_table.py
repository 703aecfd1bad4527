"""Writes docs/architectures.md from the table of architectures that the tests run."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

from language_models import ARCHITECTURES, Architecture

__all__ = ["PAGE", "page"]

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
HEAD = """# Language architectures

Any causal language model that transformers implements can be fine-tuned. Which linear layers are trained is not decided
by name: a forward pass on text shows which ones the text decoder calls. The table lists the architectures that the
tests run on tiny random models, from the dry run to an export that is reopened and verified. `refused` means that the
linter rejects an FP8 export by the named rule; `--dry-run` and `finetune` say so before the first step, and
`--format bf16` still works. Whether vLLM runs an export correctly is what `fp8pipe validate` checks.
Rows marked * run in the long test suite only (`FP8PIPE_TEST_BREADTH=long`).

* **Trained:** the linear layers that the text decoder calls on text. **Not trained:** output heads, vision towers and
  projectors; linear layers whose weight the model reads without calling the layer; and linear layers with a side below
  16 (gates), which FP8 kernels do not support and which would limit the rank of every other layer. `--dry-run` and the
  manifest name each layer that is left out.
* Experts are trained one by one where checkpoints store them one by one (Mixtral, Qwen-MoE, DeepSeek and similar), and
  those of gpt-oss, Granite-MoE and Llama 4, which store stacks ([falqon.md](falqon.md#experts)). Other stacks (Aria)
  keep their dtype. Routers keep theirs in every family; they are recognized by their place beside the experts, with one
  row for each.
* Exports keep the tensor names of the original checkpoint, also where transformers renames or merges tensors on
  loading (GPT-NeoX, Gemma 3 and Qwen2.5-VL with images, experts). FP8 exports hold experts one by one.
* `unknown-matrix`: the decoder has matrices that belong to no linear layer or embedding (other stacked
  experts, state and convolution weights of Mamba), and how an engine stores them in an FP8 checkpoint is not known.

This page is written by `python tests/support/architecture_table.py` from `tests/support/language_models.py`;
`tests/pipeline/finetune/test_architectures.py` checks that the two agree, and runs every row.

| architecture | class | linear layers trained | left out | FP8, w8a16 | bf16 |
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
