"""The quantized vision transformer: saving it, loading it, and running it in fp32 with quantized values.

The model is rebuilt from its files alone, and computes the same function as the exported graph: the input of each
linear is quantized, and each attention uses quantized queries (after scaling by 1/sqrt(d)), keys, probabilities and
values. Matrix multiplications run in fp32 on dequantized values; sums of integer codes are exact up to fp32 rounding.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fp8pipe.artifact.manifest import Encoding, LayerRecord, ScaleRule
from fp8pipe.core.config import FrozenConfig
from fp8pipe.core.errors import BadArtifactError, class_and_one_line
from fp8pipe.models.vision.architecture import ARCHITECTURE_FILE, Architecture, build
from fp8pipe.models.vision.attention import explicit_attention, intercept_attention
from fp8pipe.models.vision.prepare import vision_outputs
from fp8pipe.models.vision.preprocessing import PREPROCESSING_FILE, Preprocessing, read_model_file, write_model_file
from fp8pipe.models.vision.sources import WEIGHTS_FILE, write_model_folder
from fp8pipe.models.vision.structure import LinearSite, VitStructure, read_structure
from fp8pipe.numerics.kinds import Kind, granularity
from fp8pipe.numerics.nvfp4 import BLOCK, BlockCodes, BlockQuantizer, BlockScales, pack_nibbles, unpack_nibbles
from fp8pipe.numerics.quantizers import ActivationQuantizer, WeightCodes

QUANTIZERS_FILE: Final = "quantizers.json"
QUANTIZED_FILES: Final = (ARCHITECTURE_FILE, PREPROCESSING_FILE, QUANTIZERS_FILE, WEIGHTS_FILE)  # of `save_quantized`
_SCALE, _TENSOR_SCALE = "_scale", "_tensor_scale"
_FORMATS: Final[dict[Kind, Literal["int", "e4m3", "nvfp4"]]] = {
    Kind.INT: "int", Kind.E4M3: "e4m3", Kind.NVFP4: "nvfp4",
}  # fmt: skip
T = TypeVar("T")
Codes = WeightCodes | BlockCodes
Quantizer = ActivationQuantizer | BlockQuantizer

Tap = Callable[[str, str, Tensor], None]


class QuantizedVit(nn.Module):
    """A prepared model with quantized weights and activations.

    A place where an activation can be quantized is called a site. Sites are named `GROUP.input` for the input of
    linears (`GROUP` is the first linear that reads the tensor) and `ATTENTION.q`, `.k`, `.probs`, `.v` for the operands
    of an attention's matrix multiplications. A site without a quantizer stays in floating point.

    Args:
        model: the prepared model, in eval mode and float32; it is copied.
        architecture: the model's architecture, stored with it.
        preprocessing: preprocessing of the images, stored with it.
        structure: the model's structure.
        weights: codes by name of the linear; linears without codes stay in floating point.
        activations: quantizers by name of the site.

    Raises:
        ValueError: a linear or site is not part of the structure.
    """

    def __init__(
        self,
        model: nn.Module,
        architecture: Architecture,
        preprocessing: Preprocessing,
        structure: VitStructure,
        weights: Mapping[str, Codes],
        activations: Mapping[str, Quantizer],
    ) -> None:
        super().__init__()
        self.model = copy.deepcopy(model)
        self.architecture, self.preprocessing, self.structure = architecture, preprocessing, structure
        self.weights, self.activations = dict(weights), dict(activations)
        unknown = (set(weights) - set(structure.linear_names)) | (set(activations) - set(activation_sites(structure)))
        if unknown:
            raise ValueError(f"the model has no {', '.join(sorted(unknown))}")
        self._tap: Tap | None = None
        for site in structure.linears:
            layer = self.model.get_submodule(site.name)
            if site.name in self.weights:
                layer.get_parameter("weight").data.copy_(self.weights[site.name].dequantize())
            layer.register_forward_pre_hook(partial(self._on_input, site))
            layer.register_forward_hook(partial(self._on_output, site))

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits (or pooled features) `(N, C)` of normalized pixels `(N, 3, H, W)`."""
        with self.attention():
            return vision_outputs(self.model, pixels)

    def attention(self) -> AbstractContextManager[None]:
        """A context in which `self.model` computes quantized attention, for callers that run only parts of it."""
        return intercept_attention(self.model, self.structure.attention_names, self._attend)

    def quantize(self, site: str, x: Tensor) -> Tensor:
        """`x` quantized and dequantized by the quantizer of `site`; unchanged if the site has none."""
        quantizer = self.activations.get(site)
        return x if quantizer is None else quantizer.fake(x)

    def taps(self, pixels: Tensor) -> dict[str, dict[str, Tensor]]:
        """Run the model, and collect the inputs and outputs of all linears and attentions, to compare with a runtime.

        Returns:
            Floating-point tensors by layer and by name. For a linear: `input` (before its quantizer) and `output`. For
            an attention: `q` (scaled), `k`, `probs_in`, `v` (all before their quantizers), `logits` (before the mask)
            and `output`.
        """
        found: dict[str, dict[str, Tensor]] = {}
        self.watch(pixels, lambda name, what, tensor: found.setdefault(name, {}).__setitem__(what, tensor.clone()))
        return found

    @torch.no_grad()
    def watch(self, pixels: Tensor, tap: Tap) -> None:
        """Like `taps`, but call `tap(layer, name, tensor)` in execution order instead of storing the tensors."""
        self._tap = tap
        try:
            self(pixels)
        finally:
            self._tap = None

    def _note(self, name: str, what: str, tensor: Tensor) -> Tensor:
        if self._tap is not None:
            self._tap(name, what, tensor)
        return tensor

    def _on_input(self, site: LinearSite, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = self._note(site.name, "input", args[0])
        return self.quantize(f"{site.input_group}.input", x), *args[1:]

    def _on_output(self, site: LinearSite, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        self._note(site.name, "output", output)

    def _attend(self, name: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        def quantized(what: str, x: Tensor, label: str | None = None) -> Tensor:
            return self.quantize(f"{name}.{what}", self._note(name, label or what, x))

        output = explicit_attention(
            quantized("q", q * scale if scale != 1.0 else q), quantized("k", k), quantized("v", v), mask, 1.0,
            on_logits=lambda logits: self._note(name, "logits", logits),
            on_probs=lambda probs: quantized("probs", probs, "probs_in"),
        )  # fmt: skip
        return self._note(name, "output", output)


def of_type(parts: Mapping[str, Any], kind: type[T]) -> dict[str, T]:
    """The entries of `parts` whose values are instances of `kind`."""
    return {name: part for name, part in parts.items() if isinstance(part, kind)}


def activation_sites(structure: VitStructure) -> tuple[str, ...]:
    """Names of all activation sites: inputs of linears (one for linears that share an input), then attentions."""
    inputs = dict.fromkeys(f"{site.input_group}.input" for site in structure.linears)
    products = [f"{site.name}.{what}" for site in structure.attentions for what in ("q", "k", "probs", "v")]
    return (*inputs, *products)


class _ActivationEntry(FrozenConfig):
    scale: float = Field(gt=0, description="value of one code step")
    low: int = Field(description="smallest code")
    high: int = Field(description="largest code")
    kind: Kind = Field(description="int or e4m3")


class _BlockEntry(FrozenConfig):
    tensor_scale: float = Field(gt=0, description="value = code * block_scale * tensor_scale; block scales are dynamic")


class _WeightEntry(FrozenConfig):
    bits: int = Field(ge=2, le=8, description="width of the codes")
    kind: Kind = Field(description="int, e4m3 or nvfp4")


class _Quantizers(FrozenConfig):
    """Contents of quantizers.json."""

    scale_direction: Literal["dequantized = code * scale"] = Field(
        default="dequantized = code * scale", description="the only direction that is read"
    )
    weights: dict[str, _WeightEntry] = Field(description="by linear; codes and scales are tensors")
    activations: dict[str, _ActivationEntry] = Field(description="by site")
    block_activations: dict[str, _BlockEntry] = Field(default_factory=dict, description="by site: NVFP4")


def save_quantized(folder: Path, quantized: QuantizedVit) -> None:
    """Write the model to a folder: architecture.json, preprocessing.json, quantizers.json and model.safetensors.

    In model.safetensors, a quantized weight is stored as codes under its own name, and its fp32 scales `(out,)` under
    that name plus `_scale`. NVFP4 codes are packed two per byte, the first in the low half (`(out, in / 2)` uint8);
    `_scale` then has one float8_e4m3fn number per block, `(out, in / 16)`, and `_tensor_scale` is one fp32 number.
    """
    entries = {
        site: _ActivationEntry(scale=q.scale, low=q.low, high=q.high, kind=q.kind)
        for site, q in of_type(quantized.activations, ActivationQuantizer).items()
    }
    dynamic = of_type(quantized.activations, BlockQuantizer)
    blocks = {site: _BlockEntry(tensor_scale=q.tensor_scale) for site, q in dynamic.items()}
    weights = {name: _WeightEntry(bits=w.bits, kind=w.kind) for name, w in quantized.weights.items()}
    described = _Quantizers(weights=weights, activations=entries, block_activations=blocks)
    tensors = dict(quantized.model.state_dict())
    for name, weight in quantized.weights.items():
        tensors |= {f"{name}.weight{suffix}": tensor for suffix, tensor in _stored(weight).items()}
    write_model_folder(folder, quantized.architecture, quantized.preprocessing, tensors)
    write_model_file(described, folder / QUANTIZERS_FILE)


def load_quantized(folder: Path) -> QuantizedVit:
    """Read a model written by `save_quantized`; its outputs are bitwise equal to those of the saved model.

    Raises:
        BadArtifactError: a file is missing, damaged, or inconsistent with the others.
    """
    architecture = read_model_file(Architecture, folder / ARCHITECTURE_FILE)
    preprocessing = read_model_file(Preprocessing, folder / PREPROCESSING_FILE)
    quantizers = read_model_file(_Quantizers, folder / QUANTIZERS_FILE)
    try:
        tensors = load_file(folder / WEIGHTS_FILE)
        weights = {name: _take_codes(name, entry, tensors) for name, entry in quantizers.weights.items()}
        model = build(architecture)
        model.load_state_dict(tensors, strict=True)
        activations: dict[str, Quantizer] = {
            site: ActivationQuantizer(e.scale, e.low, e.high, e.kind) for site, e in quantizers.activations.items()
        }
        activations |= {site: BlockQuantizer(e.tensor_scale) for site, e in quantizers.block_activations.items()}
        structure = read_structure(model, architecture.image_size)
        return QuantizedVit(model, architecture, preprocessing, structure, weights, activations)
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError, json.JSONDecodeError) as error:
        raise BadArtifactError(
            f"{folder} does not hold a quantized vision model",
            why=class_and_one_line(error, 600),
            fix="write the artifact again",
        ) from error


def _stored(weight: Codes) -> dict[str, Tensor]:
    """The tensors to store for a weight, by the suffix to its name."""
    if isinstance(weight, BlockCodes):
        tensor = torch.tensor(weight.scales.tensor)
        return {"": pack_nibbles(weight.codes), _SCALE: weight.scales.block, _TENSOR_SCALE: tensor}
    return {"": weight.codes, _SCALE: weight.scale}


def _take_codes(name: str, entry: _WeightEntry, tensors: dict[str, Tensor]) -> Codes:
    """Replace a weight's codes and scales in `tensors` by the dequantized weight, and return the codes and scales.

    Raises:
        KeyError: a tensor is missing.
        ValueError: the tensors do not fit the description `entry`.
    """
    codes, scale = tensors[f"{name}.weight"], tensors.pop(f"{name}.weight{_SCALE}")
    weight: Codes
    if entry.kind is Kind.NVFP4:
        weight = _block_codes(name, codes, scale, tensors.pop(f"{name}.weight{_TENSOR_SCALE}"))
    else:
        weight = WeightCodes(codes, scale, entry.bits)
        if weight.kind is not entry.kind or codes.dtype not in (torch.int8, torch.float8_e4m3fn):
            raise ValueError(f"{name}.weight holds {codes.dtype}, not {entry.kind} codes")
        if scale.shape != codes.shape[:1] or not bool((scale > 0).all()):
            raise ValueError(f"{name}.weight_scale must be one positive number per output channel")
    tensors[f"{name}.weight"] = weight.dequantize()
    return weight


def _block_codes(name: str, packed: Tensor, block: Tensor, tensor: Tensor) -> BlockCodes:
    if packed.dtype != torch.uint8 or packed.dim() != 2 or tensor.numel() != 1:
        raise ValueError(f"{name}.weight holds {packed.dtype} {tuple(packed.shape)}, not NVFP4 codes")
    codes = unpack_nibbles(packed)
    if block.shape != (codes.shape[0], codes.shape[1] // BLOCK):
        raise ValueError(f"{name}.weight_scale must be one E4M3 number per block of {BLOCK} inputs")
    return BlockCodes(codes, BlockScales(block, float(tensor)))


def layer_records(
    quantized: QuantizedVit,
    source: Sequence[LayerRecord] = (),
    rule: ScaleRule | None = None,
    *,
    activations: bool = True,
) -> list[LayerRecord]:
    """Create the manifest's records of all linear layers.

    Args:
        quantized: the model.
        source: records of the artifact that the model was read from, if any; the scale rules are copied from them.
        rule: the scale rule for layers that are not in `source`.
        activations: whether the records describe quantized inputs; False if inputs are not quantized.
    """
    known = {record.name: record for record in source}
    records = []
    for site in quantized.structure.linears:
        weight = quantized.weights.get(site.name)
        quantizer = quantized.activations.get(f"{site.input_group}.input") if activations else None
        before = known.get(site.name)
        said = (before.weight, before.activation) if before else (None, None)
        rules = [rule if encoding is None else encoding.scale_rule for encoding in said]
        codes = None if weight is None else _weight(weight, rules[0])
        inputs = activation_encoding(quantizer, rules[1])
        reason = "" if weight is not None else "no codes in the artifact"
        records.append(LayerRecord(name=site.name, shape=site.shape, reason=reason, weight=codes, activation=inputs))
    return records


def _weight(weight: Codes, rule: ScaleRule | None) -> Encoding:
    granular = granularity(weight.kind)
    return Encoding(format=_FORMATS[weight.kind], bits=weight.bits, granularity=granular, scale_rule=rule)


def activation_encoding(quantizer: Quantizer | None, rule: ScaleRule | None) -> Encoding | None:
    """The manifest's description of an activation quantizer; None if there is no quantizer.

    Args:
        quantizer: the quantizer.
        rule: how its scale was chosen.
    """
    if quantizer is None:
        return None
    if isinstance(quantizer, BlockQuantizer):  # block scales are computed at run time; only the tensor scale is stored
        return Encoding(format="nvfp4", bits=4, granularity="per-block", scale_rule=rule, dynamic=True)
    bits = 8 if quantizer.kind is Kind.E4M3 else (quantizer.levels - 1).bit_length()
    return Encoding(format=_FORMATS[quantizer.kind], bits=max(2, bits), granularity="per-tensor", scale_rule=rule)
