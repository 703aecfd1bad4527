"""How the optimizer's update of B is merged into the FP8 codes: named rules, each a frozen set of choices.

The weights are exactly on the FP8 grid, so an update below half a quantization step is rounded away (E4M3's half step
is 3 to 6 % of a weight's value). The rules differ in when they round, in what they do with the rounding residual, and
in whether the pending update takes part in the forward pass. The measurements behind the default are in
`docs/update-rules.md`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from fp8pipe.core.errors import ConfigurationError
from fp8pipe.numerics.kinds import ScaleRule


class Initialisation(StrEnum):
    """How A is initialised."""

    SVD = "svd"
    RANDOMIZED_SVD = "randomized-svd"
    RANDOM = "random"
    GRADIENT = "gradient"


class Rounding(StrEnum):
    """How a flush rounds the target to the grid."""

    NEAREST = "nearest"
    STOCHASTIC = "stochastic"


class FinalMerge(StrEnum):
    """What happens to the update still buffered in B when training ends."""

    NEAREST = "nearest"
    COMPENSATED = "compensated"


@dataclass(frozen=True, slots=True)
class UpdateRule:
    """One way to merge B into the codes.

    Attributes:
        name: the name by which users select the rule.
        live: B takes part in the forward pass until it is merged.
        flush_every_step: rows are merged after every optimizer step.
        clear_all: a flush clears all of B; otherwise only the flushed rows.
        rank_rows: flush `rank` rows regardless of `--rows` (the released code never leaves its warm-up).
        rounding: rounding of the per-step flush.
        error_feedback: the rounding residual goes back into B, projected onto A.
        scale: scale rule of weights and activations; `EXACT` also breaks ties as the published code does.
        stacked: layers that read the same tensor share scale, A and GEMMs.
        final: rounding of the final merge.
        initialisation: how A is initialised by default.
    """

    name: str
    live: bool
    flush_every_step: bool
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
    """The rule called `name`.

    Raises:
        ConfigurationError: no such rule.
    """
    if name not in RULES:
        raise ConfigurationError(
            f"unknown update rule {name!r}", why=f"the rules are: {', '.join(RULES)}", fix="pick one of them"
        )
    return RULES[name]
