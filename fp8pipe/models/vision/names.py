"""Converts a checkpoint's class names to the form that artifacts use: exactly one name per output, all distinct."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from fp8pipe.core.errors import ConfigurationError

__all__ = ["named_outputs", "unique_names"]

_SHOWN = 3


def named_outputs(labels: Mapping[int, str], outputs: int) -> tuple[tuple[str, ...], list[str]]:
    """Distinct names of a head's outputs, in order, and notes on what was changed.

    Args:
        labels: transformers' `id2label`. If its numbers do not start at 0 or have gaps, the names are assigned to the
            outputs in numerical order, which is the only possible assignment.
        outputs: number of outputs.

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
    """The names, with the output's index appended to duplicates (`crane (134)`), and a note about them."""
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
