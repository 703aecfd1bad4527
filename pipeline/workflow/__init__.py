"""The chain: a recipe's stages run in order, each once, each as the command a user would type.

`recipe.py` reads what is to be done, `state.py` with `keys.py` says what need not be done again, `process.py` runs a
stage, `gates.py` judges what it wrote, `chain.py` joins them. A stage is a process of its own: its memory is given
back, a crash in it is an exit code, and the command in the report is the one that ran.
"""

from pipeline.workflow.commands import StageCommand
from pipeline.workflow.recipe import GateSpec, Recipe, StageSpec, load_recipe
from pipeline.workflow.scheduler import Chain
from pipeline.workflow.state import ChainOptions, RunState, StageStatus

__all__ = [
    "Chain",
    "ChainOptions",
    "GateSpec",
    "Recipe",
    "RunState",
    "StageCommand",
    "StageSpec",
    "StageStatus",
    "load_recipe",
]
