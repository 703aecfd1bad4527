"""How much of the host's memory loading and preparing a checkpoint takes beside what is there before; a program.

    python host_peak.py FOLDER

FOLDER is made: a Llama of 32 layers with the proportions of LLaMA-7B, 3/32 as wide. So are rank and tokens, and the
blocks in which matrices are converted hold as small a share of them. Prints one JSON line, in bytes:
the model in bf16, and the most anonymous memory until its gradients were observed, and from then until it was prepared.
A small one goes the same way before, for what Python, torch and transformers keep ever after is no part of it.

What is freed must go back at once (`MALLOC_ARENA_MAX=1 MALLOC_MMAP_THRESHOLD_=65536`), or the figures are those of the
allocator: how much of it glibc keeps varies with the sizes that were asked for before, hence with the processor.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from fp8pipe.core.config import build_config
from fp8pipe.models.compat import import_transformers
from fp8pipe.models.language.sources import resolve_model
from fp8pipe.numerics import grids
from pipeline.falqon import base_files
from pipeline.finetune.config import FinetuneConfig
from pipeline.finetune.loading import load_model
from pipeline.finetune.loss import answer_loss
from pipeline.finetune.processes import build_method

SHAPES = {"hidden_size": 384, "intermediate_size": 1032, "num_attention_heads": 4, "vocab_size": 3000}
RANK, BATCH, LENGTH = 6, 4, 24
grids._BLOCK_VALUES = grids._BLOCK_VALUES * 9 // 1024
base_files.SHARD_BYTES = base_files.SHARD_BYTES * 9 // 1024


def anonymous() -> int:
    """Bytes of this process's memory that are no file's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))


class Watch(threading.Thread):
    """Looks every two milliseconds."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.observing, self.peak, self.over = 0, 0, False

    def run(self) -> None:
        while not self.over:
            self.peak = max(self.peak, anonymous())
            time.sleep(0.002)

    def observed(self) -> None:
        """What comes now is converting."""
        self.observing, self.peak = self.peak, 0


def prepare(folder: Path, watch: Watch) -> int:
    """Load and prepare the model there by the default way; its bytes."""
    config = build_config(
        FinetuneConfig, {"model": "m", "data": "d", "rank": RANK, "update_rule": "live", "device": "cpu"}
    )
    model = load_model(config, resolve_model(str(folder)))
    size = sum(parameter.nbytes for parameter in model.parameters())

    def losses() -> Iterator[Tensor]:
        for seed in range(config.gradient_batches):
            ids = torch.randint(0, 3000, (BATCH, LENGTH), generator=torch.Generator().manual_seed(seed))
            yield answer_loss(model, {"input_ids": ids}, ids, float(ids.numel()))
        watch.observed()  # asked for another batch when the last one's backward pass is done

    build_method(config).prepare(model, base_files.BaseFiles(folder / "checkpoints", "key"), losses)
    return size


def main() -> None:
    folder, transformers = Path(sys.argv[1]), import_transformers()
    for layers in (1, 32):
        shapes = transformers.LlamaConfig(**SHAPES, num_hidden_layers=layers)
        model = transformers.AutoModelForCausalLM.from_config(shapes, dtype=torch.bfloat16)
        model.save_pretrained(folder / str(layers))
        del model
    prepare(folder / "1", Watch())
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what is free goes back, or the model would lie in it
    before, watch = anonymous(), Watch()
    watch.start()
    size = prepare(folder / "32", watch)
    watch.over = True
    watch.join()
    print(json.dumps({"model": size, "observing": watch.observing - before, "converting": watch.peak - before}))


if __name__ == "__main__":
    main()
