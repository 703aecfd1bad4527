"""Detects PEFT adapters, which cannot be fine-tuned, exported or served without their base model.

An adapter's weight file looks like that of a checkpoint, and transformers silently applies an adapter to a model stored
in the same directory. Every command that opens a model directory therefore calls `read_adapter` first.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from fp8pipe.core.errors import BadArtifactError, ConfigurationError
from fp8pipe.models.checkpoint.sidecars import read_config

ADAPTER_FILE: Final = "adapter_config.json"


@dataclass(frozen=True, slots=True)
class Adapter:
    """The contents of adapter_config.json.

    Attributes:
        kind: PEFT's adapter type, for instance "LORA".
        base: name or path of the base model, as given when the adapter was trained; empty if not stated.
        ranks: LoRA ranks; the first is the default, the others come from per-layer patterns.
        alpha: LoRA alpha; the low-rank update is multiplied by alpha / rank. None if not stated.
        targets: name suffixes of the adapted layers, or a single regular expression.
        modules: modules that the adapter replaces as a whole (embeddings, heads).
    """

    kind: str
    base: str
    ranks: tuple[int, ...]
    alpha: float | None
    targets: tuple[str, ...]
    modules: tuple[str, ...]

    @property
    def merge(self) -> str:
        """How to turn the adapter into a complete model, as text for the user."""
        named = f" ({self.base})" if self.base else ""
        return (
            "merge it first (peft: AutoPeftModelForCausalLM.from_pretrained(...).merge_and_unload(), then "
            f"save_pretrained, and the tokenizer's), or give the base model{named}"
        )


def read_adapter(root: Path) -> Adapter | None:
    """The adapter in a directory, or None if there is no adapter_config.json.

    Missing or malformed fields are left empty: the presence of the file is enough to identify an adapter.
    """
    if not (root / ADAPTER_FILE).is_file():
        return None
    try:
        said = read_config(root / ADAPTER_FILE)
    except (BadArtifactError, ConfigurationError):
        said = {}
    pattern = said.get("rank_pattern")
    ranks = [said.get("r"), *(pattern.values() if isinstance(pattern, dict) else ())]
    return Adapter(
        kind=str(said.get("peft_type") or ""),
        base=str(said.get("base_model_name_or_path") or ""),
        ranks=tuple(dict.fromkeys(rank for rank in ranks if isinstance(rank, int))),
        alpha=said["lora_alpha"] if isinstance(said.get("lora_alpha"), int | float) else None,
        targets=_names(said.get("target_modules")),
        modules=_names(said.get("modules_to_save")),
    )


def _names(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        return (value,)
    return tuple(sorted(map(str, value))) if isinstance(value, list) else ()
