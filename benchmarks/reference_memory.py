"""Memory and time of a validation's torch side for a Llama of any size, without vLLM: its weights are random.

As a validation does, it asks the fp32 model for texts, questions and two engines' answers, then the model in bf16,
computes the figures, and hashes tensors for the engines: the embedding, the head and one layer. Peaks are each step's.

    python benchmarks/reference_memory.py --folder runs/llama-8b --shape 8b
    python benchmarks/reference_memory.py --folder runs/llama-135m --shape 135m --whole

`--whole` reads the model as one part, which needs 4 bytes a parameter and more. The folder is written if it is not
there (2 bytes a parameter); it is left there.
"""

from __future__ import annotations

import argparse
import json
import os
import threading
import time
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "5000")  # as the commands do: fp8pipe/core/machine.py

import torch
from safetensors.torch import save_file

from fp8pipe.models.checkpoint.tensors import read_tensor, weight_entries
from fp8pipe.models.compat import import_transformers
from fp8pipe.models.language.parts import PART_BYTES, StoredWeights
from validation.vllm.expected import Expected, Holding
from validation.vllm.reference import Reference, Text, losses, served_figures

# hidden, intermediate, layers, heads, key/value heads, vocabulary, tied head
SHAPES = {
    "135m": (576, 1536, 30, 9, 3, 49152, True),
    "1.1b": (2048, 5632, 22, 32, 4, 32000, False),
    "8b": (4096, 14336, 32, 32, 8, 128256, False),
}
LENGTHS = (18, 24, 26, 42, 40, 43)  # tokens of the texts and the questions
ANSWER = 16


def write(folder: Path, shape: str) -> None:
    """A checkpoint, a shard a layer: repeated random numbers, so that it is quick."""
    hidden, between, layers, heads, shared, vocabulary, tied = SHAPES[shape]
    config = import_transformers().LlamaConfig(
        hidden_size=hidden, intermediate_size=between, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=shared, vocab_size=vocabulary, tie_word_embeddings=tied, dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = import_transformers().LlamaForCausalLM(config)
    shards: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, tensor in model.state_dict().items():
        if name not in model.all_tied_weights_keys:
            shards.setdefault(".".join(name.split(".")[:3]), {})[name] = tuple(tensor.shape)
    table = (torch.randn(1 << 22) * hidden**-0.5).bfloat16()
    for shard, shapes in shards.items():
        numbers = {name: drawn(table, size) for name, size in shapes.items()}
        save_file(numbers, folder / f"{shard}.safetensors", metadata={"format": "pt"})
    index = {name: f"{shard}.safetensors" for shard, shapes in shards.items() for name in shapes}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def drawn(table: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
    """Numbers of a table, over and over; ones for norms."""
    if len(size) == 1:
        return torch.ones(size, dtype=table.dtype)
    count = torch.Size(size).numel()
    return table.repeat(-(-count // table.numel()))[:count].view(size)


class Watch(threading.Thread):
    """Peaks of this process's memory, bytes: anonymous, and resident in all."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.anonymous = self.resident = 0

    def run(self) -> None:
        """Look ten times a second."""
        while True:
            lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
            self.anonymous = max(self.anonymous, int(lines["RssAnon"].split()[0]) * 1024)
            self.resident = max(self.resident, int(lines["VmRSS"].split()[0]) * 1024)
            time.sleep(0.1)


def main(folder: Path, shape: str, *, whole: bool) -> None:
    if not folder.exists():
        write(folder, shape)
    watch = Watch()
    watch.start()
    entries = weight_entries(folder)
    stored = StoredWeights({n: e.shape for n, e in entries.items()}, lambda name: read_tensor(entries[name]).float())

    def told(step: str, started: float) -> None:
        peaks = {"anonymous_gb": round(watch.anonymous / 1e9, 2), "resident_gb": round(watch.resident / 1e9, 2)}
        print(json.dumps({"step": step, "seconds": round(time.monotonic() - started, 1), **peaks}), flush=True)
        watch.anonymous = watch.resident = 0

    started = time.monotonic()
    generator = torch.Generator().manual_seed(0)
    vocabulary = SHAPES[shape][5]
    ids = [torch.randint(0, vocabulary, (length,), generator=generator).tolist() for length in LENGTHS]
    answers = [Text(torch.randint(0, vocabulary, (n + ANSWER,), generator=generator).tolist(), n - 1)
               for n in LENGTHS[3:] * 2]  # fmt: skip
    reference = Reference(folder, stored, 1 << 60 if whole else PART_BYTES)
    true = reference.logprobs([*map(Text, ids), *answers])[: len(ids)]
    told("exact", started)
    started = time.monotonic()
    reference.take_form(torch.bfloat16)
    form = reference.logprobs([*map(Text, ids)])
    told("form", started)
    started = time.monotonic()
    places = [[{str(t): float(row[t]) for t in {*row.topk(20).indices.tolist(), after}}
               for row, after in zip(table, text[1:], strict=False)]
              for table, text in zip(form, ids, strict=True)]  # fmt: skip
    served_figures(true, form, places)
    losses(true, form, ids, places)
    told("figures", started)
    del true, form, reference
    started = time.monotonic()
    for name in [name for name in entries if ".layers." not in name or ".layers.0." in name]:
        tensor = Expected(name, stored.read(name), None, False)
        for dtype in (torch.float32, torch.bfloat16):
            for held in tensor.held(Holding(dtype)):
                held.digests()
        del tensor, held
    told("hash", started)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--whole", action="store_true", help="read the model as one part")
    options = parser.parse_args()
    main(options.folder, options.shape, whole=options.whole)
