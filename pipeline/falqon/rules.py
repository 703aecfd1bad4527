"""Update rules: named ways to merge the optimizer's update of B into the FP8 codes.

The weights are exactly on the FP8 grid, so an update of less than half a quantization step (3 to 6 % of a weight's
value in E4M3) is rounded away. The rules differ in when they round, in what they do with the rounding residual, and in
whether the pending update takes part in the forward pass. The measurements that led to the default are in
`docs/update-rules.md`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from fp8pipe.core.errors import ConfigurationError
from fp8pipe.numerics.kinds import ScaleRule


class Initialisation(StrEnum):
    """How the adapter's A is initialised; the choices are described in `initialise.py`."""

    SVD = "svd"
    RANDOMIZED_SVD = "randomized-svd"
    RANDOM = "random"
    GRADIENT = "gradient"
    UNIFORM = "uniform"


class Rounding(StrEnum):
    """How a flush after a step rounds the updated weights to the FP8 grid."""

    NEAREST = "nearest"
    STOCHASTIC = "stochastic"


class FinalMerge(StrEnum):
    """How the update that is still in B is rounded when it is merged at the end of training."""

    NEAREST = "nearest"
    COMPENSATED = "compensated"


@dataclass(frozen=True, slots=True)
class UpdateRule:
    """A way to merge B into the FP8 codes.

    Attributes:
        name: the name by which users select the rule.
        live: B takes part in the forward pass until it is merged.
        trains_a: A is trained, too; only for live rules that merge once, at the end.
        flush_every_step: selected rows are merged after every optimizer step; otherwise B is merged only at the end.
        clear_all: a flush clears all of B; otherwise only the flushed rows.
        rank_rows: flush `rank` rows regardless of `--rows`, as the released code does (its warm-up never ends).
        rounding: rounding of the flush after each step.
        error_feedback: the rounding residual is projected onto A and stored in B, to be merged by a later flush.
        scale: scale rule of weights and activations; with `EXACT`, ties in row selection are resolved as in the
            released code.
        stacked: linear layers with the same input share scale, A and GEMMs.
        final: rounding of the final merge.
        initialisation: how A is initialised by default.
    """

    name: str
    live: bool
    flush_every_step: bool
    trains_a: bool = False
    clear_all: bool = False
    rank_rows: bool = False
    rounding: Rounding = Rounding.NEAREST
    error_feedback: bool = False
    scale: ScaleRule = ScaleRule.POWER_OF_TWO
    stacked: bool = True
    final: FinalMerge = FinalMerge.NEAREST
    initialisation: Initialisation = Initialisation.GRADIENT


_ERROR_SVD = Initialisation.RANDOMIZED_SVD
_RULES = (
    UpdateRule("live", live=True, flush_every_step=False, final=FinalMerge.COMPENSATED),
    UpdateRule(
        "live-both",
        live=True,
        flush_every_step=False,
        trains_a=True,
        final=FinalMerge.COMPENSATED,
        initialisation=Initialisation.UNIFORM,
    ),
    UpdateRule("live-nearest", live=True, flush_every_step=False),
    UpdateRule("live-flush", live=True, flush_every_step=True),
    UpdateRule(
        "released",
        live=False,
        flush_every_step=True,
        clear_all=True,
        rank_rows=True,
        scale=ScaleRule.EXACT,
        stacked=False,
        initialisation=Initialisation.SVD,
    ),
    UpdateRule("live-svd", live=True, flush_every_step=False, final=FinalMerge.COMPENSATED, initialisation=_ERROR_SVD),
    UpdateRule("accumulate", live=False, flush_every_step=True, initialisation=_ERROR_SVD),
    UpdateRule(
        "accumulate-feedback", live=False, flush_every_step=True, error_feedback=True, initialisation=_ERROR_SVD
    ),
    UpdateRule(
        "accumulate-stochastic",
        live=False,
        flush_every_step=True,
        rounding=Rounding.STOCHASTIC,
        initialisation=_ERROR_SVD,
    ),
)

RULES: dict[str, UpdateRule] = {rule.name: rule for rule in _RULES}
DEFAULT_RULE = "live"


def update_rule(name: str) -> UpdateRule:
    """The update rule called `name`.

    Raises:
        ConfigurationError: there is no rule of that name.
    """
    if name not in RULES:
        raise ConfigurationError(
            f"unknown update rule {name!r}", why=f"the rules are: {', '.join(RULES)}", fix="pick one of them"
        )
    return RULES[name]
