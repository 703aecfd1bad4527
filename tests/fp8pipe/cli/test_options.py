"""Options made of models: what click is told, what reaches the model, and the union of several models."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

import click
import pytest
from click.testing import CliRunner
from pydantic import Field

from fp8pipe.cli.options import foreign, model_options, options_of, resolve, union_options
from fp8pipe.core.config import CONFIG_ONLY, Flag, FrozenConfig, Size, parse_size
from fp8pipe.core.errors import ConfigurationError


class Colour(StrEnum):
    RED = "red"
    BLUE = "blue"


class Inner(FrozenConfig):
    steps: Annotated[int, Flag("inner-steps")] = Field(5, ge=0, description="inner steps")
    hidden: int = Field(1, description="of the file alone")


class Paint(FrozenConfig):
    model: str = Field(description="what is painted")
    colour: Colour = Field(Colour.RED, description="which colour.")
    base: Literal["oil", "water"] | None = Field(None, description="what it is mixed with")
    gloss: bool = Field(True, description="shine")
    share: Annotated[float | None, Flag(default="all")] = Field(None, gt=0, le=1, description="how much")
    layers: Annotated[tuple[int, ...], Flag("layer")] = Field((1, 2), description="thickness; repeatable")
    range: tuple[int, int] = Field((1, 9), description="least and most")
    tin: Annotated[Size, Flag("tin-size")] = Field(5_000_000, description="largest tin")
    place: Path | None = Field(None, description="where")
    named: str | None = Field(None, description="one of some", json_schema_extra={"enum": ["x", "y"]})
    secret: Annotated[int, CONFIG_ONLY] = Field(0, description="of the file alone")
    inner: Inner = Field(Inner(), description="inside")


class Print(FrozenConfig):
    colour: Literal["red", "black"] = Field("black", description="which ink")
    range: tuple[int, int] = Field((1, 9), description="least and most")
    copies: int = Field(1, ge=1, description="how many")


def run(decorate: Any, body: Any, *arguments: object) -> Any:
    @click.command("probe")
    @decorate
    def command(**options: Any) -> None:
        body(options)

    return CliRunner().invoke(command, [str(argument) for argument in arguments], catch_exceptions=False)


def resolved(*arguments: object, config: Path | None = None) -> Paint:
    found: list[Paint] = []
    result = run(model_options(Paint), lambda options: found.append(resolve(Paint, config, options)), *arguments)
    assert result.exit_code == 0, result.output
    return found[0]


def test_flags_are_the_fields_and_nested_ones_with_a_name():
    flags = {option.flag: option.path for option in options_of(Paint)}
    assert flags == {
        "model": "model", "colour": "colour", "base": "base", "gloss": "gloss", "share": "share", "layer": "layers",
        "range": "range", "tin-size": "tin", "place": "place", "named": "named", "inner-steps": "inner.steps",
    }  # fmt: skip


def test_help_shows_choices_defaults_and_ranges():
    text = " ".join(run(model_options(Paint), print, "--help").stdout.split())
    for shown in (
        "--model TEXT what is painted. [required, here or in --config]",
        "--colour [red|blue] which colour. [default: red]",
        "--base [oil|water] what it is mixed with. ",
        "--gloss / --no-gloss shine. [default: gloss]",
        "--share FLOAT how much. [default: all; > 0, <= 1]",
        "--layer INTEGER thickness; repeatable. [default: 1 2]",
        "--range INTEGER... least and most. [default: 1 9]",
        "--tin-size SIZE largest tin. [default: 5 MB]",
        "--place PATH",
        "--named [x|y]",
        "--inner-steps INTEGER inner steps. [default: 5; >= 0]",
    ):
        assert shown in text
    assert "secret" not in text
    assert "hidden" not in text


def test_what_is_given_reaches_the_model_as_its_types():
    found = resolved(
        "--model", "wall", "--colour", "blue", "--no-gloss", "--share", 0.5, "--layer", 3, "--layer", 4, "--range", 2,
        3, "--tin-size", "2GiB", "--place", "/a", "--inner-steps", 7,
    )  # fmt: skip
    assert (found.colour, found.gloss, found.share, found.layers, found.range) == (
        Colour.BLUE,
        False,
        0.5,
        (3, 4),
        (2, 3),
    )
    assert (found.tin, found.place, found.inner.steps) == (2**31, Path("/a"), 7)
    assert set(found.model_fields_set).isdisjoint({"base", "named", "secret"})


def test_only_what_was_given_wins_over_the_file(tmp_path):
    file = tmp_path / "paint.yaml"
    file.write_text("{model: door, gloss: false, inner: {hidden: 4, steps: 1}, secret: 3, tin: 5MB}")
    found = resolved("--inner-steps", 2, config=file)
    assert (found.model, found.gloss, found.secret, found.tin) == ("door", False, 3, 5_000_000)
    assert (found.inner.steps, found.inner.hidden) == (2, 4)
    assert resolved("--gloss", config=file).gloss is True


def test_mistakes_are_usage_errors_or_the_models():
    def body(options: Any) -> None:
        resolve(Paint, None, options)

    for arguments in (["--colour", "green"], ["--tin-size", "big"], ["--inner-steps", "x"], ["--layer", "x"], []):
        result = run(model_options(Paint), body, *arguments)
        assert (result.exit_code, result.stdout) == (2, ""), arguments
    assert "Missing option --model" in result.stderr
    with pytest.raises(ConfigurationError) as caught:
        run(model_options(Paint), body, "--model", "m", "--share", 2, "--inner-steps", -1)
    assert "share:" in caught.value.why
    assert "inner.steps:" in caught.value.why


UNION = union_options({"paint": Paint, "print": Print})


def test_a_union_has_each_flag_once_and_says_what_it_is_for():
    text = " ".join(run(UNION, print, "--help").stdout.split())
    assert text.count("--colour ") == 1
    both = "--colour [red|blue|black] paint: which colour. [default: red] print: which ink. [default: black]"
    assert both in text
    assert "--range INTEGER... least and most. [default: 1 9]" in text
    assert "--copies INTEGER print: how many. [default: 1; >= 1]" in text


def test_foreign_options_are_named_as_they_are_written():
    arguments = ("--copies", 2, "--no-gloss", "--layer", 1, "--tin-size", "1GB", "--inner-steps", 1, "--colour", "red")
    found: list[list[str]] = []
    run(UNION, lambda options: found.append(foreign(options, Print)), *arguments)
    run(UNION, lambda options: found.append(foreign(options, Paint)), *arguments)
    run(UNION, lambda options: found.append(foreign(options, Paint, Print)), *arguments)
    assert found == [["--no-gloss", "--layer", "--tin-size", "--inner-steps"], ["--copies"], []]


def test_a_flag_of_two_meanings_is_refused():
    class Other(FrozenConfig):
        range: int = Field(1, description="one number")

    class Nested(FrozenConfig):
        copies: Annotated[int, Flag("copies")] = Field(1, description="inside")

    class Outer(FrozenConfig):
        inner: Nested = Field(Nested(), description="inside")

    for other in (Other, Outer):
        with pytest.raises(TypeError, match="stands for different fields"):
            union_options({"print": Print, "other": other})


@pytest.mark.parametrize(
    ("text", "size"),
    [("1000", 1000), ("5GB", 5 * 10**9), ("2GiB", 2**31), ("1.5kb", 1500), ("3 m", 3 * 10**6), ("7B", 7)],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1", "5 parsecs", "0", "1e9"])
def test_bad_sizes(text):
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(text)
