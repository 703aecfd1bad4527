"""`fp8pipe` with the quick stages of `workflow_runner.py` as the commands of recipes, here and on a cluster's nodes."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from workflow_runner import ROOT, quick_commands

sys.path.insert(0, ROOT)

import fp8pipe.cli.stages
from fp8pipe.cli import main

if __name__ == "__main__":
    fp8pipe.cli.stages.stage_commands = quick_commands
    if "--ray" in sys.argv:  # not in jobs, which would import for nothing
        from pipeline.workflow import ray_run

        ray_run.PROGRAM = ("-P", __file__)
    main()
