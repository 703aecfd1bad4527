"""Names of classes: one an output, each different, and every change is told."""

from __future__ import annotations

import pytest
from timm.data.imagenet_info import ImageNetInfo

from fp8pipe.core.errors import ConfigurationError
from fp8pipe.models.vision.names import named_outputs, unique_names


def test_names_that_fit_stay_as_they_are():
    assert named_outputs({1: "bee", 0: "ant"}, 2) == (("ant", "bee"), [])


def test_imagenets_own_list_has_two_cranes():
    info = ImageNetInfo("imagenet-1k")
    listed = [info.label_name_to_description(name, detailed=False).split(",")[0] for name in info.label_names()]
    assert listed[134] == listed[517] == "crane"
    names, notes = unique_names(listed)
    assert (names[134], names[517]) == ("crane (134)", "crane (517)")
    assert len(set(names)) == 1000
    assert "'crane'" in notes[0]
    assert [name for name in names if "(" not in name] == [name for name in listed if listed.count(name) == 1]


def test_a_made_name_that_another_class_has():
    names, _ = unique_names(["a", "b", "a", "a (0)", "a (2) (2)"])
    assert names == ("a (0) (0)", "b", "a (2)", "a (0)", "a (2) (2)")


@pytest.mark.parametrize("numbers", [(1, 2, 3), (0, 4, 9), (7, 3, 5)])
def test_numbers_that_do_not_count_from_zero_name_the_outputs_in_their_order(numbers):
    names, notes = named_outputs(dict(zip(numbers, "abc", strict=True)), 3)
    assert [dict(zip(numbers, "abc", strict=True))[number] for number in sorted(numbers)] == list(names)
    assert "in order" in notes[0]


def test_another_number_of_names_is_refused():
    with pytest.raises(ConfigurationError, match="do not fit the head"):
        named_outputs({0: "a"}, 2)
