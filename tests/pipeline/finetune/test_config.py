"""The configuration: defaults that hang on the method, and options without effect refused by name."""

from __future__ import annotations

import pytest

from fp8pipe.core.config import build_config
from fp8pipe.core.errors import ConfigurationError
from pipeline.falqon.rules import DEFAULT_RULE, RULES
from pipeline.finetune.config import FinetuneConfig

TAKES_ROWS = [rule.name for rule in RULES.values() if rule.flush_every_step and not rule.rank_rows]


def build(**changes):
    return build_config(FinetuneConfig, {"model": "m", "data": "d"} | changes)


def test_defaults_of_each_method():
    falqon, lora, qlora = build(rank=16), build(rank=16, method="lora"), build(rank=16, method="qlora")
    assert (falqon.lora_alpha, lora.lora_alpha, qlora.lora_alpha) == (None, 16.0, 16.0)  # a scale of 1
    assert (falqon.update_rule, lora.update_rule, qlora.update_rule) == (DEFAULT_RULE, None, None)
    assert build(method="lora", lora_alpha=32, learning_rate=0.5).lora_alpha == 32
    assert build(method="lora", learning_rate=0.5).learning_rate == 0.5


def test_the_rules_defaults_are_resolved():
    assert build().initialisation is RULES[DEFAULT_RULE].initialisation
    assert build().rows is None
    released = build(update_rule="released")
    assert (released.rows, released.initialisation) == (None, RULES["released"].initialisation)
    assert build(update_rule="accumulate", rank=8).rows == 8
    assert build(update_rule="accumulate", rank=8, rows=0).rows == 0


@pytest.mark.parametrize("method", ["falqon", "lora", "qlora"])
@pytest.mark.parametrize("rule", [None, "accumulate", "released"])
def test_a_resolved_configuration_can_be_given_again(method, rule):
    if rule and method != "falqon":
        return
    first = build(method=method, **({"update_rule": rule} if rule else {}))
    assert build_config(FinetuneConfig, first.model_dump(mode="json")) == first


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        *(({"update_rule": r, "rows": 4}, ["rows", r]) for r in RULES if r not in TAKES_ROWS),
        ({"method": "lora", "update_rule": "live"}, ["update_rule", "lora"]),
        ({"method": "qlora", "rows": 4, "initialisation": "svd"}, ["rows", "initialisation", "qlora"]),
        ({"lora_alpha": 64.0}, ["lora_alpha", "falqon"]),
    ],
)
def test_what_does_not_apply_is_refused_by_name(changes, named):
    with pytest.raises(ConfigurationError) as error:
        build(**changes)
    assert error.value.exit_code == 10
    assert all(name in error.value.why for name in named)


@pytest.mark.parametrize("rule", TAKES_ROWS)
def test_rows_apply_to_rules_that_flush(rule):
    assert build(update_rule=rule, rows=4).rows == 4


def test_invalid_values_are_named_once():
    with pytest.raises(ConfigurationError, match="1 invalid value") as error:
        build(rank=0, method="lora")
    assert error.value.why.count("(got") == 1
    assert "rank" in error.value.why
    with pytest.raises(ConfigurationError) as error:
        build(method=["lora"], update_rule="lve")
    assert "method" in error.value.why
    assert "lve" in error.value.why
