"""What outputs mean: probabilities against torch's own, and what counts as the same answer."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fp8pipe.core.errors import ConfigurationError
from fp8pipe.models.vision.answers import ACTIVATIONS, activation_of, agreeing, probabilities, ranks
from fp8pipe.models.vision.architecture import Architecture


@pytest.mark.parametrize(
    ("outputs", "problem", "expected"),
    [
        (5, None, "softmax"), (5, "single_label_classification", "softmax"), (1, None, "none"),
        (5, "multi_label_classification", "sigmoid"), (1, "multi_label_classification", "sigmoid"),
        (5, "regression", "none"), (1, "regression", "none"), (1, "single_label_classification", "none"),
    ],
)  # fmt: skip
def test_the_activation_follows_from_the_training_loss(outputs, problem, expected):
    assert activation_of(outputs, problem) == expected
    assert ranks(expected, outputs) is (expected == "softmax")


def test_an_unknown_problem_is_refused():
    with pytest.raises(ConfigurationError, match="ranking"):
        activation_of(5, "ranking")


def test_probabilities_are_those_of_torch():
    logits = torch.tensor([[0.0, 2.5, -3.0], [90.0, -120.0, 1e-3]])
    for activation, oracle in (("softmax", logits.softmax(1)), ("sigmoid", logits.sigmoid())):
        found = probabilities(logits.numpy(), activation)
        assert found.dtype == np.float32
        torch.testing.assert_close(torch.from_numpy(found), oracle, rtol=1e-6, atol=1e-30)
    with pytest.raises(ValueError, match="not logits"):
        probabilities(logits.numpy(), "none")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_is_not_finite_agrees_with_nothing(activation):
    outputs = torch.arange(12.0).view(4, 3)
    assert agreeing(outputs, outputs.clone(), activation).all()
    found = outputs.clone()
    found[1, 2] = float("nan")
    assert agreeing(outputs, found, activation).tolist() == [True, False, True, True]
    assert not agreeing(found, found, activation)[1]
    assert not agreeing(outputs * float("nan"), outputs * float("nan"), activation).any()


def test_outputs_without_ranks_agree_where_they_are_near_on_the_scale_of_the_images():
    expected = torch.tensor([[100.0], [102.0], [98.0], [100.0]])  # root mean square distance from the mean: sqrt(2)
    near, far = expected + 0.7, expected + 0.72
    assert agreeing(expected, near, "none").all()
    assert not agreeing(expected, far, "none").any()
    assert not agreeing(expected, far, "sigmoid").any()
    assert not agreeing(expected, far, "softmax").any()  # one output has no rank
    assert not agreeing(expected, torch.full_like(expected, 100.0), "none")[1]  # an answer that knows no image
    one = torch.tensor([[4.0]])
    assert agreeing(one, one * 1.4, "none").item()
    assert not agreeing(one, one * 1.6, "none").item()


def test_files_of_before_are_read_as_softmax():
    old = {"library": "timm", "name": "test_vit", "image_size": [32, 32]}
    assert Architecture.model_validate(old | {"head": "classifier", "classes": ["a", "b"]}).activation == "softmax"
    assert Architecture.model_validate(old | {"head": "features"}).activation == "none"
    with pytest.raises(ValueError, match="features are not logits"):
        Architecture.model_validate(old | {"head": "features", "activation": "sigmoid"})
