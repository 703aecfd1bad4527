"""A PEFT adapter: a change of a model that is not there, and so nothing that can be tuned, exported or served.

Its weights look like a checkpoint's, and transformers would load them into the model beside them. So whoever opens a
directory asks here first, and says the same about it.
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
    """What adapter_config.json says.

    Attributes:
        kind: PEFT's type, for instance "LORA".
        base: the model that it changes, as it was named in training.
        ranks: of its matrices; the first is that of the layers that no pattern gives another one.
        alpha: the update is scaled by alpha / rank.
        targets: ends of the names of the layers that it changes, or one pattern.
        modules: other modules that it replaces whole (embeddings, heads).
    """

    kind: str
    base: str
    ranks: tuple[int, ...]
    alpha: float | None
    targets: tuple[str, ...]
    modules: tuple[str, ...]

    @property
    def merge(self) -> str:
        """How a model is made of it, in words."""
        named = f" ({self.base})" if self.base else ""
        return (
            "merge it first (peft: AutoPeftModelForCausalLM.from_pretrained(...).merge_and_unload(), then "
            f"save_pretrained, and the tokenizer's), or give the base model{named}"
        )


def read_adapter(root: Path) -> Adapter | None:
    """The adapter in a directory; None where there is none.

    What cannot be read of adapter_config.json is left empty: that there is an adapter is certain all the same.
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
