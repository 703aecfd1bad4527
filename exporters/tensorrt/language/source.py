"""Read the input of an export of a language model: a FALQON artifact.

It is read as codes in FP8 or NVFP4, scales and float tensors, from which a torch model can be built to compare the
export with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from exporters.tensorrt.language.target import LanguageExportOptions
from exporters.tensorrt.target import TrtFormat
from exporters.vllm.export import plan_export
from exporters.vllm.foresee import plan_ahead
from exporters.vllm.lint import lint, lint_structure
from exporters.vllm.options import ExportFormat, VllmExportOptions
from exporters.vllm.plan import Action, ExportPlan, Unit
from fp8pipe.artifact import Artifact, Encoding, LayerRecord, ScaleRule, open_artifact
from fp8pipe.artifact.finding import Finding, LintFindingsError
from fp8pipe.artifact.kinds import FALQON_KIND
from fp8pipe.core.errors import ConfigurationError
from fp8pipe.models.checkpoint.packed import PackedEntry
from fp8pipe.models.checkpoint.tensors import read_tensor
from fp8pipe.models.language.structure import build_model, load_config
from fp8pipe.numerics.nvfp4 import BlockCodes, BlockScales, unpack_nibbles
from fp8pipe.numerics.quantizers import WeightCodes

if TYPE_CHECKING:
    from transformers import PreTrainedModel


V = TypeVar("V")


class Reads(Mapping[str, V]):
    """A mapping that reads a value from a file each time it is asked for one, so that none is held in memory."""

    def __init__(self, readers: Mapping[str, Callable[[], V]]) -> None:
        self._readers = dict(readers)

    def __getitem__(self, name: str) -> V:
        return self._readers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)

    def __contains__(self, name: object) -> bool:
        return name in self._readers


@dataclass(frozen=True, slots=True)
class LanguageModel:
    """A FALQON artifact that has been opened and linted; tensors are read when they are asked for, and not kept."""

    artifact: Artifact  # with its manifest
    plan: ExportPlan  # its tensors and their roles, from file headers
    # Weights by module path: FP8 codes `(out, in)`, and one scale `()` or one per row `(out,)`; or, if `packed`, NVFP4.
    weights: Mapping[str, WeightCodes | BlockCodes]
    weight_scales: Mapping[str, Tensor]  # the scales of weights in FP8, by module
    floats: Mapping[str, Tensor]  # all other tensors as stored, by their names in the checkpoint
    packed: bool = False  # whether the weights are in NVFP4

    @property
    def root(self) -> Path:
        """The artifact's directory."""
        return self.artifact.root

    @property
    def format(self) -> TrtFormat:
        """The format of a graph that holds the artifact's codes."""
        return TrtFormat.NVFP4_WEIGHT_ONLY if self.packed else TrtFormat.FP8

    @property
    def per_tensor(self) -> bool:
        """Whether every weight has a single scale."""
        return not self.packed and all(_has_one(unit) for unit in self.plan.units if _is_codes(unit))

    def torch_model(self, dtype: torch.dtype) -> PreTrainedModel:
        """Build the transformers model with dequantized weights, in evaluation mode.

        Every value is rounded once to `dtype`. Attention is `eager`, as a tracer needs separate matrix multiplications
        and softmax.
        """
        state = {name: tensor.to(dtype) for name, tensor in self.floats.items()}
        for unit in self.plan.units:
            if unit.action is Action.CODES and unit.module is not None:
                state[unit.entry.name] = self.weights[unit.module].dequantize().to(dtype)
        return build_model(self.root, state, dtype, attn_implementation="eager")


def holds_nvfp4(artifact: Artifact) -> bool:
    """Whether the weights of an artifact are in NVFP4."""
    return any(layer.weight is not None and layer.weight.format == "nvfp4" for layer in artifact.manifest.layers)


def open_language(source: Path, *, packed: bool = False) -> LanguageModel:
    """Open an artifact of kind `falqon`, verify its hashes, lint it and read its tensors.

    Args:
        source: its directory.
        packed: whether weights in NVFP4 are accepted.

    Raises:
        BadArtifactError: the artifact is unfinished, damaged, or of another kind.
        LintFindingsError: something in it could not be served correctly; see the rules of the export to vLLM.
        ConfigurationError: its architecture cannot be exported.
    """
    artifact = open_artifact(source, kind=FALQON_KIND)
    packed = packed and holds_nvfp4(artifact)
    plan = plan_export(source, VllmExportOptions(format=ExportFormat.NVFP4) if packed else VllmExportOptions())
    if findings := [*lint(plan), *_unreadable(plan)]:
        raise LintFindingsError(findings, str(source))
    units = [unit for unit in plan.units if _is_codes(unit)]
    weights = Reads({str(unit.module): partial(_read_codes, unit) for unit in units})
    floats = Reads({u.entry.name: partial(read_tensor, u.entry) for u in plan.units if not _is_codes(u)})
    scales = Reads({str(u.module): partial(_read_scale, u) for u in units if u.scale is not None})
    return LanguageModel(artifact, plan, weights, scales, floats, packed)


