"""The structure of a causal language model: linears, shared inputs, decoder, output head and tied weights.

It is derived from the model itself, because names such as `score`, `gate` or `c_proj` are used for different things.
The model is either loaded, or built by transformers on the meta device from config.json, which allocates no memory. The
class of the module that owns a weight shows whether it is a linear layer, a Conv1D (stored transposed) or an embedding.
The output head is what the model declares as its output embeddings, tied weights share their storage, and a forward
pass shows which linears share an input. Linears outside the text decoder (output head, vision tower, classification
head) are never quantized to FP8: inference engines build them without quantization, or under other names.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from fp8pipe.core.errors import ConfigurationError
from fp8pipe.models.checkpoint.blame import unusable
from fp8pipe.models.checkpoint.names import Naming, discarded_patterns, naming_of
from fp8pipe.models.checkpoint.sidecars import read_config
from fp8pipe.models.checkpoint.stacks import join_stacks
from fp8pipe.models.compat import import_transformers
from fp8pipe.models.language.experts import call_every_expert, find_routers, wrong_expert_settings
from fp8pipe.models.language.probing import watch_pass
from fp8pipe.models.language.unstacking import unstack_experts
from fp8pipe.models.settings import check_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


# Smallest dimension of a linear that is trained and quantized: FP8 kernels require multiples of 16, and a smaller layer
# (a gate with one output) would limit the adapter rank of all layers.
LEAST_SIDE: Final = 16
# What transformers raises if a config.json has a value of the wrong kind, or two that do not go together.
_BY_SETTINGS: Final = (
    ArithmeticError, AssertionError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError
)  # fmt: skip
_OTHER_CONFIG: Final = "use the config.json that belongs to these weights"


class Role(StrEnum):
    """The kind of module that owns a weight."""

    LINEAR = "linear"
    CONV1D = "conv1d"
    EMBEDDING = "embedding"
    ROUTER = "router"


@dataclass(frozen=True, slots=True)
class ModelStructure:
    """Modules and tensors of a model, with the names that they have in the loaded transformers model.

    Attributes:
        architecture: class name of the model.
        model_type: transformers' model type.
        roles: role of each module that owns a 2-D weight of a known kind, by name in module order.
        tensors: shape of each tensor in the state dict by name, as stored ((in, out) for the weight of a Conv1D).
        modules: names of all modules.
        decoder: name of the text decoder, which contains all quantizable layers; empty if it is the model itself.
        base_prefix: name prefix of the base model; checkpoints of the model without its head omit it.
        output_head: name of the output projection; None if there is none.
        tied: for each tensor that shares the storage of another one and is absent from checkpoints, the other's name.
        shared: linears whose weight is also owned by another module.
        loose: parameters with two or more axes that belong to no module of a known kind.
        embedding: name of the input embedding; None if there is none.
        buffers: tensors of the state dict that are not parameters.
        discarded: regular expressions for tensors of old checkpoints that the architecture ignores.
        naming: transformers' rules that map checkpoint names to these names.
        unusable: linears that a forward pass of text does not call or whose weight it reads directly, and for each the
            reason; empty until `probed`.
        input_groups: the trainable linears, grouped by the tensor that they read; empty until `probed`.
    """

    architecture: str
    model_type: str
    roles: dict[str, Role]
    tensors: dict[str, tuple[int, ...]]
    modules: frozenset[str]
    decoder: str
    base_prefix: str
    output_head: str | None
    tied: dict[str, str]
    shared: frozenset[str]
    loose: tuple[str, ...]
    embedding: str | None
    buffers: frozenset[str]
    discarded: tuple[str, ...]
    naming: Naming = field(default_factory=Naming)
    unusable: dict[str, str] = field(default_factory=dict)
    input_groups: tuple[tuple[str, ...], ...] = ()

    @property
    def projections(self) -> dict[str, Role]:
        """Roles of the linear, Conv1D and router modules, that is, of all layers that engines build as linears."""
        return {m: r for m, r in self.roles.items() if r is not Role.EMBEDDING}

    @property
    def left_out(self) -> dict[str, str]:
        """Linears that are neither trained nor quantized, and for each the reason."""
        return {m: why for m in self.projections if (why := self._reason(m)) is not None}

    def _reason(self, module: str) -> str | None:
        if module == self.output_head:
            return "output head"
        if self.roles[module] is Role.ROUTER:
            return "router: one code more or less would send tokens to other experts"
        if module in self.shared:
            return "weight tied to another module"
        if not self.in_decoder(module):
            return "outside the text decoder"
        if (side := min(self.shape(module))) < LEAST_SIDE:
            return f"a side of {side} is too short for FP8 kernels and for an adapter"
        return self.unusable.get(module)

    @property
    def trainable(self) -> tuple[str, ...]:
        """Names of the linears that can be trained and quantized, in module order."""
        left_out = self.left_out
        return tuple(m for m in self.projections if m not in left_out)

    def transposed(self, module: str) -> bool:
        """Whether a module's weight is stored `(in, out)`."""
        return self.roles.get(module) is Role.CONV1D

    def stored_shape(self, module: str) -> tuple[int, ...]:
        """Shape of a module's weight as stored in a checkpoint."""
        return self.tensors[f"{module}.weight"]

    def shape(self, module: str) -> tuple[int, int]:
        """Shape of a linear's weight as `(out, in)`, however it is stored."""
        rows, columns = self.stored_shape(module)
        return (columns, rows) if self.transposed(module) else (rows, columns)

    def weight(self, model: nn.Module, module: str) -> Tensor:
        """A linear's weight as `(out, in)`, taken from the loaded model that this structure describes."""
        parameter = model.get_submodule(module).get_parameter("weight").detach()
        return parameter.t().contiguous() if self.transposed(module) else parameter

    def owner(self, tensor: str) -> str | None:
        """Name of the module that owns a tensor (given by its name in the model); None if there is no such module."""
        stem = tensor.rpartition(".")[0]
        return stem if stem in self.modules else None

    def is_discarded(self, tensor_name: str) -> bool:
        """Whether the architecture ignores a tensor of a checkpoint, such as the causal mask stored by old GPT-2s."""
        return any(re.search(pattern, tensor_name) for pattern in self.discarded)

    def in_decoder(self, module: str) -> bool:
        """Whether a module is inside the text decoder (and is not the output head)."""
        inside = not self.decoder or module == self.decoder or module.startswith(self.decoder + ".")
        return inside and module != self.output_head

    def is_expert(self, module: str | None) -> bool:
        """Whether a module belongs to an expert that was unstacked by `unstack_experts`."""
        return module is not None and any(module.startswith(f"{layer}.") for layer in self.naming.experts)

    def probed(self, model: nn.Module) -> ModelStructure:
        """A copy with `unusable` and `input_groups`, which are observed in a forward pass of a few tokens.

        Args:
            model: the model that this structure describes, loaded or on the meta device.

        Raises:
            ConfigurationError: the model does not run on token ids alone.
        """
        asked = self.trainable
        leaves = tuple(name for name, role in self.roles.items() if role is not Role.ROUTER)
        with call_every_expert(model):
            seen = watch_pass(model, asked, leaves)
        usable = [tuple(name for name in group if name not in seen.unusable) for group in seen.groups]
        return replace(self, unusable=seen.unusable, input_groups=tuple(group for group in usable if group))


