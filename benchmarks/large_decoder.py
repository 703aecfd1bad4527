"""Memory and time of `fp8pipe export --target trt` of a language model, by parameter.

    python benchmarks/large_decoder.py --work DIR                    # TinyLlama-1.1B's shape: 1.2 GB of codes
    python benchmarks/large_decoder.py --work DIR --shape smollm2    # SmolLM2-135M's shape
    python benchmarks/large_decoder.py --work DIR --shape smollm2 --builder rtx    # and an engine for 8.9

The artifact is synthetic: what `finetune` writes, with random codes, one power of two as scale of every linear layer,
and a tiny tokenizer. Calibration and perplexity use 60 records of 20 words. Gates on perplexity and precision are
waived, since random weights predict nothing.

The export runs in a process of its own, whose peaks of resident memory (`VmHWM`, which counts mapped files) and of
anonymous memory (`RssAnon`) are asked for every 10 ms. Processes that build engines are not part of them.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from pathlib import Path

import torch
from large_model import measure, tensors
from safetensors.torch import save_file

from fp8pipe.artifact import ArtifactWriter, LayerRecord, NumberFormat
from fp8pipe.artifact.kinds import TunedDetails
from fp8pipe.artifact.manifest import Encoding, ScaleRule

SHAPES = {
    "tinyllama": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
                  "num_key_value_heads": 4, "vocab_size": 32000},
    "smollm2": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
                "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True},
}  # fmt: skip
SCALE = 2.0**-10
RECORDS, WORDS = 60, 20


def make(root, shape):
    """Write the artifact, unless a finished one is there."""
    if (root / "manifest.json").is_file():
        return
    generator = torch.Generator().manual_seed(0)
    with ArtifactWriter(root, kind="falqon", stage="finetune") as writer:
        held, layers = {}, []
        for name, size in tensors(shape):
            if name == "lm_head.weight" and shape.get("tie_word_embeddings"):
                continue
            if not name.endswith("_proj.weight"):
                norm = len(size) == 1
                held[name] = (torch.ones(size) if norm else torch.randn(size, generator=generator) * 0.02).bfloat16()
                continue
            values = torch.randn(size, generator=generator) * (0.02 / SCALE)
            held[name] = values.clamp(-448, 448).to(torch.float8_e4m3fn)
            held[f"{name}_scale"] = torch.tensor(SCALE)
            layers.append(record(name.removesuffix(".weight"), size))
        save_file(held, writer.root / "model.safetensors", metadata={"format": "pt"})
        write_tokenizer(writer.root)
        (writer.root / "chat_template.jinja").write_text(
            "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }}\n{% endfor %}"
        )
        config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16"} | shape
        (writer.root / "config.json").write_text(json.dumps(config))
        save_file({"unused": torch.zeros(1)}, writer.root / "adapter.safetensors")
        (writer.root / "metrics.jsonl").write_text('{"step": 0}\n')
        writer.commit(
            number_format=NumberFormat(name="e4m3", granularity="per-tensor"), layers=layers,
            details=TunedDetails(adapter="flushed", rule="live", rank=4, base_dtype="bfloat16", transposed=[]),
        )  # fmt: skip


def write_tokenizer(root):
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {chr(97 + i): 3 + i for i in range(26)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(root / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "eos_token": "</s>"}
    (root / "tokenizer_config.json").write_text(json.dumps(settings))


def record(name, size):
    weight = Encoding(format="e4m3", bits=8, granularity="per-tensor", scale_rule=ScaleRule.POWER_OF_TWO)
    inputs = Encoding(format="e4m3", bits=8, dynamic=True, granularity="per-token", scale_rule=ScaleRule.POWER_OF_TWO)
    return LayerRecord(name=name, shape=size, weight=weight, activation=inputs)


def write_text(path):
    """Question-answer pairs of single letters, which are the tokenizer's words."""
    generator = torch.Generator().manual_seed(0)
    letters = torch.randint(0, 26, (RECORDS, WORDS), generator=generator).tolist()
    rows = [[chr(97 + letter) for letter in row] for row in letters]
    pairs = [{"prompt": " ".join(row[: WORDS // 2]), "completion": " ".join(row[WORDS // 2 :])} for row in rows]
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--shape", choices=SHAPES, default="tinyllama")
    parser.add_argument("--builder", choices=("none", "rtx"), default="none")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    shape = SHAPES[options.shape]
    source, text, export = (options.work / name for name in (f"tuned-{options.shape}", "pairs.jsonl", "export"))
    make(source, shape)
    write_text(text)
    parameters = sum(math.prod(size) for _, size in tensors(shape) if len(size) == 2)
    parameters -= shape["hidden_size"] * shape["vocab_size"] * bool(shape.get("tie_word_embeddings"))
    command = [sys.executable, "-P", "-m", "fp8pipe", "export", source, "--target", "trt", "--output", export,
               "--calibration-data", text, "--builder", options.builder, "--compute-capability", "8.9", "--no-require",
               "--force"]  # fmt: skip
    seconds, processor, resident, anonymous = measure([str(part) for part in command], source)
    print(f"{options.shape}: {parameters / 1e6:.0f} M parameters, {seconds:.1f} s on the clock, {processor:.1f} s of "
          f"processor time, {seconds / parameters * 1e9:.0f} s a billion parameters; resident {resident / 1e9:.2f} GB, "
          f"anonymous {anonymous / 1e9:.2f} GB")  # fmt: skip
    shutil.rmtree(export)


if __name__ == "__main__":
    main()