def open_in_format(source: Path, options: LanguageExportOptions) -> LanguageModel:
    """Open an artifact for an export as a graph, in the requested format or its own.

    Raises:
        ConfigurationError: the format is not the artifact's, or a calibration was asked for that it does not need.
        BadArtifactError, LintFindingsError: as `open_language`.
    """
    model = open_language(source, packed=options.format != "fp8")
    if options.format not in (None, model.format):
        raise ConfigurationError(
            f"{source} cannot be exported as {options.format}",
            why="its weights are in FP8, and would be rounded again",
            fix="leave out --format, or train with `fp8pipe finetune --precision nvfp4`",
        )  # fmt: skip
    if model.packed and "calibration" in options.model_fields_set:
        raise ConfigurationError(
            "--calibration does not apply", why="with weights in NVFP4, inputs of linear layers are not quantized",
            fix="leave it out",
        )  # fmt: skip
    return model


def _is_codes(unit: Unit) -> bool:
    coded = unit.scale is not None or isinstance(unit.entry, PackedEntry)
    return unit.action is Action.CODES and unit.module is not None and coded


def _has_one(unit: Unit) -> bool:
    """Whether a weight has one scale for all of it."""
    return unit.scale is not None and math.prod(unit.scale.shape) == 1


def _read_codes(unit: Unit) -> WeightCodes | BlockCodes:
    if isinstance(unit.entry, PackedEntry):
        packed, blocks, _ = unit.entry.parts
        scales = BlockScales(read_tensor(blocks), unit.entry.read_global_scale())
        return BlockCodes(unpack_nibbles(read_tensor(packed)), scales)
    return WeightCodes(read_tensor(unit.entry), _read_scale(unit), 8)


def _read_scale(unit: Unit) -> Tensor:
    """`()` or `(out,)`."""
    assert unit.scale is not None
    scale = read_tensor(unit.scale)
    return scale.reshape(()) if _has_one(unit) else scale.reshape(-1)


def _unreadable(plan: ExportPlan) -> list[Finding]:
    """Findings on weights that exports to TensorRT (graph or checkpoint) do not support yet, although vLLM does."""
    fix = "export with --target vllm"
    units = [unit for unit in plan.units if unit.quantized]
    found = [
        Finding("transposed-weight", u.entry.name, "its codes are stored (in, out)", fix) for u in units if u.transposed
    ]
    why = (
        "an expert's weight: which experts run depends on the token, but each would need a static scale for its inputs"
    )
    return [*found, *(Finding("expert", u.entry.name, why, fix) for u in units if plan.structure.is_expert(u.module))]


def foresee_checkpoint(root: Path, kind: str, trained: Collection[str]) -> dict[str, list[Finding]]:
    """Predict the findings of an export as a checkpoint in ModelOpt's layout, before training.

    Args:
        root: the directory of the base model.
        kind: the kind of artifact that training will write.
        trained: names of the linear layers that will be trained.

    Returns:
        The findings, by the options of the export.
    """
    plan = plan_ahead(root, kind, trained, VllmExportOptions().format)
    return {"--target trt --format modelopt-checkpoint": [*lint_structure(plan), *_unreadable(plan)]}


def foresee_graph(root: Path, kind: str, trained: Collection[str]) -> dict[str, list[Finding]]:
    """Predict the findings of an export as a graph, before training; see `foresee_checkpoint`.

    Whether the model can be traced is not predicted; this becomes known only during the export.
    """
    (findings,) = foresee_checkpoint(root, kind, trained).values()
    seen = _partial_attention(root)
    return {"--target trt": [*findings, *([Finding("attention", "config.json", seen, _OTHERWISE)] if seen else [])]}


def language_records(model: LanguageModel, calibration: str) -> list[LayerRecord]:
    """The artifact's layer records, adapted to the export: static activation scales, and the granularity of weights.

    Layers that are not quantized in the export get no encodings.

    Args:
        model: the artifact.
        calibration: the method of calibration (`Calibration`).
    """
    rule = ScaleRule.POWER_OF_TWO if calibration == "amax" else ScaleRule(calibration)
    inputs = Encoding(format="e4m3", bits=8, granularity="per-tensor", scale_rule=rule)
    records, spelt = [], model.plan.spelt
    by_name = {spelt[str(unit.module)]: unit for unit in model.plan.units if _is_codes(unit)}
    for layer in model.plan.layers:
        unit = by_name.get(layer.name)
        if unit is None or layer.weight is None:
            records.append(layer.model_copy(update={"weight": None, "activation": None}))
            continue
        if model.packed:
            records.append(layer.model_copy(update={"activation": None}))
            continue
        per = "per-tensor" if _has_one(unit) else "per-channel"
        stored = layer.weight.model_copy(update={"granularity": per})
        records.append(layer.model_copy(update={"weight": stored, "activation": inputs}))
    return records


_OTHERWISE = "export with --format modelopt-checkpoint, or --target vllm"


def check_attention(model: LanguageModel) -> None:
    """Check that every layer attends to the whole text, as the graph has one mask for all layers.

    Raises:
        ConfigurationError: some layers do not, for instance because of sliding windows.
    """
    if seen := _partial_attention(model.root):
        raise ConfigurationError(f"{model.root} cannot be exported as a graph", why=seen, fix=_OTHERWISE)


def _partial_attention(root: Path) -> str:
    """A description of the attention layers that are not full attention; empty if there are none."""
    config = load_config(root)
    kinds = set(getattr(config, "layer_types", None) or [])
    window = getattr(config, "sliding_window", None)
    if kinds - {"full_attention"} or (window is not None and not kinds):
        return f"not every layer has full attention ({', '.join(sorted(kinds)) or f'window {window}'})"
    return ""
