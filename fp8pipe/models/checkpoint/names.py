"""Maps tensor names in a checkpoint to those in the loaded transformers model, using transformers' own rules.

transformers renames and merges tensors on loading (GPT-NeoX's `embed_out`, the vision towers of Gemma 3 and Qwen2.5-VL,
experts that are stacked into one tensor). All stages of fp8pipe keep the checkpoint's names, because inference engines
read those; this module provides the mapping where both names are needed. It applies transformers' rules to the names
that the checkpoint contains, which gives a table that can be searched in both directions. The rules themselves are
regular expressions, and are never inverted.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from fp8pipe.core.errors import ConfigurationError
from fp8pipe.models.checkpoint.quantized.base import base_entries
from fp8pipe.models.checkpoint.tensors import SCALE_SUFFIX
from fp8pipe.models.compat import import_transformers
from fp8pipe.models.language.experts import UnstackedExperts, expert_of


@dataclass(frozen=True, slots=True)
class ModelName:
    """The tensor of the loaded model to which a tensor of the checkpoint belongs.

    Attributes:
        name: its name in the model; for a scale, the model's name of the scaled weight plus `SCALE_SUFFIX`.
        whole: the stored tensor is loaded unchanged; False if transformers merges several stored tensors into one.
        renamed: transformers' rules changed the name; adding or removing the base model's prefix does not count.
    """

    name: str
    whole: bool = True
    renamed: bool = False


@dataclass(frozen=True, slots=True)
class Naming:
    """transformers' naming rules for one architecture.

    Attributes:
        prefix: name prefix of the base model, such as "model"; checkpoints of the base model alone omit it.
        tensors: names of the model's tensors.
        modules: names of the model's modules.
        experts: names of the modules that hold unstacked experts (`UnstackedExperts`).
        rules: transformers' renaming and merging rules, in the order in which loading applies them; never applied
            directly but copied first, because some rules keep state after a match.
    """

    prefix: str = ""
    tensors: frozenset[str] = frozenset()
    modules: frozenset[str] = frozenset()
    experts: frozenset[str] = frozenset()
    rules: tuple[Any, ...] = field(default=(), repr=False, compare=False)

    def table(self, stored: Iterable[str]) -> dict[str, ModelName]:
        """Map each name in a checkpoint to its `ModelName`; a scale is mapped like its weight.

        Args:
            stored: all tensor names of a checkpoint; the result has the same order.
        """
        rules = copy.deepcopy(self.rules)  # some rules keep state after their first match
        joins = [rule for rule in rules if hasattr(rule, "operations")]
        renames = [rule for rule in rules if not hasattr(rule, "operations")]
        given = list(stored)
        # Same order as in transformers, because of rules with state: sorted, with numbers compared by value.
        found = {name: self._one(name, renames, joins) for name in sorted(given, key=_natural)}
        return {name: found[name] for name in given}

    def _one(self, stored: str, renames: list[Any], joins: list[Any]) -> ModelName:
        suffix = SCALE_SUFFIX if stored.endswith(f".weight{SCALE_SUFFIX}") else ""
        before = name = stored.removesuffix(suffix)
        for rule in renames:
            name, _ = rule.rename_source_key(name)
        for rule in joins:
            joined, pattern = rule.rename_source_key(name)
            if pattern is not None:
                joined = self._spelt(joined)
                single = expert_of(rule, name, pattern, joined) if joined.rpartition(".")[0] in self.experts else None
                return ModelName((single or joined) + suffix, whole=single is not None, renamed=True)
        return ModelName(self._spelt(name) + suffix, renamed=name != before)

    def _spelt(self, name: str) -> str:
        """The name with or without the base model's prefix, whichever the model has; unchanged if it has neither."""
        ways = (name, name.removeprefix(f"{self.prefix}."), f"{self.prefix}.{name}")
        known = (way for way in ways if way in self.tensors or way.rpartition(".")[0] in self.modules)
        return next((way for way in ways if way in self.tensors), next(known, name))


def naming_of(model: nn.Module, tensors: Iterable[str]) -> Naming:
    """The naming rules of a model; empty rules if it is not a transformers model.

    Args:
        model: the model, loaded or on the meta device.
        tensors: names of its tensors.
    """
    rules: list[Any] = []
    if isinstance(model, import_transformers().PreTrainedModel):
        from transformers.conversion_mapping import get_model_conversion_mapping

        rules = get_model_conversion_mapping(model)
    modules = frozenset(name for name, _ in model.named_modules() if name)
    experts = frozenset(name for name, module in model.named_modules() if isinstance(module, UnstackedExperts))
    prefix = str(getattr(model, "base_model_prefix", ""))
    return Naming(prefix, frozenset(tensors), modules, experts, tuple(rules))


def discarded_patterns(model: nn.Module) -> tuple[str, ...]:
    """Regular expressions for tensors of old checkpoints that transformers ignores, because the model computes them."""
    buffers = [name for name, _ in model.named_buffers()]
    computed = {"rotary_emb.inv_freq": r"rotary_emb\.inv_freq$", "position_ids": r"(^|\.)position_ids$"}
    named = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    return (*named, *(rule for end, rule in computed.items() if any(name.endswith(end) for name in buffers)))


def checkpoint_names(root: Path, naming: Naming, modules: Iterable[str]) -> dict[str, str]:
    """Map the names of modules in the model to their names in the checkpoint.

    Args:
        root: the checkpoint's directory.
        naming: the naming rules of its architecture.
        modules: names of modules that own a `weight`.

    Returns:
        For each module, the name of its weight in the checkpoint without `.weight`.

    Raises:
        ConfigurationError: the checkpoint does not store a module's weight unchanged.
        BadArtifactError, ConfigurationError: the checkpoint cannot be read; see `unusable`.
    """
    table = naming.table(base_entries(root))
    stored = {known.name: name for name, known in table.items() if known.whole}
    joined = {known.name for known in table.values() if not known.whole}
    names: dict[str, str] = {}
    for module in modules:
        weight = f"{module}.weight"
        if weight in joined:
            why = "transformers computes it from several tensors on loading"
            fix = "choose a model whose linears are stored as they are loaded"
        else:
            why = f"none of its {len(table)} tensors becomes {weight}"
            fix = "save the model once with transformers' save_pretrained and start from that"
        if weight not in stored:
            what = f"the weight of {module} is not in the checkpoint under a name that can be traced"
            raise ConfigurationError(what, why=why, fix=fix)
        names[module] = stored[weight].removesuffix(".weight")
    return names


def _natural(name: str) -> list[tuple[int, int, str]]:
    # Sort key by which `layers.10` follows `layers.9`.
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name)]
