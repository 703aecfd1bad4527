"""FALQON in a plain PyTorch training loop: convert the model, train, merge B into the codes, save an artifact.

python examples/own_training_loop.py BASE_MODEL TEXT_FILE OUTPUT
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fp8pipe import falqon


def main(base: str, text: str, output: str, steps: int = 8, length: int = 32) -> None:
    """Train on the file `text`, cut into sequences of `length` tokens, and write the artifact `output`.

    `base` is a directory in Hugging Face format or a hub ID. An existing `output` is replaced.
    """
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    ids = torch.tensor([tokenizer(Path(text).read_text())["input_ids"]])
    batches = [{"input_ids": part, "labels": part} for part in ids.split(length, 1) if part.shape[1] == length]

    tuned = falqon.convert(model, rank=8, losses=lambda: (model(**batch).loss for batch in batches[:2]))
    optimizer = torch.optim.AdamW(tuned.parameters(), lr=1e-3)
    for step in range(steps):
        loss = model(**batches[step % len(batches)]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        tuned.after_step()
        print(f"step {step}: loss {loss.item():.4f}")
    tuned.final_merge(batches)
    artifact = tuned.save(base, output, force=True)
    print(f"{artifact.root}\n  next: fp8pipe export {artifact.root} --target vllm --output {artifact.root}-vllm")


if __name__ == "__main__":
    main(*sys.argv[1:4])
