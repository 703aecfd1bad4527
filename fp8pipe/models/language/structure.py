"""What each checkpoint tensor is to its model: asked of the model itself, built on the meta device.

Names lie: `score`, `gate` or `c_proj` may be anything. transformers builds the architecture that config.json
names without allocating a byte, and the module that owns a weight says whether it is a linear layer, a Conv1D
(stored transposed), or an embedding. Linear layers outside the text decoder (output head, vision tower,
classification head) are never quantized: the engine builds those without a quantization scheme, or gives them
other names.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fp8pipe.core.errors import ConfigurationError
from fp8pipe.models.compat import declare_torchvision_operators, import_transformers

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["ModelStructure", "Role", "build_on_meta", "load_config", "model_class", "read_structure"]


class Role(StrEnum):
    """What owns a weight."""

    LINEAR = "linear"
    CONV1D = "conv1d"
    EMBEDDING = "embedding"


@dataclass(frozen=True, slots=True)
class ModelStructure:
    """Roles by module name, as the architecture names its modules.

    Attributes:
        architecture: class name.
        model_type: transformers' model type.
        roles: module name -> role, for every module that owns a 2-D weight of a known kind.
        shapes: module name -> weight shape as the model declares it ((in, out) for Conv1D).
        modules: every module name.
        decoder: name of the text decoder; quantizable layers live below it.
        base_prefix: prefix that checkpoints of the headless model leave out.
        output_head: module name of the output projection, if any.
        tied: tensor names that share storage with another (absent from a checkpoint) -> that other name.
        discarded: patterns of tensors that old checkpoints hold and the architecture declares meaningless.
    """

    architecture: str
    model_type: str
    roles: dict[str, Role]
    shapes: dict[str, tuple[int, ...]]
    modules: frozenset[str]
    decoder: str
    base_prefix: str
    output_head: str | None
    tied: dict[str, str]
    discarded: tuple[str, ...]

    def module_of(self, tensor_name: str) -> str | None:
        """The module that owns a checkpoint tensor, in the model's spelling; None when it has none."""
        stem = tensor_name.rpartition(".")[0]
        short = stem.removeprefix(self.base_prefix + ".")
        for candidate in (stem, f"{self.base_prefix}.{stem}", short):
            if candidate in self.modules:
                return candidate
        return None

    def role_of(self, tensor_name: str) -> Role | None:
        """Role of a `.weight` tensor; None for anything else."""
        module = self.module_of(tensor_name)
        return self.roles.get(module) if module and tensor_name.endswith(".weight") else None

    def is_discarded(self, tensor_name: str) -> bool:
        """Whether the architecture throws this tensor away (GPT-2's stored causal mask, for one)."""
        return any(re.search(pattern, tensor_name) for pattern in self.discarded)

    def in_decoder(self, module: str) -> bool:
        """Whether a module lies in the text decoder (and is not the output head)."""
        inside = not self.decoder or module == self.decoder or module.startswith(self.decoder + ".")
        return inside and module != self.output_head

    @property
    def projections(self) -> dict[str, Role]:
        """Linear and Conv1D modules: what the engine builds as a linear layer."""
        return {m: r for m, r in self.roles.items() if r is not Role.EMBEDDING}


def load_config(directory: Path) -> PretrainedConfig:
    """The model's configuration, without any quantization block.

    Raises:
        ConfigurationError: no config.json, or an architecture transformers does not know.
    """
    transformers = import_transformers()
    try:
        config = transformers.AutoConfig.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigurationError(
            f"{directory} has no configuration that transformers can read",
            why=str(error).splitlines()[0] if str(error) else repr(error),
            fix="export a model whose architecture the installed transformers implements",
        ) from error
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def model_class(config: PretrainedConfig) -> Any:
    """The transformers class that config.json's `architectures` names.

    Raises:
        ConfigurationError: no architecture is named, or transformers has no such class.
    """
    transformers = import_transformers()
    names = list(getattr(config, "architectures", None) or [])
    if len(names) == 1 and hasattr(transformers, names[0]):
        return getattr(transformers, names[0])
    raise ConfigurationError(
        f"the architecture of the model is unknown: architectures = {names}",
        why="config.json must name exactly one class of the installed transformers",
        fix='set `architectures` in config.json, for example ["LlamaForCausalLM"]',
    )


def build_on_meta(config: PretrainedConfig) -> torch.nn.Module:
    """The model without storage: every parameter on the meta device."""
    with torch.device("meta"):
        model: torch.nn.Module = model_class(config)._from_config(config)
    return model


def read_structure(directory: Path) -> ModelStructure:
    """Read `config.json`, build the model on the meta device and note each module's role.

    Raises:
        ConfigurationError: see `load_config` and `model_class`.
    """
    declare_torchvision_operators()
    from transformers.pytorch_utils import Conv1D

    config = load_config(directory)
    model: Any = build_on_meta(config)
    kinds = ((torch.nn.Linear, Role.LINEAR), (Conv1D, Role.CONV1D), (torch.nn.Embedding, Role.EMBEDDING))
    roles: dict[str, Role] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, module in model.named_modules():
        role = next((role for kind, role in kinds if isinstance(module, kind)), None)
        if role is not None:
            roles[name] = role
            shapes[name] = tuple(module.weight.shape)
    names = {id(module): name for name, module in model.named_modules()}
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model
    head = model.get_output_embeddings()
    return ModelStructure(
        architecture=type(model).__name__,
        model_type=str(config.model_type),
        roles=roles,
        shapes=shapes,
        modules=frozenset(n for n in names.values() if n),
        decoder=names.get(id(decoder), ""),
        base_prefix=str(model.base_model_prefix),
        output_head=names.get(id(head)) if head is not None else None,
        tied=dict(getattr(model, "all_tied_weights_keys", {})),
        discarded=tuple(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()),
    )
