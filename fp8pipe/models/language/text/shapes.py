"""Converts one row of the user's data to a conversation, or rejects it with the reason.

Supported formats are conversations of OpenAI and ShareGPT, prompt and completion (as text or as lists of messages), and
Alpaca's instruction, input and output. Each row may also have ``tools``, ``system``, ``history`` and ``images``. Lists
and objects may be given as JSON text, as in tables without nested columns.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from fp8pipe.models.language.text.conversation import ROLES, ImagePart, Message, Record
from fp8pipe.models.language.text.image_column import with_images
from fp8pipe.models.language.text.images import IMAGE_PLACEHOLDER, IMAGE_TYPES, image_source, unread_keys

SHAPES: Final = "messages, conversations, prompt + completion, or instruction (+ input) + output"
# Other role names in use: ShareGPT's, OpenAI's older and newer ones, and Llama's for the result of a tool.
_ALIASES: Final = {
    "human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool", "function": "tool",
    "ipython": "tool", "developer": "system",
}  # fmt: skip
_BESIDE: Final = ("tools", "functions", "system", "history")


class BadRow(Exception):
    """A row that cannot be used; the message gives the reason."""


class DamagedFile(BadRow):
    """The rest of a file is missing (it is truncated) or cannot be read."""


def parse_row(row: Any, place: str, unused: Counter[str]) -> Record:
    """Convert a row to a checked conversation.

    Args:
        row: the parsed row; must be a dict in one of the supported formats.
        place: position of the row in the data, stored in the record.
        unused: the names of fields that are not used are counted here.

    Raises:
        BadRow: the row is not valid; the message names the field and the problem.
    """
    if not isinstance(row, dict):
        raise BadRow(f"a record must be an object, not {_json_type(row)}")
    # In a table with columns for several formats, the columns of the other formats are null.
    keys = {k for k, v in row.items() if v is not None}
    if "messages" in keys or "conversations" in keys:
        used: tuple[str, ...] = ("messages",) if "messages" in keys else ("conversations",)
        messages = _turns(row[used[0]], used[0])
    elif "prompt" in keys or "completion" in keys:
        used = ("prompt", "completion")
        messages = _prompt_and_completion(row)
    elif "instruction" in keys or "output" in keys:
        used = ("instruction", "input", "output")
        extra = _text(row, "input", needed=False)
        instruction, output = _text(row, "instruction"), _text(row, "output")
        messages = [*pair(f"{instruction}\n\n{extra}" if extra.strip() else instruction, output).messages]
    else:
        found = ", ".join(map(repr, sorted(map(str, row))[:8])) or "none"
        raise BadRow(f"keys not understood ({found}); expected {SHAPES}")
    try:
        messages, pictured = with_images(_before(row) + messages, row)
    except ValueError as error:
        raise BadRow(str(error)) from error
    if not any(m.role == "assistant" for m in messages):
        raise BadRow("no assistant message, so there is nothing to learn")
    unused.update(str(k) for k in keys - {*used, *_BESIDE, pictured} if row[k] not in ("", [], {}))
    tools = _tools(row)
    if not tools and "tools" in messages[0].fields:  # tools given in the conversation's first message
        opening = messages[0]
        tools = _tools(opening.fields)
        messages[0] = replace(opening, fields={k: v for k, v in opening.fields.items() if k != "tools"})
    record = Record(tuple(messages), tools, place)
    unused.update({key for part in record.images for key in part.unread})
    if record.images and sum(message.content.count(IMAGE_PLACEHOLDER) for message in messages) > len(record.images):
        raise BadRow("its text holds the character U+FFFC, which stands for images in a record that has some")
    _check_encodable(record)
    return record


def pair(prompt: str, answer: str) -> Record:
    """A conversation of one user message and one assistant message."""
    return Record((Message("user", prompt), Message("assistant", answer)))


def _before(row: dict[str, Any]) -> list[Message]:
    """The messages in the fields ``system`` and ``history``, which precede those of the row's main fields."""
    messages = []
    if system := _text(row, "system", needed=False):
        messages.append(Message("system", system))
    for index, turn in enumerate(_structure(row, "history", list) or []):
        if not (isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn)):
            raise BadRow(f"history[{index}] must be a list of a question and its answer")
        messages += pair(*turn).messages
    return messages