def structure_of(model: nn.Module) -> ModelStructure:
    """The structure of a transformers model, loaded or on the meta device; not yet `probed`."""
    import_transformers()
    from transformers.pytorch_utils import Conv1D

    routers = find_routers(model)
    kinds = ((nn.Linear, Role.LINEAR), (Conv1D, Role.CONV1D), (nn.Embedding, Role.EMBEDDING))
    roles: dict[str, Role] = {}
    loose: list[str] = []
    for name, module in model.named_modules():
        role = next((role for kind, role in kinds if isinstance(module, kind)), None)
        role = Role.ROUTER if name in routers else role
        if role is not None:
            roles[name] = role
            continue
        owned = module.named_parameters(recurse=False)
        loose += [f"{name}.{leaf}" if name else leaf for leaf, parameter in owned if parameter.dim() >= 2]
    names = {id(module): name for name, module in model.named_modules()}
    pretrained: Any = model
    decoder = pretrained.get_decoder() if hasattr(model, "get_decoder") else getattr(model, "base_model", None)
    head = pretrained.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    embedding = pretrained.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    parameters = dict(model.named_parameters(remove_duplicate=False))
    owners = Counter(_identity(parameter) for parameter in parameters.values())
    tensors = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return ModelStructure(
        architecture=type(model).__name__,
        model_type=str(getattr(getattr(model, "config", None), "model_type", "")),
        roles=roles,
        tensors=tensors,
        modules=frozenset(n for n in names.values() if n),
        decoder=names.get(id(decoder), ""),
        base_prefix=str(getattr(model, "base_model_prefix", "")),
        output_head=names.get(id(head)) if head is not None else None,
        tied=dict(getattr(model, "all_tied_weights_keys", {})),
        shared=frozenset(m for m in roles if owners[_identity(parameters[f"{m}.weight"])] > 1),
        loose=tuple(loose),
        embedding=names.get(id(embedding)) if embedding is not None else None,
        buffers=frozenset(tensors.keys() - parameters.keys()),
        discarded=discarded_patterns(model),
        naming=naming_of(model, tensors),
    )


