"""Recipes: what they say, and what is refused with which words."""

from __future__ import annotations

from pathlib import Path

import pytest

from fp8pipe.core.errors import ConfigurationError
from pipeline.workflow.gates import figure_at
from pipeline.workflow.recipe import load_recipe, recipe_of, substitute

TEXT = """
name: small
stages:
  proof: {command: validate, export: "stage:onnx", against: "stage:digits"}
  onnx: {command: export, artifact: "stage:digits", target: onnx}
  digits:
    command: quantize-vit
    bits: w4a4
    calibration: artifact:stage:images
    distill: {steps: 3}
  images: {command: quantize-vit, bits: w8a8}
"""


@pytest.mark.parametrize("path", ["name.abc", "name.0", "size.a", "list.3", "list.a", "none", "inner"])
def test_a_figure_that_is_not_there_is_missing(path):
    document = {"name": "abc", "size": 3, "list": [1, 2, 3], "inner": {"size": 1}}
    assert figure_at(document, path) is None
    assert [figure_at(document, there) for there in ("size", "list.1", "inner.size")] == [3, 2, 1]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(TEXT)
    return path


def test_stages_come_in_an_order_in_which_they_can_run(file):
    assert [stage.name for stage in load_recipe(file).stages] == ["images", "digits", "onnx", "proof"]


def test_references_are_found_wherever_they_stand_and_become_paths(file):
    recipe = load_recipe(file)
    assert recipe.stage("digits").reads == {"calibration": "images"}
    assert recipe.stage("proof").needs == ("onnx", "digits")
    settings = substitute(recipe.stage("digits").settings, {"images": Path("run/images")})
    assert settings["calibration"] == "artifact:run/images"
    assert settings["distill"] == {"steps": 3}


def test_overrides_are_yaml_and_reach_into_groups(file):
    recipe = load_recipe(file, ["digits.distill.steps=7", "digits.bits=w8a8", "onnx.batch=[1, 2, 4]"])
    assert recipe.stage("digits").settings["distill"] == {"steps": 7}
    assert recipe.stage("digits").settings["bits"] == "w8a8"
    assert recipe.stage("onnx").settings["batch"] == [1, 2, 4]


def test_a_recipe_is_named_after_its_file_and_given_back_whole(tmp_path):
    path = tmp_path / "other.yaml"
    path.write_text("stages: {a: {command: work, after: [b], gates: [{name: n, figure: f, at_most: 1, reason: r}]}, "
                    "b: {command: work}}")  # fmt: skip
    recipe = load_recipe(path)
    assert recipe.name == "other"
    assert recipe_of(recipe.plain(), "again") == recipe


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "names no stages"),
        ({"stages": {}, "extra": 1}, "unknown keys: extra"),
        ({"stages": {"a": {"bits": "w4a4"}}}, "stage a of here names no command"),
        ({"stages": {"A/b": {"command": "work"}}}, "'A/b' cannot name a stage"),
        ({"stages": {"a": {"command": "work", "x": "stage:bb"}, "b": {"command": "work"}}}, "no stage named 'bb'"),
        ({"stages": {"a": {"command": "work", "after": "b"}, "b": {"command": "work"}}}, "after is no list"),
        ({"stages": {"a": {"command": "work", "gates": {"name": "n"}}}}, "gates is no list"),
        ({"stages": {"a": {"command": "work", "gates": [{"name": "n", "figure": "f", "reason": "r"}]}}},
         "stage a of here: a gate has invalid values"),
        ({"stages": {"a": {"command": "work", "gates": [{"figure": "f", "at_most": 1, "reason": "r", "nmae": "n"}]}}},
         r"(?s)stage a of here: a gate has invalid values.*nmae: unknown key"),
    ],
)  # fmt: skip
def test_mistakes_are_named(values, words):
    with pytest.raises(ConfigurationError, match=words):
        recipe_of(values, "here")


def test_a_circle_is_shown():
    stages = {"a": {"command": "work", "x": "stage:b"}, "b": {"command": "work", "after": ["a"]}}
    with pytest.raises(ConfigurationError, match="wait for each other") as found:
        recipe_of({"stages": stages}, "here")
    assert "a -> b -> a" in found.value.why or "b -> a -> b" in found.value.why


@pytest.mark.parametrize(
    ("override", "words"),
    [("digits.steps", "cannot be read"), ("steps=3", "cannot be read"), ("digit.steps=3", "did you mean 'digits'")],
)
def test_wrong_overrides_are_named(file, override, words):
    with pytest.raises(ConfigurationError) as found:
        load_recipe(file, [override])
    assert words in str(found.value)
