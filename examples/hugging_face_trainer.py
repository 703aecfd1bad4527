"""FALQON with the Trainer of transformers: a callback merges rows of B into the FP8 codes after each optimizer step.

python examples/hugging_face_trainer.py BASE_MODEL TEXT_FILE OUTPUT
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from fp8pipe import falqon


def main(base: str, text: str, output: str, steps: int = 8, length: int = 32) -> None:
    """Fine-tune a language model on a text file with FALQON, and write an artifact for `fp8pipe export`.

    Args:
        base: the base model: a directory in Hugging Face format, or a hub ID.
        text: path of a text file; its tokens are cut into sequences of `length`, and a remainder is dropped.
        output: directory of the artifact; an existing one is replaced.
        steps: number of optimizer steps.
        length: tokens per sequence.
    """
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    ids = torch.tensor(tokenizer(Path(text).read_text())["input_ids"])
    records = [{"input_ids": part, "labels": part} for part in ids.split(length) if len(part) == length]

    tuned = falqon.convert(model, rank=8, update_rule_name="live-flush")
    with tempfile.TemporaryDirectory() as scratch:
        # No checkpoints: the Trainer would save FALQON's layers as weights of the original model class, which cannot
        # be loaded again.
        arguments = TrainingArguments(
            scratch, max_steps=steps, per_device_train_batch_size=2, learning_rate=1e-3, save_strategy="no",
            report_to=[], use_cpu=not torch.cuda.is_available(), disable_tqdm=True,
        )  # fmt: skip
        Trainer(model, arguments, train_dataset=records, callbacks=[tuned.callback()]).train()
    tuned.final_merge([{"input_ids": record["input_ids"][None]} for record in records])
    artifact = tuned.save(base, output, force=True)
    print(f"{artifact.root}\n  next: fp8pipe export {artifact.root} --target vllm --output {artifact.root}-vllm")


if __name__ == "__main__":
    main(*sys.argv[1:4])
