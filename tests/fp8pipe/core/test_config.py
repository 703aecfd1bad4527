"""Configurations: every mistake reported at once, none of them forgiven."""

from pathlib import Path

import pytest
from pydantic import Field, ValidationError

from fp8pipe.core.config import FrozenConfig, assign, build_config, read_yaml
from fp8pipe.core.errors import ConfigurationError


class Inner(FrozenConfig):
    rank: int = Field(default=8, ge=1, description="rank (>= 1)")


class Outer(FrozenConfig):
    learning_rate: float = Field(gt=0, description="step size (> 0)")
    steps: int = Field(default=10, ge=1, description="steps (>= 1)")
    inner: Inner = Field(default=Inner(), description="a nested configuration")


def test_valid_values_and_defaults():
    config = build_config(Outer, {"learning_rate": 0.5, "inner": {"rank": 4}})
    assert (config.learning_rate, config.steps, config.inner.rank) == (0.5, 10, 4)


def test_all_mistakes_come_in_one_error():
    with pytest.raises(ConfigurationError) as caught:
        build_config(Outer, {"steps": 0, "leraning_rate": 1.0, "inner": {"rnak": 3}})
    text = str(caught.value)
    assert "4 invalid values" in text
    assert "learning_rate: required and not given" in text
    assert "steps: " in text
    assert "(got 0)" in text
    assert "leraning_rate: unknown key, did you mean 'learning_rate'?" in text
    assert "inner.rnak: unknown key, did you mean 'rank'?" in text


def test_unknown_key_without_a_near_name_lists_the_known_ones():
    with pytest.raises(ConfigurationError, match="known keys: inner, learning_rate, steps"):
        build_config(Outer, {"learning_rate": 1.0, "zzz": 1})


def test_configurations_are_frozen():
    config = build_config(Outer, {"learning_rate": 1.0})
    with pytest.raises(ValidationError):
        config.steps = 3


def test_a_field_without_description_is_refused():
    with pytest.raises(TypeError, match="rate"):

        class Bare(FrozenConfig):
            rate: float = 1.0


def load(path: Path, overrides: dict[str, object] | None = None) -> Outer:
    values = read_yaml(path)
    for dotted, value in (overrides or {}).items():
        assign(values, dotted, value)
    return build_config(Outer, values)


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return path


def test_yaml_with_dotted_overrides(tmp_path):
    # 1e-4 is a string in YAML 1.1: it must still arrive as a number.
    path = write(tmp_path, "learning_rate: 1e-4\nsteps: 5\n")
    config = load(path, {"steps": 7, "inner.rank": 2})
    assert (config.learning_rate, config.steps, config.inner.rank) == (1e-4, 7, 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate: 1\nlearning_rate: 2\n", "'learning_rate' is given twice"),
        ("- 1\n- 2\n", "top level is a list"),
        ("learning_rate: [1\n", "not valid YAML"),
        ("learning_rate: !!python/object/apply:os.getcwd []\n", "not valid YAML"),
        ("inner: 3\nlearning_rate: 1\n", "inner"),
        ("", "learning_rate: required"),
    ],
)
def test_bad_yaml(tmp_path, text, message):
    with pytest.raises(ConfigurationError, match=message):
        load(write(tmp_path, text))


def test_missing_file_and_override_through_a_value(tmp_path):
    with pytest.raises(ConfigurationError, match="No such file"):
        load(tmp_path / "none.yaml")
    with pytest.raises(ConfigurationError, match=r"cannot set steps\.more"):
        load(write(tmp_path, "steps: 3\n"), {"steps.more": 1})
