"""Write the held-out or the training part of scikit-learn's digits as an image folder of PNG files.

    python scripts/write_digits.py FOLDER [--part held-out|train]

`sample:vit-digits` was not trained on the held-out part, so that part is suitable for measuring its accuracy.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fp8pipe.core.errors import Fp8PipeError
from fp8pipe.models.vision.samples import digits_split, write_digits


def main() -> int:
    """Parse the command line, write the images, and print their number; returns the exit code."""
    parser = argparse.ArgumentParser(description="Write scikit-learn's digits as an image folder.")
    parser.add_argument("folder", type=Path, help="a folder that does not exist yet, or is empty")
    parser.add_argument("--part", choices=("held-out", "train"), default="held-out", help="which images")
    options = parser.parse_args()
    try:
        train, held_out = digits_split()
        part = train if options.part == "train" else held_out
        write_digits(options.folder, part)
    except Fp8PipeError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(f"{options.folder}: {len(part.labels)} images")
    return 0


if __name__ == "__main__":
    sys.exit(main())
