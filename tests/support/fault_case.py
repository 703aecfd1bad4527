"""What an injected fault is, and the edits that inject one."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from artifact_tree import rehash
from safetensors.torch import load_file, save_file
from torch import Tensor

from fp8pipe.artifact import write_checked
from fp8pipe.artifact.finding import Check
from fp8pipe.artifact.record import record_path
from fp8pipe.artifact.signature import sign, signature_path

__all__ = ["Fault", "code_bits", "encoding", "graph", "json_file", "manifest", "record", "signed", "tensors"]

Inject = Callable[[Path], None]


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        name: short, unique.
        artifact: which artifact or record of the tree it is injected in.
        where: the file, in words.
        how: what is done to it.
        check: the check that must report it.
        named: what the report must name: file, layer, tensor or node.
        inject: does it, given the tree; leaves hashes and checksums right unless they are the fault.
        parent: what must be in the tree beside it for the check; none where the artifact alone is enough.
    """

    name: str
    artifact: str
    where: str
    how: str
    check: Check
    named: str
    inject: Inject
    parent: str | None = None


def tensors(artifact: str, change: Callable[[dict[str, Tensor]], None], file: str = "") -> Inject:
    """Edit the tensors of safetensors files, each staying in its file; new ones go into the first.

    Args:
        artifact: in the tree.
        change: edits them by name.
        file: one file's name; all but the adapter's where it is empty.
    """

    def inject(tree: Path) -> None:
        root = tree / artifact
        files = [root / file] if file else [f for f in sorted(root.glob("*.safetensors")) if "adapter" not in f.name]
        held = {path: load_file(path) for path in files}
        found = {name: tensor.clone() for part in held.values() for name, tensor in part.items()}
        places = {name: path for path, part in held.items() for name in part}
        change(found)
        for path in files:
            part = {n: t.contiguous() for n, t in found.items() if places.get(n, files[0]) == path}
            save_file(part, path, metadata={"format": "pt"})
        index = root / "model.safetensors.index.json"
        if index.is_file():
            data = json.loads(index.read_text())
            data["weight_map"] = {name: places.get(name, files[0]).name for name in sorted(found)}
            index.write_text(json.dumps(data, indent=2))
        rehash(root)

    return inject


def json_file(
    artifact: str, file: str, change: Callable[[Any], Any], also: Callable[[dict], None] | None = None
) -> Inject:
    """Edit a JSON file of an artifact; `change` returns the new content, or None if it edited in place."""

    def inject(tree: Path) -> None:
        path = tree / artifact / file
        data = json.loads(path.read_text())
        changed = change(data)
        path.write_text(json.dumps(data if changed is None else changed, indent=2) + "\n")
        rehash(tree / artifact, also)

    return inject


def manifest(artifact: str, change: Callable[[dict], None]) -> Inject:
    """Edit the manifest and checksum it again."""

    def inject(tree: Path) -> None:
        rehash(tree / artifact, change)

    return inject


def encoding(name: str, part: str, **changes: object) -> Callable[[dict], None]:
    """A layer's encoding of its weight or activation, as the manifest states it."""

    def change(data: dict) -> None:
        next(layer for layer in data["layers"] if layer["name"] == name)[part].update(changes)

    return change


def record(file: str, change: Callable[[dict], None]) -> Inject:
    """Edit a record beside the artifacts and checksum it again."""

    def inject(tree: Path) -> None:
        data = json.loads((tree / file).read_text())
        change(data)
        write_checked(tree / file, json.dumps(data, indent=2) + "\n")

    return inject


def signed(artifact: str, inject_after: Inject) -> Inject:
    """Sign an artifact and its record with the key whose public half lies in the tree as `key.pub`, then inject."""

    def inject(tree: Path) -> None:
        from signing_keys import keys  # of the extra `sign`

        keys(tree)
        for path in (tree / artifact, record_path(tree / artifact)):
            sign(path, signature_path(path), key=tree / "key")
        inject_after(tree)

    return inject


def graph(artifact: str, edit: Callable[[ir.Model], None]) -> Inject:
    """Edit `model.onnx`; engines beside it are then stale, unless the manifest is made to say otherwise."""

    def inject(tree: Path) -> None:
        path = tree / artifact / "model.onnx"
        model = ir.load(path)
        edit(model)
        ir.save(model, path)
        rehash(tree / artifact)

    return inject


def code_bits(tensor: Tensor) -> Tensor:
    """The bytes of FP8 codes, to be edited in place."""
    return tensor.view(torch.uint8)
