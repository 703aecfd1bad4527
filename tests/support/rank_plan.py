"""What tests let the processes of `ranks` plan."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from tuning_config import config

from fp8pipe.cli import main


def planned(settings: dict[str, Any], folder: str) -> int:
    """Plan a run with the command line; its output goes to a file of this rank in `folder`. Returns the exit code."""
    rank = os.environ["RANK"]
    file = Path(folder) / f"{rank}.json"
    file.write_text(json.dumps(config(**settings).model_dump(mode="json", exclude_none=True)))
    sys.stdout = (Path(folder) / f"{rank}.out").open("w")
    try:
        main(["finetune", "--config", str(file), "--output", f"{folder}/out", "--dry-run", "--json"])
    except SystemExit as end:
        sys.stdout.close()
        return int(end.code or 0)
    return 0
