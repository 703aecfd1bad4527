"""Workflows: run the stages of a recipe in order, each as the command that a user would type.

`recipe.py` reads the recipe, `state.py` and `keys.py` determine which stages are up to date, `runner.py` runs the
others, and `gates.py` checks their output against thresholds. Each stage is a separate process, so that its memory is
freed, a crash does not end the run, and the report contains exactly the command that ran. On clusters, each stage is a
job that runs `fp8pipe run --only STAGE`: `ray_run.py`, `kubernetes.py`.
"""

from pipeline.workflow.recipe import GateSpec, Recipe, StageSpec, load_recipe
from pipeline.workflow.resources import Resources
from pipeline.workflow.runner import WorkflowRunner
from pipeline.workflow.state import RunOptions, RunState, StageCommand, StageStatus

__all__ = [
    "GateSpec", "Recipe", "Resources", "RunOptions", "RunState", "StageCommand", "StageSpec", "StageStatus",
    "WorkflowRunner", "load_recipe",
]  # fmt: skip
