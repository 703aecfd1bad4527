"""Faults that no list foresaw: a seed draws what is changed in a finished artifact, and hashes are made right again.

A fault knows nothing of the checks. It picks a file, tensor, key, token, operator, attribute or figure of what lies
there, changes it into something else of the same sort, and says what a report must name. What a draw may not do is
nothing: the file's bytes, or what a reader takes from them, are always others afterwards.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from artifact_tree import rehash
from random_graph_faults import attribute, inserted, operator, stored, wiring
from safetensors.torch import load_file, save_file
from torch import Tensor

from fp8pipe.artifact import CHECKSUM_NAME, MANIFEST_NAME, write_checked

__all__ = ["LANGUAGE_KINDS", "RECORD", "VISION_KINDS", "RandomFault", "inject_random"]

INDEX, RECORD = "model.safetensors.index.json", "onnx.validation.json"
# Written for people, and made again by every export: no engine reads it.
_UNREAD = ("README.md",)
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class RandomFault:
    """What was done.

    Attributes:
        kind: which sort of fault.
        how: in words, for the test's output.
        named: one of these must be in the report.
    """

    kind: str
    how: str
    named: tuple[str, ...]


def inject_random(kind: str, seed: int, artifact: Path) -> RandomFault:
    """Draw a fault of a kind, and put it into an artifact (or a record beside it); hashes are right afterwards."""
    chance = random.Random(f"{kind}:{seed}")
    how, named = _KINDS[kind](chance, artifact)
    if kind != "record":
        rehash(artifact)
    return RandomFault(kind, how, named)


# Tensors

Change = Callable[[random.Random, Tensor], Tensor]


def _bit(chance: random.Random, tensor: Tensor) -> Tensor:
    """One bit of one number."""
    bits = tensor.view(_BITS[tensor.element_size()]).view(-1)
    place, width = chance.randrange(bits.numel()), 8 * tensor.element_size()
    flip = chance.randrange(width)
    bits[place] ^= (1 << flip) - (1 << width if flip == width - 1 and width > 8 else 0)
    return tensor


def _rows(chance: random.Random, tensor: Tensor) -> Tensor:
    """Two rows, or numbers, change places."""
    flat = tensor.view(_BITS[tensor.element_size()]) if tensor.ndim else tensor
    pairs = [(i, j) for i in range(len(flat)) for j in range(i) if not torch.equal(flat[i], flat[j])]
    if not pairs:
        return _bit(chance, tensor)
    i, j = chance.choice(pairs)
    flat[[i, j]] = flat[[j, i]].clone()
    return tensor


def _constant(chance: random.Random, tensor: Tensor) -> Tensor:
    """Every number becomes one of them."""
    bits = tensor.view(_BITS[tensor.element_size()])
    value = bits.view(-1)[chance.randrange(bits.numel())].clone()
    return _bit(chance, tensor) if bool((bits == value).all()) else bits.fill_(value).view(tensor.dtype)


def _factor(chance: random.Random, tensor: Tensor) -> Tensor:
    """All numbers times a factor."""
    changed = (tensor.float() * chance.choice((0.5, 2.0, -1.0, 1.05))).to(tensor.dtype)
    same = torch.equal(changed.view(_BITS[tensor.element_size()]), tensor.view(_BITS[tensor.element_size()]))
    return _bit(chance, tensor) if same else changed


def _tensor(chance: random.Random, root: Path) -> tuple[str, tuple[str, ...]]:
    """One stored tensor holds other numbers."""
    path = chance.choice(sorted(root.glob("model*.safetensors")))
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    name = chance.choice(sorted(tensors))
    change: Change = chance.choice((_bit, _rows, _constant, _factor))
    tensors[name] = change(chance, tensors[name]).contiguous()
    save_file(tensors, path, metadata={"format": "pt"})
    return f"{name}: {change.__doc__}", (name, name.removesuffix("_scale"))


def _exchange(chance: random.Random, root: Path) -> tuple[str, tuple[str, ...]]:
    """Two stored tensors of one shape change places; one is dropped; one is added."""
    path = chance.choice(sorted(root.glob("model*.safetensors")))
    tensors = load_file(path)
    what = chance.choice(("exchanged", "dropped", "added"))
    alike = [
        (a, b) for a in sorted(tensors) for b in sorted(tensors)
        if a < b and (tensors[a].shape, tensors[a].dtype) == (tensors[b].shape, tensors[b].dtype)
        and not torch.equal(*(tensors[x].view(_BITS[tensors[x].element_size()]) for x in (a, b)))
    ] if what == "exchanged" else []  # fmt: skip
    if alike:
        a, b = chance.choice(alike)
        tensors[a], tensors[b] = tensors[b], tensors[a]
        named = (a, b, a.removesuffix("_scale"), b.removesuffix("_scale"))
    elif what == "added":
        a = f"{chance.choice(sorted(tensors))}.{chance.choice(('extra', 'lora_A.weight', 'bias2'))}"
        tensors[a] = torch.full((16, 16), 0.5)
        named = (a, INDEX)
    else:
        a = chance.choice(sorted(tensors))
        del tensors[a]
        named = (a, a.removesuffix("_scale"), INDEX)
    save_file(tensors, path, metadata={"format": "pt"})
    index = root / INDEX
    if index.is_file():
        data = json.loads(index.read_text())
        data["weight_map"] = {k: v for k, v in data["weight_map"].items() if v != path.name or k in tensors}
        data["weight_map"] |= {k: path.name for k in tensors}
        index.write_text(json.dumps(data))
    return f"{what}: {', '.join(named[:2])}", named


# Words and settings


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Every leaf of plain data with its path."""
    if isinstance(value, dict | list) and value:
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(inner, (*path, key))
    else:
        yield path, value


