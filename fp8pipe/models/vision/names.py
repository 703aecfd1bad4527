"""Converts the class names of a checkpoint to the form that artifacts require: one distinct name for each output."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from fp8pipe.core.errors import ConfigurationError

__all__ = ["named_outputs", "unique_names"]

_SHOWN = 3


def named_outputs(labels: Mapping[int, str], outputs: int) -> tuple[tuple[str, ...], list[str]]:
    """Assign class names to the outputs of a classification head.

    Args:
        labels: transformers' `id2label`. If its numbers do not start at 0 or have gaps, the names are assigned to the
            outputs in numerical order.
        outputs: number of outputs of the head.

    Returns:
        A distinct name for each output, in order, and notes for the user on what was changed.

    Raises:
        ConfigurationError: the number of names differs from the number of outputs.
    """
    if len(labels) != outputs:
        raise ConfigurationError(
            "the class names do not fit the head", why=f"id2label has {len(labels)}, and the head {outputs} outputs",
            fix="correct id2label in config.json",
        )  # fmt: skip
    numbers = sorted(labels)
    names, notes = unique_names([str(labels[number]) for number in numbers])
    if numbers != list(range(outputs)):
        shown = ", ".join(map(str, numbers[:_SHOWN])) + (", ..." if outputs > _SHOWN else "")
        notes.insert(0, f"class names: id2label has the numbers {shown}; output 0 is {names[0]!r}, and so on in order")
    return names, notes


def unique_names(names: Sequence[str]) -> tuple[tuple[str, ...], list[str]]:
    """Make class names distinct by appending the output's index to those that occur more than once: `crane (134)`.

    Returns:
        The names in the same order, and a note for the user if any were changed.
    """
    counts = Counter(names)
    doubled = [name for name, count in counts.items() if count > 1]
    taken, found = {name for name, count in counts.items() if count == 1}, []
    for index, name in enumerate(names):
        made = f"{name} ({index})" if counts[name] > 1 else name
        while counts[name] > 1 and made in taken:  # another class already has this name
            made += f" ({index})"
        taken.add(made)
        found.append(made)
    if not doubled:
        return tuple(found), []
    shown = ", ".join(map(repr, doubled[:_SHOWN])) + (", ..." if len(doubled) > _SHOWN else "")
    return tuple(found), [f"class names of several outputs, which have the output's number behind them now: {shown}"]