def _tools(row: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    """JSON schemas of a row's tools, in the form that serving engines use: ``{"type": "function", "function": ...}``"""
    tools = []
    for index, tool in enumerate(_structure(row, "tools", list) or _structure(row, "functions", list) or []):
        if not isinstance(tool, dict):
            raise BadRow(f"tools[{index}] must be an object, not {_json_type(tool)}")
        tools.append({"type": "function", "function": tool} if "name" in tool and "function" not in tool else tool)
    return tuple(tools)


def _prompt_and_completion(row: dict[str, Any]) -> list[Message]:
    """Messages of a row with prompt and completion, each of which is a text or a list of messages.

    Assistant messages within the prompt are not trained on.
    """
    lists = [key for key in ("prompt", "completion") if isinstance(row.get(key), list)]
    if not lists:
        return [*pair(_text(row, "prompt"), _text(row, "completion")).messages]
    turns = {
        "prompt": [Message("user", row["prompt"])] if isinstance(row.get("prompt"), str) else None,
        "completion": [Message("assistant", row["completion"])] if isinstance(row.get("completion"), str) else None,
    }
    prompt, completion = (turns[key] or _turns(row.get(key), key) for key in turns)
    return [replace(m, learned=False) for m in prompt] + completion


def _turns(value: Any, key: str) -> list[Message]:
    messages = []
    for index, item in enumerate(_structure({key: value}, key, list) or []):
        if not isinstance(item, dict):
            raise BadRow(f"{key}[{index}] must be an object with role and content, not {_json_type(item)}")
        try:
            messages.append(_message(item, f"{key}[{index}]"))
        except BadRow as error:
            raise BadRow(f"{key}[{index}]: {error}") from error
    return messages


def _message(item: dict[str, Any], place: str) -> Message:
    fields = {k: v for k, v in item.items() if v is not None and v != []}
    keys = ("from", "value") if "from" in fields and "role" not in fields else ("role", "content")
    named = _text(item, keys[0])
    role = _ALIASES.get(named, named)
    if role not in ROLES:
        raise BadRow(f"role {named!r} is not one of {', '.join((*ROLES, *_ALIASES))}")
    if named == "function_call":  # its text is the call, as JSON
        fields["tool_calls"] = _structure(item, keys[1], dict, list)
        item = {**item, keys[1]: None}
    calls = _calls(fields)
    if calls and role != "assistant":
        raise BadRow(f"'tool_calls' in a message of role {named!r}")
    content, images = _content(item, keys[1], place, needed=not calls and role != "tool")
    if images and role == "assistant":
        raise BadRow("an assistant message has an image, and only text can be learned as an answer")
    learned = _weight(fields, role)
    for key in (*keys, "weight", "tool_calls", "function_call"):
        fields.pop(key, None)
    return Message(role, content, learned, fields | ({"tool_calls": calls} if calls else {}), images)


def _content(item: dict[str, Any], key: str, place: str, *, needed: bool) -> tuple[str, tuple[ImagePart, ...]]:
    """A message's content, which is a text or a list of parts to concatenate, and its images.

    Args:
        item: the message.
        key: of its content.
        place: of the message in the record.
        needed: whether the content may not be empty.
    """
    parts = item.get(key)
    if not isinstance(parts, list):
        return _text(item, key, needed=needed), ()
    texts, images = [], []
    for index, part in enumerate(parts):
        part = {"text": part} if isinstance(part, str) else part
        if isinstance(part, dict) and part.get("type") in IMAGE_TYPES:
            try:
                images.append(ImagePart(image_source(part), f"{place}, part {index + 1}", unread_keys(part)))
            except ValueError as error:
                raise BadRow(f"part {index + 1}: {error}") from error
            texts.append(IMAGE_PLACEHOLDER)
            continue
        if not isinstance(part, dict) or part.get("type", "text") != "text":
            kind = part.get("type") if isinstance(part, dict) else _json_type(part)
            raise BadRow(f"{key!r} must be text, or a list of parts of text and images; part {index + 1} is {kind}")
        texts.append(_text(part, "text", needed=False))
    return _text({key: "".join(texts)}, key, needed=needed), tuple(images)


def _calls(fields: dict[str, Any]) -> list[dict[str, Any]]:
    """Tool calls of a message, as ``{"type": "function", "function": {"name", "arguments"}}`` with parsed arguments."""
    given = _structure(fields, "tool_calls", list, dict) or _structure(fields, "function_call", dict) or []
    calls = []
    for index, call in enumerate(given if isinstance(given, list) else [given]):
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRow(f"tool_calls[{index}] must be an object with a function's name and arguments")
        if not function.get("arguments"):  # a function without parameters
            arguments = {}
        else:
            try:
                arguments = _structure(function, "arguments", dict)
            except BadRow as error:
                raise BadRow(f"tool_calls[{index}]: {error}") from error
        rest = {k: v for k, v in call.items() if k not in ("function", "name", "arguments")}
        calls.append({"type": "function", **rest, "function": {**function, "arguments": arguments}})
        if function is call:
            calls[-1]["function"] = {"name": function["name"], "arguments": arguments}
    return calls


def _weight(fields: Mapping[str, Any], role: str) -> bool:
    """Whether a message's ``weight`` is absent or 1; a weight of 1 is an error unless the role is assistant."""
    weight = fields.get("weight")
    if weight is not None and weight not in (0, 1):
        raise BadRow(f"'weight' must be 0 or 1, not {weight!r}")
    if weight and role != "assistant":
        raise BadRow(f"'weight' is 1 in a message of role {role!r}, but only assistant messages are trained on")
    return weight is None or bool(weight)


def _structure(row: Mapping[str, Any], key: str, *types: type) -> Any:
    """Value of a field that must have one of `types` (list or dict), parsed if it is JSON text; None if absent."""
    value = row.get(key)
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise BadRow(f"{key!r} is text that is not valid JSON: {error}") from error
    if value is None or value == "":
        return None
    if not isinstance(value, types):
        wanted = " or ".join("a list" if kind is list else "an object" for kind in types)
        raise BadRow(f"{key!r} must be {wanted}, not {_json_type(value)}")
    return value


def _text(row: Mapping[str, Any], key: str, *, needed: bool = True) -> str:
    value = row.get(key)
    if value is None and not needed:
        return ""
    if value is None:
        raise BadRow(f"{key!r} is {'null' if key in row else 'missing'}")
    if not isinstance(value, str):
        raise BadRow(f"{key!r} must be text, not {_json_type(value)}")
    if needed and not value.strip():
        raise BadRow(f"{key!r} is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # an unpaired \ud800 escape is valid JSON but not valid text
        raise BadRow(f"{key!r} holds an unpaired surrogate at character {error.start}") from error
    return value


def _check_encodable(record: Record) -> None:
    """Reject unpaired surrogates in tools and in the other fields of messages, which templates also write out."""
    for key, value in (("tools", record.tools), *((k, v) for m in record.messages for k, v in m.fields.items())):
        try:
            json.dumps(value, ensure_ascii=False, default=str).encode("utf-8")
        except UnicodeEncodeError as error:
            raise BadRow(f"{key!r} holds an unpaired surrogate") from error


def _json_type(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true/false", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)