def put(data: Any, path: tuple[Any, ...], value: Any) -> None:
    """Set a leaf."""
    for key in path[:-1]:
        data = data[key]
    data[path[-1]] = value


def other(chance: random.Random, value: Any) -> Any:
    """Something of the same sort that is not it."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return chance.choice((value + 1, value * 2 + 1))
    if isinstance(value, float):
        return chance.choice((value * 2, value / 10)) if value else 0.5
    if isinstance(value, str):
        return value + "x" if len(value) < 2 or chance.random() < 0.5 else value[1] + value[0] + value[2:] + "y"
    return chance.choice((1, "x", True))


def _json_leaf(chance: random.Random, path: Path, skip: tuple[str, ...] = ()) -> tuple[str, tuple[str, ...]]:
    data = json.loads(path.read_text(encoding="utf-8"))
    found = [(place, value) for place, value in leaves(data) if place and not set(skip) & set(map(str, place))]
    place, value = chance.choice(found)
    changed = other(chance, value)
    put(data, place, changed)
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    keys = [str(key) for key in place if isinstance(key, str)]
    return f"{path.name}: {'.'.join(map(str, place))}: {value!r} -> {changed!r}", (path.name, keys[-1])


# What transformers writes about itself; no engine computes with it.
_SAID_OF_ITSELF = ("transformers_version", "_name_or_path")


def _config(chance: random.Random, root: Path) -> tuple[str, tuple[str, ...]]:
    """A key of config.json has another value, is gone, or is new."""
    path = root / "config.json"
    if (what := chance.random()) < 0.7:
        return _json_leaf(chance, path, _SAID_OF_ITSELF)
    data = json.loads(path.read_text())
    if what < 0.85:
        key = chance.choice(sorted(set(data) - {*_SAID_OF_ITSELF}))
        del data[key]
    else:
        key = chance.choice(("sliding_window", "rope_scaling", "logit_scale", "attention_multiplier"))
        data[key] = 2
    path.write_text(json.dumps(data, indent=2))
    # Where the value is missing, the architecture follows from a default: whatever that contradicts may be named.
    how = f"config.json: {key} {'gone' if what < 0.85 else 'new'}"
    return how, (key, "config.json", "weight", "layers", "configuration that transformers can read")


def _settings(chance: random.Random, root: Path) -> tuple[str, tuple[str, ...]]:
    """A setting of text generation, or of the tokenizer."""
    names = [n for n in ("generation_config.json", "tokenizer_config.json") if (root / n).is_file()]
    return _json_leaf(chance, root / chance.choice(names), ("transformers_version",))


def _token(chance: random.Random, root: Path) -> tuple[str, tuple[str, ...]]:
    """Two tokens exchange their ids, or one is spelled otherwise."""
    path = root / "tokenizer.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = data["model"]["vocab"]
    a, b = chance.sample(sorted(vocabulary), 2)
    if chance.random() < 0.5:
        vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
        how = f"{a} and {b} exchanged"
    else:
        vocabulary[f"{a}_"] = vocabulary.pop(a)
        how = f"{a} spelled {a}_"
    path.write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
    return how, ("tokenizer.json",)


def _template(chance: random.Random, root: Path) -> tuple[str, tuple[str, ...]]:
    """One character of the chat template."""
    path = root / "chat_template.jinja"
    data = bytearray(path.read_bytes())
    place = chance.randrange(len(data))
    data[place] ^= chance.choice((1, 2, 32))
    path.write_bytes(bytes(data))
    return f"byte {place}", (path.name,)


def _file(chance: random.Random, root: Path) -> tuple[str, tuple[str, ...]]:
    """A file is cut, longer, empty, gone, another's, or a copy lies beside it."""
    kept = (MANIFEST_NAME, CHECKSUM_NAME, *_UNREAD)
    files = sorted(p for p in root.rglob("*") if p.is_file() and p.name not in kept)
    path = chance.choice(files)
    what = chance.choice(("cut", "longer", "empty", "gone", "another's", "copied"))
    data = path.read_bytes()
    others = [p for p in files if p.read_bytes() != data]
    beside = path.with_name(f"copy-{path.name}")
    if what == "gone":
        path.unlink()
    elif what == "copied":
        beside.write_bytes(data)
    else:
        cut, another = data.rstrip()[: len(data.rstrip()) - 5], chance.choice(others).read_bytes()
        new = {"cut": cut, "longer": data + b"\0", "empty": b"", "another's": another}
        path.write_bytes(new[what])
    named = beside.name if what == "copied" else path.name
    # Without its configuration or its weights an export cannot even be planned again; then that is said.
    return f"{path.name} {what}", (named, "config.json", "holds no weights", "safetensors")


