"""The README.md of an export: a model card in the Hugging Face hub's format, for readers who have only the export.

The card is written before the export's manifest, which lists its checksum, and contains no times or local paths. Every
number comes from the source's manifest, or from a gate that the export's manifest will contain. Engines ignore the
file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from fp8pipe.artifact import MANIFEST_NAME, Artifact, ArtifactWriter, Gate, LayerRecord, Manifest, Parent
from fp8pipe.artifact.gate import failures
from fp8pipe.artifact.kinds import Details, TunedDetails, VitDetails
from fp8pipe.core.config import FrozenConfig
from fp8pipe.core.errors import ConfigurationError, one_line

__all__ = ["CARD_FILE", "CardFacts", "write_card"]

D = TypeVar("D", bound=Details)
CARD_FILE: Final = "README.md"
_HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FRONT: Final = re.compile(r"\A---\s*\n(.*?)\n---\s*(\n|\Z)", re.S)
_LANGUAGE: Final = "text-generation"
# Settings recorded in the source artifact's manifest, and their names in the card.
_CHOICES: Final = {
    "method": "method", "update_rule": "update rule", "rank": "rank", "steps": "steps", "bits": "precision",
    "rounding": "rounding",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class CardFacts:
    """Facts shared by all exports of a target."""

    library: str  # the hub's name of the library that loads it
    engine: str  # the engine that runs it
    limits: tuple[str, ...]  # limitations that users should know, in sentences
    serve: tuple[str, ...] | str = ("fp8pipe serve .",)  # shell lines; or a sentence if no command serves it


def write_card(
    writer: ArtifactWriter, facts: CardFacts, *, source: Path, parent: Parent, format: str,
    layers: Sequence[LayerRecord],
) -> None:  # fmt: skip
    """Write README.md into an export that is about to be committed.

    Args:
        writer: the export's writer; its files and gates are read.
        facts: facts about the export target.
        source: directory that the export was made from: an artifact, or an unquantized model.
        parent: the parent record of the source.
        format: the export's format.
        layers: layer records of the export's manifest.
    """
    card = _Card(writer, facts, source, parent, format, layers)
    for failed in failures(card.made.gates if card.made else ()):
        writer.warn(f"a gate of the exported artifact failed when it was made: {failed}")
    text = f"---\n{card.front_matter()}\n---\n\n{card.body()}"
    (writer.root / CARD_FILE).write_text(text, encoding="utf-8")


def commit_export(
    writer: ArtifactWriter, facts: CardFacts, artifact: Artifact, options: FrozenConfig, *, format: str,
    layers: Sequence[LayerRecord], **stated: Any,
) -> Artifact:  # fmt: skip
    """Write the card of an export that was made from an artifact with these options, and commit the export.

    Args:
        writer: the export's writer.
        facts: facts about the export target.
        artifact: the artifact that was exported.
        options: the target's options, recorded in the manifest without `force`.
        format: the export's format.
        layers: layer records of the export's manifest.
        stated: further arguments of `ArtifactWriter.commit`.
    """
    parent = artifact.as_parent()
    write_card(writer, facts, source=artifact.root, parent=parent, format=format, layers=layers)
    config = options.model_dump(mode="json", exclude={"force"})
    return writer.commit(config=config, seed=None, parents=[parent], layers=layers, volatile=[CARD_FILE], **stated)


class _Card:
    def __init__(
        self, writer: ArtifactWriter, facts: CardFacts, source: Path, parent: Parent, format: str,
        layers: Sequence[LayerRecord],
    ) -> None:  # fmt: skip
        self.root, self.gates, self.facts, self.name = writer.root, writer.gates, facts, writer.output.name
        self.source, self.parent, self.format, self.layers = source, parent, format, layers
        path = source / MANIFEST_NAME
        self.made = Manifest.from_json(path.read_bytes(), where=str(path)) if path.is_file() else None
        self.base = self.made.parents[0] if self.made and self.made.parents else parent
        self.task = _task(self.root)

    def front_matter(self) -> str:
        """The YAML front matter, without its delimiters."""
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
        """The card's Markdown text."""
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

    def _details(self, model: type[D]) -> D | None:
        """The exported artifact's details, if they are of this type."""
        details = self.made.details if self.made else None
        return details if isinstance(details, model) else None

    def _precisions(self) -> list[str]:
        vit = self._details(VitDetails)
        return [vit.precision] if vit else []

    def _how(self) -> list[tuple[str, str]]:
        config, vit = self.made.config if self.made else {}, self._details(VitDetails)
        rows = [("base model", _hub_id(self.base.path) or _place(self.base.path))]
        rows += [(words, str(config[key])) for key, words in _CHOICES.items() if config.get(key) is not None]
        if vit is not None:
            rows.append(("calibration images", f"{vit.images}, {vit.image_method}"))
        if self.made is None:
            four = dict.fromkeys(("nvfp4", "nvfp4-w4a4"), "16 inputs of a row")
            shared = {"fp8-block": "block of 128 x 128", **four}.get(self.format, "row")
            rows.append(("method", f"weights rounded to nearest by the export, one scale per {shared}, uncalibrated"))
        seed = self.made.seed if self.made else None
        return rows + ([("seed", str(seed))] if seed is not None else []) + [("export format", self.format)]

    def _numbers(self) -> list[str]:
        rows: list[tuple[str, str]] = []
        tuned, vit = self._details(TunedDetails), self._details(VitDetails)
        if tuned is not None and (losses := tuned.heldout_loss) is not None:
            named = (("before tuning", losses.untuned), ("as deployed", losses.deployed))
            rows += [(f"held-out loss {words}, nats per answer token", f"{loss:.4f}") for words, loss in named]
        if vit is not None and (found := vit.accuracy) is not None:
            models = (("original", found.teacher), ("this model", found.quantized))
            rows += [
                (f"top-1, {words}, {found.images} pictures", f"{100 * score.top1:.2f} %") for words, score in models
            ]
        if not rows:
            return ["## Numbers", "Nothing was measured on held-out data before the export."]
        return ["## Numbers", _table(rows), "From the manifest of what was exported; measured before the export."]

    def _serve(self) -> str:
        if isinstance(self.facts.serve, str):
            return self.facts.serve
        fenced = "```sh\n" + "\n".join(self.facts.serve) + "\n```"
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
        return "\n".join(["Differences found on the written files, before the export was checksummed:\n", *lines])

    def _digests(self) -> str:
        rows = [("base model", self.base.digest)] if self.base is not self.parent or self.made is None else []
        if self.made is not None:
            rows.append((f"content of the {self.made.kind} artifact it was made from", self.made.content))
        return _table([(name, f"`{digest}`") for name, digest in rows])