def read_structure(directory: Path) -> ModelStructure:
    """The structure of the model described by a directory's config.json, built on the meta device.

    Raises:
        ConfigurationError: the class cannot be built with these settings, or has layers that it cannot have; see also
            `load_config` and `model_class`.
    """
    config = load_config(directory)
    kind = model_class(config)
    try:
        with torch.device("meta"):
            model = kind._from_config(config)
    except _BY_SETTINGS as error:
        raise unusable(
            directory,
            f"no {kind.__name__} can be built from {directory / 'config.json'}",
            why=f"{type(error).__name__}: {_reason(error)}",
            fix=_OTHER_CONFIG,
        ) from error
    with torch.device("meta"):
        unstack_experts(model)
        return structure_of(model)


def load_config(directory: Path) -> PretrainedConfig:
    """The transformers configuration of the model in a directory, without its quantization block.

    Raises:
        BadArtifactError, ConfigurationError: there is no config.json, its architecture is unknown to transformers, or
            it has settings that `check_config` rejects; see `unusable`.
    """
    check_config(directory)
    from huggingface_hub.errors import StrictDataclassError

    auto = import_transformers().AutoConfig
    try:
        config: PretrainedConfig = auto.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    except (*_BY_SETTINGS, StrictDataclassError) as error:
        raise unusable(
            directory,
            f"{directory} has no configuration that transformers can read",
            why=_reason(error),
            fix="complete its config.json, or give a model whose architecture the installed transformers implements",
        ) from error
    if wrong := list(wrong_expert_settings(read_config(directory / "config.json"))):
        raise unusable(
            directory,
            f"the config.json of {directory} contradicts itself about experts",
            why="; ".join(wrong),
            fix=_OTHER_CONFIG,
        )
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def _reason(error: Exception) -> str:
    """The first line of an error's message, and the line after it if the first only announces it with a colon."""
    first, *more = str(error).splitlines() or [repr(error)]
    return f"{first} {more[0].strip()}" if more and first.endswith(":") else first


def model_class(config: PretrainedConfig) -> Any:
    """The transformers class named by `architectures` in config.json, which must compute next-token logits.

    Raises:
        ConfigurationError: not exactly one class is named, transformers has no such class, or it is not a causal
            language model.
    """
    transformers = import_transformers()
    from transformers.models.auto import modeling_auto as auto

    named = getattr(config, "architectures", None) or []
    names = list(named) if isinstance(named, list | tuple) else []
    causal = (auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    known = [name for table in causal for name in _classes(table.get(config.model_type))]
    if len(names) != 1 or not hasattr(transformers, names[0]):
        raise ConfigurationError(
            f"the architecture of the model is unknown: architectures = {named!r}",
            why="config.json must name exactly one class of the installed transformers",
            fix=f'set `architectures` in config.json, for example ["{next(iter(known), "LlamaForCausalLM")}"]',
        )
    if names[0] not in known:
        raise ConfigurationError(
            f"{names[0]} is not a causal language model",
            why=f"of the model type {config.model_type}, {' and '.join(known) or 'no class'} can predict tokens",
            fix="give a checkpoint of such a class: without its output head a model cannot be trained or served as one",
        )
    return getattr(transformers, names[0])


def _classes(named: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if named is None else (named,) if isinstance(named, str) else tuple(named)


def build_model(directory: Path, state: dict[str, Tensor], dtype: torch.dtype, **options: str) -> PreTrainedModel:
    """Build a directory's model with given weights, on the CPU in evaluation mode.

    Args:
        directory: contains config.json.
        state: the weights under their names in a checkpoint; transformers renames them as the architecture requires.
            Experts may come one by one where the family's checkpoints store them stacked.
        dtype: dtype of the model's parameters.
        **options: passed to `from_pretrained`.

    Raises:
        ConfigurationError: see `load_config` and `model_class`.
    """
    config = load_config(directory)
    state = join_stacks(config.model_type, state)
    built = model_class(config).from_pretrained(None, config=config, state_dict=state, dtype=dtype, **options)
    model: PreTrainedModel = built.eval()
    return model


def _identity(parameter: Tensor) -> int:
    """A number that is equal for tied weights: the storage's address, or the object's id if there is no address."""
    return id(parameter) if parameter.is_meta else parameter.data_ptr() or id(parameter)