_STATED = ("kind", "layers", "gates", "number_format", "details", "parents", "preprocessing")
# What nothing in the files or in the parent bears out: words, and what was measured on the way.
_UNSTATED = ("reason", "detail", "passed", "verdict", "failure", "source", "path", "name", "near_tie")


def _manifest(chance: random.Random, root: Path) -> tuple[str, tuple[str, ...]]:
    """One statement of the manifest about layers, gates, the number format or the files."""
    data = json.loads((root / MANIFEST_NAME).read_text())
    stated = {key: data[key] for key in _STATED if data.get(key)}
    if stated.get("gates"):  # measured values are gates of the run, which `verify` cannot ask again
        stated["gates"] = []
    found = [
        (place, value) for place, value in leaves(stated)
        if place and value not in ([], None, {}) and not set(_UNSTATED) & set(map(str, place))
        and place[0] != "kind" and not (place[0] == "parents" and place[-1] == "content")
    ]  # fmt: skip
    place, value = chance.choice(found)
    changed = other(chance, value)
    put(data, place, changed)
    write_checked(root / MANIFEST_NAME, json.dumps(data, indent=2) + "\n")
    names = [str(key) for key in place if isinstance(key, str)]
    layer = [data["layers"][place[1]]["name"]] if place[0] == "layers" else []
    return f"{place}: {value!r} -> {changed!r}", (*names[-1:], *layer, MANIFEST_NAME, "parent")


def _record(chance: random.Random, artifact: Path) -> tuple[str, tuple[str, ...]]:
    """The record beside an artifact: a judged figure, its verdict, its export, or its bytes."""
    path = artifact.with_name(RECORD)
    data = json.loads(path.read_text())
    what = chance.choice(("gate", "digest", "reason", "bytes", "checksum", "passed"))
    if what == "bytes":
        path.write_bytes(path.read_bytes() + chance.choice((b"\n", b" ", b"x")))
        return what, (path.name,)
    if what == "checksum":
        place = path.with_suffix(".sha256")
        text = bytearray(place.read_bytes())
        text[chance.randrange(60)] ^= 1
        place.write_bytes(bytes(text))
        return what, (path.name,)
    gate = chance.choice(data["gates"])
    if what == "digest":
        data["manifest_digest"] = "".join(chance.choices("0123456789abcdef", k=64))
    elif what == "reason":
        data["reasons"] = ["one thing differs"]
    elif what == "passed":
        gate["passed"] = False
    else:
        gate.update(value=(gate["threshold"] or 0) + 1.0 if gate["comparison"] != "at least" else -1.0)
    write_checked(path, json.dumps(data, indent=2) + "\n")
    return f"{what} {gate['name']}", (path.name,)


def _preprocessing(chance: random.Random, root: Path) -> tuple[str, tuple[str, ...]]:
    """Pictures are prepared otherwise; half of the time the manifest says so, too."""
    how, named = _json_leaf(chance, root / "preprocessing.json")
    if chance.random() < 0.5:
        changed = json.loads((root / "preprocessing.json").read_text())
        rehash(root, lambda data: data.update(preprocessing=changed))
    return how, named


def _classes(chance: random.Random, root: Path) -> tuple[str, tuple[str, ...]]:
    """Classes change places, or one is called otherwise."""
    path = root / "classes.json"
    names = json.loads(path.read_text())
    i, j = chance.sample(range(len(names)), 2)
    names[i], names[j] = (names[j], names[i]) if chance.random() < 0.5 else (names[i] + "x", names[j])
    path.write_text(json.dumps(names))
    return f"{i} and {j}", (path.name,)


_SHARED = {"file": _file, "manifest": _manifest}
LANGUAGE_KINDS = {
    "tensor": _tensor, "exchange": _exchange, "config": _config, "settings": _settings, "token": _token,
    "template": _template, **_SHARED,
}  # fmt: skip
VISION_KINDS = {
    "operator": operator, "inserted": inserted, "attribute": attribute, "wiring": wiring, "stored": stored,
    "preprocessing": _preprocessing, "classes": _classes, "record": _record, **_SHARED,
}  # fmt: skip
_KINDS = {**LANGUAGE_KINDS, **VISION_KINDS}
