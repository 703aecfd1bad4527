"""Measure this project on a GPU in a few minutes: correctness against the CPU first, then speed and memory.

    python scripts/gpu_session.py                            ten minutes at most; writes gpu-session.json
    python scripts/gpu_session.py --minutes 4 --parts environment correctness steps --output first.json
    python scripts/gpu_session.py --device cpu --tiny        the same code with small shapes, to test the script
    python scripts/gpu_session.py --table gpu-session.json   print an existing record as Markdown

The script needs torch, transformers and pydantic, but downloads nothing: all weights are random. peft and bitsandbytes
are used if they are installed. `docs/gpu.md` describes what each part measures.

The most important parts run first, each in a separate process that is killed when its time is up. If a kernel hangs or
corrupts its CUDA context, only the remaining rows of that part are lost. The record is rewritten after each row. Exit
code 0 means that every part finished, not that every check passed; rows with errors are shown in the table.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "5000")  # as fp8pipe/core/machine.py does for the commands
# Otherwise, checking for a GPU would initialize CUDA, and forked processes could not use it.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the package may not be installed, only copied here

from gpu_parts import BEGAN
from gpu_parts.record import Record
from gpu_parts.session import PARTS, run_session
from gpu_parts.table import table

from fp8pipe.core.errors import ConfigurationError, Fp8PipeError


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure this project on a GPU; see docs/gpu.md.")
    parser.add_argument("--minutes", type=float, default=10.0, help="total wall time, minutes (default: 10)")
    parser.add_argument(
        "--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="parts to measure (default: all)"
    )
    parser.add_argument("--output", type=Path, default=Path("gpu-session.json"), help="record to write; must not exist")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="device to measure")
    parser.add_argument("--tiny", action="store_true", help="small shapes and few rounds, to test the script")
    parser.add_argument("--table", type=Path, help="only print the table of this record")
    options = parser.parse_args()
    if options.minutes <= 0:
        parser.error("--minutes must be positive")
    return options


def main() -> int:
    """Run from the command line; prints the table to stdout and progress to stderr, and returns the exit code."""
    options = _arguments()
    try:
        if options.table is not None:
            print(table(Record.read(options.table).data))
            return 0
        if options.output.exists():
            raise ConfigurationError(
                f"{options.output} already exists", why="a record is never overwritten", fix="give another --output"
            )
        record = Record.begin(options.output, vars(options))
        ran = run_session(
            record, options.parts, options.device, tiny=options.tiny, minutes=options.minutes, began=BEGAN
        )
    except Fp8PipeError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(table(record.data))
    return 0 if ran else 1


if __name__ == "__main__":
    sys.exit(main())
