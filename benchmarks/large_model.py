"""Measure memory and time of the commands that read a large checkpoint, compared with `cp` and `sha256sum` of it.

    python benchmarks/large_model.py --work DIR                  # Llama-3.1-8B's shape: 16 GB, and 35 GB of disk in all
    python benchmarks/large_model.py --work DIR --shape small    # 1.6 GB, to try the script

The checkpoint is synthetic: bf16 shards of at most 5 GB as `save_pretrained` writes them, with tensors taken from one
pool of normally distributed values, and a tiny tokenizer. In every round, `cp` and `sha256sum` run first and the other
commands after them, each in its own process. The files that a command reads are dropped from the page cache before it
starts.

For each command the script prints wall time and processor time in seconds, the peaks of resident memory (`VmHWM`, which
includes mapped files) and of anonymous memory (`RssAnon`), both sampled every 10 ms, and the ratio of its wall time to
that of `cp` and `sha256sum` together.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from comparison.processes import ContenderError, run_measured

SHAPES = {
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256},
    "small": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 14, "num_attention_heads": 16,
              "num_key_value_heads": 4, "vocab_size": 32000},
    "tiny": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 512},
}  # fmt: skip
SHARD_BYTES = 5_000_000_000
POOL = 1 << 26  # number of values in the pool from which tensors are taken


def tensors(shape):
    """Yield the name and shape of every tensor, in the order in which transformers writes them."""
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    keys = hidden // shape["num_attention_heads"] * shape["num_key_value_heads"]
    yield "model.embed_tokens.weight", (shape["vocab_size"], hidden)
    for layer in range(shape["num_hidden_layers"]):
        for name, size in {
            "input_layernorm": (hidden,), "mlp.down_proj": (hidden, inner), "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden), "post_attention_layernorm": (hidden,), "self_attn.k_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, hidden), "self_attn.q_proj": (hidden, hidden),
            "self_attn.v_proj": (keys, hidden),
        }.items():  # fmt: skip
            yield f"model.layers.{layer}.{name}.weight", size
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (shape["vocab_size"], hidden)


def make(root, shape):
    """Write a synthetic checkpoint to the directory `root`, unless it already contains a complete one.

    Args:
        root: the directory.
        shape: a value of `SHAPES`.
    """
    if (root / "config.json").is_file():
        return
    root.mkdir(parents=True, exist_ok=True)
    shards, filled = [[]], 0
    for name, size in tensors(shape):
        bytes_ = 2 * torch.Size(size).numel()
        if filled + bytes_ > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append((name, size, bytes_))
        filled += bytes_
    pool = (torch.randn(POOL, generator=torch.Generator().manual_seed(0)) * 0.02).to(torch.bfloat16)
    data = memoryview(pool.view(torch.uint8).numpy())
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for file, shard in zip(names, shards, strict=True):
        write_shard(root / file, shard, data)
    places = {name: file for file, shard in zip(names, shards, strict=True) for name, _, _ in shard}
    total = sum(bytes_ for shard in shards for _, _, bytes_ in shard)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (root / "model.safetensors.index.json").write_text(json.dumps(index))
    write_tokenizer(root)
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16"} | shape
    (root / "config.json").write_text(json.dumps(config))


def write_shard(path, shard, data):
    """Write one safetensors file.

    Args:
        path: the file.
        shard: (name, shape, number of bytes) of each tensor.
        data: the bytes of the pool; each tensor takes its values from another position on.
    """
    header, place = {"__metadata__": {"format": "pt"}}, 0
    for name, size, bytes_ in shard:
        header[name] = {"dtype": "BF16", "shape": size, "data_offsets": [place, place + bytes_]}
        place += bytes_
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for index, (_, _, bytes_) in enumerate(shard):
            start = 2 * (7919 * index % (POOL // 2))
            while bytes_:
                part = data[start : start + bytes_]
                stream.write(part)
                start, bytes_ = 0, bytes_ - len(part)
        os.fsync(stream.fileno())


def write_tokenizer(root):
    from tokenizers import Tokenizer, models

    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {chr(97 + i): 3 + i for i in range(26)}
    Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>")).save(str(root / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "eos_token": "</s>"}
    (root / "tokenizer_config.json").write_text(json.dumps(settings))


def forget(*roots):
    """Drop the files below some directories from the page cache."""
    for file in (file for root in roots for file in root.rglob("*") if file.is_file()):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def measure(command, *reads):
    """Run a command with a cold page cache.

    Args:
        command: the command line.
        *reads: directories whose files are dropped from the page cache first.

    Returns:
        Wall time and processor time in seconds, and the peaks of resident and of anonymous memory in bytes.
    """
    forget(*(root for root in reads if root.exists()))
    with tempfile.NamedTemporaryFile() as log:
        try:
            done = run_measured(command, Path(log.name), timeout_s=24 * 3600)
        except ContenderError as error:
            sys.exit(f"{' '.join(map(str, command))}: {error}")
    return done.seconds, done.processor_seconds, done.resident_bytes, done.anonymous_bytes


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    model, away, copy, export = (options.work / n for n in (f"model-{options.shape}", "away/model", "copy", "export"))
    away.parent.mkdir(parents=True, exist_ok=True)
    make(model, SHAPES[options.shape])
    to_vllm = ["--target", "vllm", "--output", export]
    fp8pipe = [sys.executable, "-P", "-m", "fp8pipe"]
    print(f"{'command':24}{'seconds':>9}{'processor':>11}{'resident':>11}{'anonymous':>11}{'times cp + sha256sum':>22}")
    for _ in range(options.rounds):
        plain = 0.0
        for name, reads, command in (
            ("cp", model, lambda: ["cp", "-r", model, copy]),
            ("sha256sum", model, lambda: ["sha256sum", *sorted(model.iterdir())]),
            ("export --target vllm", model, lambda: [*fp8pipe, "export", model, *to_vllm]),
            ("verify with its source", export, lambda: [*fp8pipe, "verify", export]),
            ("verify by itself", export, lambda: [*fp8pipe, "verify", export]),
            ("inspect", export, lambda: [*fp8pipe, "inspect", export]),
            ("sha256sum of the export", export, lambda: ["sha256sum", *sorted(export.iterdir())]),
        ):
            alone = name == "verify by itself"  # the source is where its record does not name it
            if alone:
                model.rename(away)
            seconds, processor, *memory = measure([str(part) for part in command()], reads)
            if alone:
                away.rename(model)
            shutil.rmtree(copy, ignore_errors=True)
            plain += seconds if name in ("cp", "sha256sum") else 0
            peaks = "".join(f"{value / 1e9:8.2f} GB" for value in memory)
            print(f"{name:24}{seconds:9.1f}{processor:11.1f}{peaks}{seconds / plain:22.2f}", flush=True)
        shutil.rmtree(export)


if __name__ == "__main__":
    main()
