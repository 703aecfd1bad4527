"""Workflows: run the stages of a recipe in order, each once, each as the command a user would type.

`recipe.py` reads the recipe, `state.py` and `keys.py` determine which stages are up to date, `runner.py` runs stages,
`gates.py` checks their output against thresholds. Each stage is a separate process: its memory is freed, a crash in it
is an exit code, and the command in the report is exactly the one that ran.
"""

from pipeline.workflow.recipe import GateSpec, Recipe, StageSpec, load_recipe
from pipeline.workflow.runner import WorkflowRunner
from pipeline.workflow.state import RunOptions, RunState, StageCommand, StageStatus

__all__ = [
    "GateSpec", "Recipe", "RunOptions", "RunState", "StageCommand", "StageSpec", "StageStatus", "WorkflowRunner",
    "load_recipe",
]  # fmt: skip
