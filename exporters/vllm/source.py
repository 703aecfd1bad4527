"""The input of an export: a falqon artifact, a merged-LoRA artifact, or a plain Hugging Face directory.

A `Source` represents any of the three: its tensor headers, the parsed config.json, and its parent record. Tensor data
is read here only for hashing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from fp8pipe.artifact import MANIFEST_NAME, Encoding, LayerRecord, Parent, open_artifact
from fp8pipe.artifact.kinds import FALQON_KIND, TUNED_KINDS, KvCacheFacts, TunedDetails
from fp8pipe.core.errors import ConfigurationError
from fp8pipe.models.checkpoint.packed import join_packed
from fp8pipe.models.checkpoint.quantized.base import BaseCheckpoint, read_base
from fp8pipe.models.checkpoint.sidecars import read_config
from fp8pipe.models.checkpoint.stacks import split_stacks
from fp8pipe.models.checkpoint.tensors import TensorEntry, model_parent, weight_entries
from fp8pipe.models.language.sources import check_no_adapter, resolve_model

HUGGING_FACE: Final = "huggingface"  # the kind of a plain directory


@dataclass(frozen=True, slots=True)
class Source:
    """One export's input.

    Attributes:
        root: its directory.
        kind: the artifact's kind, or HUGGING_FACE.
        config: the parsed config.json.
        tensors: entries by tensor name; stacked experts one by one (`split_stacks`).
        parent: the parent record for the export's manifest.
        transposed: modules that the artifact declares as stored `(in, out)`; None if it declares nothing.
        layers: the manifest's records by layer; empty for a plain directory.
        adapter: the state of the adapter according to the manifest; None for a plain directory.
        base: a plain directory's checkpoint; None for an artifact.
        kv_ranges: ranges of keys and values from the manifest; None if there are none.
    """

    root: Path
    kind: str
    config: dict[str, Any]
    tensors: dict[str, TensorEntry]
    parent: Parent
    transposed: frozenset[str] | None = None
    layers: dict[str, LayerRecord] = field(default_factory=dict)
    adapter: str | None = None
    base: BaseCheckpoint | None = None
    kv_ranges: KvCacheFacts | None = None

    @property
    def holds_codes(self) -> bool:
        """Whether linear weights are already codes, of FP8 or NVFP4."""
        return self.kind == FALQON_KIND

    def encoding_of(self, module: str) -> Encoding | None:
        """How the source stores a layer's weight, from its manifest; None if it is float or not listed.

        The manifest may name the layer without leading parts of `module`, such as the base model's prefix.
        """
        parts = module.split(".")
        names = (".".join(parts[start:]) for start in range(len(parts)))
        return next((self.layers[name].weight for name in names if name in self.layers), None)

    @property
    def trained_activations(self) -> Encoding | None:
        """How training quantized the inputs of FP8 layers; None if it did not, or if no layer was trained in FP8."""
        return next((layer.activation for layer in self.layers.values() if layer.activation is not None), None)


def open_source(source: Path | str, *, verify: bool = True) -> Source:
    """Open and check an export's input.

    Args:
        source: a directory, a .gguf file, or anything else that `resolve_model` understands.
        verify: hash the files of an artifact or a plain directory. Without it the parent record of a plain
            directory has no digest.

    Raises:
        ConfigurationError: the source does not exist, has no config.json, or is in a quantized format that cannot be
            read.
        BadArtifactError: the artifact is unfinished, corrupt, or of a kind that cannot be exported.
    """
    root = Path(source)
    if not root.is_dir():
        return _from_hugging_face(resolve_model(str(source)).path, str(source), verify)
    if not (root / MANIFEST_NAME).is_file() and not root.name.endswith(".partial"):
        return _from_hugging_face(root, str(root), verify)
    artifact = open_artifact(root, kind=TUNED_KINDS, verify=verify)
    manifest = artifact.manifest
    details = manifest.details_of(TunedDetails)
    config = _read_config(root)
    return Source(
        root=root,
        kind=manifest.kind,
        config=config,
        tensors=split_stacks(config.get("model_type"), join_packed(weight_entries(root))),
        transposed=frozenset(name.removesuffix(".weight") for name in details.transposed),
        layers={layer.name: layer for layer in manifest.layers},
        adapter=details.adapter,
        parent=artifact.as_parent(),
        kv_ranges=details.kv_cache,
    )


def _from_hugging_face(root: Path, origin: str, verify: bool) -> Source:
    check_no_adapter(root)
    _read_config(root)  # without a config.json the directory cannot be exported
    base = read_base(root)  # refuses an incomplete checkpoint before it is hashed
    unhashed = Parent(kind="model", digest="", path=origin, stored=base.stored)
    parent = model_parent(root, origin, base.stored) if verify else unhashed
    return Source(root=root, kind=HUGGING_FACE, config=base.config, tensors=base.entries, parent=parent, base=base)


def _read_config(root: Path) -> dict[str, Any]:
    if not (root / "config.json").is_file():
        raise ConfigurationError(
            f"{root} is neither an artifact nor a Hugging Face model",
            why="it holds no manifest.json and no config.json",
            fix="name the directory that `fp8pipe finetune` wrote, or one with config.json and safetensors",
        )
    return read_config(root / "config.json")