def _counted(gate: Gate) -> str:
    """A gate's detail as the end of a sentence: "of 12 in 3 layers" as it is, any other text in parentheses."""
    if not gate.detail:
        return ""
    return f" {gate.detail}" if gate.detail.startswith("of ") else f" ({gate.detail})"


def _task(root: Path) -> str:
    if not (root / "preprocessing.json").is_file():
        return _LANGUAGE
    return "image-classification" if (root / "classes.json").is_file() else "image-feature-extraction"


def _hub_id(origin: str) -> str | None:
    """The hub id of a base model, if `origin` is one; a revision is dropped."""
    name = f"timm/{origin.removeprefix('timm:')}" if origin.startswith("timm:") else origin.partition("@")[0]
    return name if _HUB_ID.fullmatch(name) and not Path(origin).exists() else None


def _place(origin: str) -> str:
    """A local source reduced to its last path component, because local paths mean nothing elsewhere."""
    return origin if origin.startswith("sample:") else Path(origin).name or origin


def _licence(source: Path, root: Path) -> dict[str, Any]:
    """Front matter for the licence: from the source's card, else its config.json, else a LICENSE file of the export."""
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
            f"{card} has no valid front matter", why=one_line(error), fix="correct it, or remove it"
        ) from error
    return loaded if isinstance(loaded, dict) else {}


def _json(path: Path) -> dict[str, Any]:
    loaded = json.loads(path.read_text(encoding="utf-8"))
    return loaded if isinstance(loaded, dict) else {}


def _table(rows: Sequence[tuple[str, str]]) -> str:
    lines = [f"| {name} | {value.replace('|', '&#124;')} |" for name, value in rows]
    return "\n".join(["| | |", "|---|---|", *lines])
