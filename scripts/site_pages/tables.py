"""Markdown tables, and those of a JSON schema: every key with its type, its default and what it means."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

__all__ = ["cell", "code", "schema_section", "table"]

_BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}


def cell(text: object) -> str:
    """Text that stays text inside a cell of a table, on one line; spans of code are kept."""
    words = re.split(r"(`[^`]*`)", " ".join(str(text).split()))
    plain = [re.sub(r"([<*\[\]])", r"\\\1", word) if index % 2 == 0 else word for index, word in enumerate(words)]
    return "".join(plain).replace("|", "\\|")


def code(text: object) -> str:
    """Text as a span of code inside a cell; empty for no text."""
    shown = str(text).replace("|", "\\|").replace("`", "'")
    return f"`{shown}`" if shown else ""


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; cells are Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def schema_section(title: str, schema: Mapping[str, Any], level: int, seen: set[str], page: str = "") -> str:
    """A heading, the description, a table of the keys, and a section for each group of keys that it refers to.

    Args:
        title: the heading's text.
        schema: JSON schema of an object, as pydantic writes it, with its `$defs`.
        level: of the heading; those of groups are one deeper.
        seen: groups that the page already has; those written here are added.
        page: where links to groups lead; empty for the same page.
    """
    text = f"{'#' * level} {title}\n\n"
    if schema.get("description"):
        text += f"{_first(schema['description'])}\n\n"
    text += _keys(schema, page) + "\n"
    for name in _groups(schema):
        if name not in seen:
            seen.add(name)
            group = {**schema["$defs"][name], "$defs": schema["$defs"]}
            text += schema_section(name, group, level if level > 2 else level + 1, seen, page)
    return text


def _keys(schema: Mapping[str, Any], page: str) -> str:
    if "enum" in schema:
        return "One of " + ", ".join(code(value) for value in schema["enum"]) + ".\n"
    rows = []
    for name, one in schema.get("properties", {}).items():
        if name in schema.get("required", ()):
            default = "required"
        elif one.get("default") is None:
            default = ""
        else:
            default = code(json.dumps(one["default"], ensure_ascii=False))
        rows.append((code(name), _type(one, schema, page), default, cell(one.get("description", ""))))
    return table(("key", "type", "default", "meaning"), rows) if rows else "It has no keys of its own.\n"


def _type(one: Mapping[str, Any], schema: Mapping[str, Any], page: str) -> str:
    if "$ref" in one:
        name = one["$ref"].rpartition("/")[2]
        return f"[{name}]({page}#{name.lower()})"
    if choices := one.get("anyOf") or one.get("allOf") or one.get("oneOf"):
        kinds = [_type(choice, schema, page) for choice in choices if choice != {"type": "null"}]
        return " or ".join(dict.fromkeys(kinds))
    if "const" in one:
        return code(one["const"])
    if "enum" in one:
        return ", ".join(code(value) for value in one["enum"])
    if one.get("type") == "array":
        items = one.get("prefixItems") or [one.get("items", {})]
        return "list of " + " and ".join(_type(item, schema, page) for item in items)
    if one.get("type") == "object":
        inner = one.get("additionalProperties")
        return f"mapping to {_type(inner, schema, page)}" if isinstance(inner, Mapping) and inner else "mapping"
    bounds = ", ".join(f"{sign} {one[name]:g}" for name, sign in _BOUNDS.items() if name in one)
    return cell(f"{one.get('type', 'anything')}{f' {bounds}' if bounds else ''}")


def _groups(schema: Mapping[str, Any]) -> list[str]:
    """Names of the definitions that the keys refer to, in their order."""
    inside = json.dumps({key: value for key, value in schema.items() if key != "$defs"})
    return list(dict.fromkeys(re.findall(r'"#/\$defs/(\w+)"', inside)))


def _first(text: str) -> str:
    """The first paragraph of a docstring."""
    return " ".join(text.partition("\n\n")[0].split())
