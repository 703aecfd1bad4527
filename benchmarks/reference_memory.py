"""Memory and time of the torch side of `validate` for a vLLM export, without vLLM, for a Llama of any size.

    python benchmarks/reference_memory.py --work DIR                  # Llama-3.1-8B's shape: 16 GB of disk
    python benchmarks/reference_memory.py --work DIR --layers 2       # the same with 2 of its 32 layers: 3 GB
    python benchmarks/reference_memory.py --work DIR --shape small    # 1.6 GB, 0.8 billion parameters
    python benchmarks/reference_memory.py --work DIR --shape small --whole   # all weights in memory at once

The checkpoint is that of `large_model.py`; it is written where it is missing, and left there. As a validation of its
FP8 export does, the script asks the fp32 model of the rounded weights for texts, questions and two engines' answers,
and the bf16 model for texts and questions, and computes the figures; token ids are random.
Printed for each step are seconds and the peaks of the process's resident memory (`VmHWM`, which counts mapped files)
and anonymous memory (`RssAnon`, asked for every 20 ms).
"""

from __future__ import annotations

import argparse
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "5000")  # as the commands do: fp8pipe/core/machine.py

import torch
from large_model import SHAPES, make

from exporters.vllm.export import plan_export
from exporters.vllm.options import VllmExportOptions
from exporters.vllm.reopen import expected_blocks
from fp8pipe.models.language.parts import PART_BYTES, StoredWeights
from validation.vllm.reference import Reference, Text, losses, served_figures

LENGTHS = (18, 24, 26, 42, 40, 43)  # tokens of the texts and the questions
ANSWER = 16
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def kilobytes(name: str) -> int:
    return int(STATUS.read_text().split(f"{name}:")[1].split()[0])


@contextmanager
def measured(step: str) -> Iterator[None]:
    """Print a step's seconds and peaks."""
    ended, anonymous, began = threading.Event(), [kilobytes("RssAnon")], time.monotonic()

    def watch() -> None:
        while not ended.wait(0.02):
            anonymous[0] = max(anonymous[0], kilobytes("RssAnon"))

    CLEAR.write_text("5")  # resets VmHWM, see proc(5)
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
    peaks = "".join(f"{value * 1024 / 1e9:10.2f} GB" for value in (kilobytes("VmHWM"), anonymous[0]))
    print(f"{step:24}{time.monotonic() - began:9.1f}{peaks}", flush=True)


def main(work: Path, shape: str, *, layers: int | None, whole: bool) -> None:
    source = work / (f"model-{shape}" if layers is None else f"model-{shape}-{layers}")
    make(source, SHAPES[shape] | ({} if layers is None else {"num_hidden_layers": layers}))
    units = {unit.outputs[0].name: unit for unit in plan_export(source, VllmExportOptions()).units}
    headers = {name: unit.entry for name, unit in units.items()}
    stored = StoredWeights(headers, lambda name: expected_blocks(units[name]))
    print(f"{'step':24}{'seconds':>9}{'resident':>13}{'anonymous':>13}")
    with measured("start"):
        pass
    generator, vocabulary = torch.Generator().manual_seed(0), SHAPES[shape]["vocab_size"]

    def drawn(length: int) -> list[int]:
        return torch.randint(0, vocabulary, (length,), generator=generator).tolist()

    ids = [drawn(length) for length in LENGTHS]
    answers = [Text.of(drawn(length + ANSWER), length - 1) for length in LENGTHS[3:] * 2]
    with measured("fp32 model, 12 texts"):
        reference = Reference(source, stored, 1 << 60 if whole else PART_BYTES)
        true = reference.logprobs([*map(Text.of, ids), *answers])[: len(ids)]
    with measured("bf16 model, 6 texts"):
        reference.take_form(torch.bfloat16)
        form = reference.logprobs([*map(Text.of, ids)])
    with measured("figures"):
        places = [[{str(t): float(row[t]) for t in {*row.topk(20).indices.tolist(), after}}
                   for row, after in zip(table, text[1:], strict=False)]
                  for table, text in zip(form, ids, strict=True)]  # fmt: skip
        served_figures(true, form, places)
        losses(true, form, ids, places)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--layers", type=int, help="another number of layers than the shape's")
    parser.add_argument("--whole", action="store_true", help="read the model as one part")
    options = parser.parse_args()
    main(options.work, options.shape, layers=options.layers, whole=options.whole)
