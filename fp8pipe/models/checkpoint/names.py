"""What transformers calls a checkpoint's tensors once they are loaded, by its own rules.

transformers renames and joins tensors on loading (GPT-NeoX's `embed_out`, the towers of Gemma 3 and Qwen2.5-VL, experts
stacked into one tensor). A checkpoint keeps its own names through every stage, since engines read those; whoever needs
both asks here, and the rules are transformers' and not a second copy of them. They are applied to the names that a
checkpoint really has, and the table is read in both directions: no pattern has to be inverted.
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
    """What a stored tensor is in the model.

    Attributes:
        name: of the model's tensor; for a scale, its weight's name and the suffix.
        whole: the stored tensor becomes that one as it is; False where transformers computes it from this and others.
        renamed: transformers' rules changed the name (beyond the base model's prefix).
    """

    name: str
    whole: bool = True
    renamed: bool = False


@dataclass(frozen=True, slots=True)
class Naming:
    """transformers' rules for one architecture.

    Attributes:
        prefix: of the base model, which checkpoints of the bare model lack.
        tensors: names of the model's tensors.
        modules: names of its modules.
        experts: of these, the ones that hold experts unstacked.
        rules: transformers' transforms in the order of loading; the object keeps none of their state.
    """

    prefix: str = ""
    tensors: frozenset[str] = frozenset()
    modules: frozenset[str] = frozenset()
    experts: frozenset[str] = frozenset()
    rules: tuple[Any, ...] = field(default=(), repr=False, compare=False)

    def table(self, stored: Iterable[str]) -> dict[str, ModelName]:
        """By stored name, in the order given; a scale goes with its weight."""
        rules = copy.deepcopy(self.rules)  # some rules wait for a first match: every table begins anew
        joins = [rule for rule in rules if hasattr(rule, "operations")]
        renames = [rule for rule in rules if not hasattr(rule, "operations")]
        given = list(stored)
        # transformers walks through the names sorted, numbers by value.
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
        """The name with or without the base model's prefix, whichever the model knows; as it is where it knows none."""
        ways = (name, name.removeprefix(f"{self.prefix}."), f"{self.prefix}.{name}")
        known = (way for way in ways if way in self.tensors or way.rpartition(".")[0] in self.modules)
        return next((way for way in ways if way in self.tensors), next(known, name))


def naming_of(model: nn.Module, tensors: Iterable[str]) -> Naming:
    """The rules by which transformers loads a model (live or on the meta device) that has these tensors."""
    rules: list[Any] = []
    if isinstance(model, import_transformers().PreTrainedModel):
        from transformers.conversion_mapping import get_model_conversion_mapping

        rules = get_model_conversion_mapping(model)
    modules = frozenset(name for name, _ in model.named_modules() if name)
    experts = frozenset(name for name, module in model.named_modules() if isinstance(module, UnstackedExperts))
    prefix = str(getattr(model, "base_model_prefix", ""))
    return Naming(prefix, frozenset(tensors), modules, experts, tuple(rules))


def checkpoint_names(root: Path, naming: Naming, modules: Iterable[str]) -> dict[str, str]:
    """For each module that owns a weight, its name in a checkpoint (without `.weight`).

    Raises:
        ConfigurationError: a module's weight is not in the checkpoint as it is.
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
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name)]
