"""Train a small Llama on plain text, so that comparisons are not made on one model alone.

    python benchmarks/train_llama.py --text FILE --output runs/llama [--minutes 40]

FILE is plain text; the documentation uses the GNU Collaborative International Dictionary of English (Debian's package
`dict-gcide`, `zcat gcide.dict.dz > gcide.txt`). The tokenizer is a byte-level BPE of 8,192 tokens, trained on the same
text; the model has 12 layers of width 384 (22.6 M parameters) and is trained in bf16 with fp32 weights until the time
is up, with a linear warmup and a cosine decay over time. The last hundredth of the text is held out. The result is a
model directory with a chat template, for `fp8pipe finetune --model` and every benchmark that takes a model.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from fp8pipe.models.compat import import_transformers
from fp8pipe.numerics.bf16 import widen_bf16_products

END, START, STOP = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def train_tokenizer(text):
    """A byte-level BPE of 8,192 tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=8192, special_tokens=[END, START, STOP], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(text.split("\n\n"), trainer)
    return tokenizer


def new_model(transformers, context):
    """A Llama with random weights."""
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=8192, hidden_size=384, intermediate_size=1024, num_hidden_layers=12, num_attention_heads=6,
            num_key_value_heads=3, max_position_embeddings=4 * context, tie_word_embeddings=True, bos_token_id=0,
            eos_token_id=2, pad_token_id=0, attn_implementation="eager",
        )
    )  # fmt: skip


def loss_of(model, tokens):
    """The mean loss of all tokens after the first of their row."""
    with torch.autocast("cpu", torch.bfloat16):
        return model(input_ids=tokens, labels=tokens, use_cache=False).loss


def train(model, tokens, options):
    """Train on random rows of `tokens` for the given time; returns the number of steps."""
    decayed = [p for p in model.parameters() if p.ndim == 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": [p for p in model.parameters() if p.ndim < 2]}]
    optimizer = torch.optim.AdamW(groups, lr=options.rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    generator = torch.Generator().manual_seed(options.seed)
    started, steps, shown = time.monotonic(), 0, 0.0
    while (share := (time.monotonic() - started) / (60 * options.minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = options.rate * min((steps + 1) / 100, 0.05 + 0.95 * (1 + math.cos(math.pi * share)) / 2)
        rows = torch.randint(len(tokens) - options.context, (options.batch,), generator=generator)
        loss = loss_of(model, torch.stack([tokens[i : i + options.context] for i in rows]))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
        if share - shown >= 0.02:
            shown = share
            print(f"{share:5.1%}  {steps} steps  loss {loss.item():.3f}", flush=True)
    return steps


def main():
    """Train and save tokenizer and model; print the loss of the held-out text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=40)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    transformers = import_transformers()
    widen_bf16_products()
    torch.manual_seed(options.seed)
    text = options.text.read_text(encoding="utf-8", errors="replace")
    tokenizer = train_tokenizer(text)
    tokens = torch.tensor(tokenizer.encode(text).ids)
    held = tokens[-len(tokens) // 100 :]
    model = new_model(transformers, options.context)
    steps = train(model, tokens[: len(tokens) - len(held)], options)
    model.eval()
    with torch.no_grad():
        rows = held[: len(held) // options.context * options.context].view(-1, options.context)
        loss = sum(loss_of(model, row).item() * len(row) for row in rows.split(32)) / len(rows)
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=STOP, pad_token=END, chat_template=TEMPLATE
    )
    wrapped.save_pretrained(options.output)
    model.to(torch.bfloat16).save_pretrained(options.output)
    size = options.text.stat().st_size / len(tokens)
    facts = {"steps": steps, "tokens": steps * options.batch * options.context, "bytes_a_token": round(size, 3)}
    print(json.dumps(facts | {"heldout_loss": round(loss, 4)}))


if __name__ == "__main__":
    main()
