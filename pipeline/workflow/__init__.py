"""Workflows: a recipe's stages run in order, each once, each as the command a user would type.

`recipe.py` reads what is to be done, `state.py` with `keys.py` says what need not be done again, `runner.py` runs
stages, `gates.py` judges what they wrote. A stage is a process of its own: its memory is given
back, a crash in it is an exit code, and the command in the report is the one that ran.
"""

from pipeline.workflow.recipe import GateSpec, Recipe, StageSpec, load_recipe
from pipeline.workflow.runner import WorkflowRunner
from pipeline.workflow.state import RunOptions, RunState, StageCommand, StageStatus

__all__ = [
    "GateSpec", "Recipe", "RunOptions", "RunState", "StageCommand", "StageSpec", "StageStatus", "WorkflowRunner",
    "load_recipe",
]  # fmt: skip
