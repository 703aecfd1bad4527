"""Reads the quantization format that a checkpoint declares in config.json or hf_quant_config.json.

No weights are read. Formats that cannot be decoded exactly are rejected with an error that names them: number formats
other than E4M3, NVFP4 and gpt-oss's MXFP4, weights that were rotated or pruned before quantization, and asymmetric
quantization.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from fp8pipe.core.errors import ConfigurationError
from fp8pipe.models.checkpoint.sidecars import read_config
from fp8pipe.numerics.kinds import NVFP4_BLOCK

__all__ = ["QUANT_FILE", "Scheme", "read_scheme", "refusal", "without_quantization"]

QUANT_FILE: Final = "hf_quant_config.json"  # written by ModelOpt
_KEYS: Final = ("quantization_config", "compression_config")  # the second is an early name used by compressed-tensors
_READ: Final = (
    "FP8 and NVFP4 of compressed-tensors and ModelOpt, fp8 (per tensor, or blocks with weight_scale_inv), and "
    "gpt-oss's mxfp4"
)
_BLOCK: Final = (128, 128)  # block size of ModelOpt's FP8_PB_WO, which its files do not state

Granularity = Literal["per-tensor", "per-channel", "per-block"]
_STRATEGIES: Final[Mapping[str, Granularity]] = {
    "tensor": "per-tensor", "channel": "per-channel", "block": "per-block"
}  # fmt: skip
_ALGORITHMS: Final[Mapping[str, Granularity]] = {
    "FP8": "per-tensor", "FP8_PER_CHANNEL_PER_TOKEN": "per-channel", "FP8_PB_WO": "per-block", "NVFP4": "per-block",
    "W4A16_NVFP4": "per-block",
}  # fmt: skip
_NVFP4: Final = "nvfp4-pack-quantized"
_DENSE: Final = (None, "", "dense")


@dataclass(frozen=True, slots=True)
class Scheme:
    """A declared quantization format.

    Attributes:
        method: value of `quant_method` in config.json.
        granularities: granularities of the scales that the checkpoint may contain.
        block: (rows, columns) of a block; None if no weight is quantized in blocks.
        codes: the grid of the codes.
    """

    method: Literal["compressed-tensors", "fp8", "modelopt", "mxfp4"]
    granularities: frozenset[Granularity]
    block: tuple[int, int] | None = None
    codes: Literal["e4m3", "e2m1"] = "e4m3"

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Suffixes to append to a weight's name for the name of its scale; the first one that exists is used."""
        return ("_scale_inv", "_scale") if self.method == "fp8" else ("_scale",)


def refusal(root: Path, why: str) -> ConfigurationError:
    """The error for a quantized base model that cannot be read, because of `why`; the caller raises it."""
    return ConfigurationError(
        f"the model in {root} is quantized already, and cannot be a base model as it is",
        why=why,
        fix=f"start from the original bf16, fp16 or fp32 checkpoint; quantized ones may be {_READ}",
    )


def read_scheme(root: Path) -> Scheme | None:
    """The format that a checkpoint declares; None if it declares none.

    Raises:
        ConfigurationError: a base model in this format is not supported; the message names what was found.
        BadArtifactError, ConfigurationError: a file cannot be read; see `unusable`.
    """
    config = read_config(root / "config.json")
    blocks = [part[key] for part in (config, *_nested(config)) for key in _KEYS if part.get(key)]
    if any(block != blocks[0] for block in blocks):
        raise refusal(root, f"config.json declares {len(blocks)} formats that differ")
    algorithm = _algorithm(read_config(root / QUANT_FILE)) if (root / QUANT_FILE).is_file() else None
    if not blocks:
        return None if algorithm is None else _modelopt(root, algorithm)
    block = blocks[0]
    if not isinstance(block, dict):
        raise refusal(root, f"the quantization_config in config.json is {block!r}, not an object")
    early = "quant_method" not in block and "config_groups" in block
    method = "compressed-tensors" if early else block.get("quant_method", "")
    if algorithm is not None and not (str(method) == "modelopt" and _algorithm(block) in (None, algorithm)):
        raise refusal(root, f"{QUANT_FILE} says ModelOpt's {algorithm}, and config.json {method} {_algorithm(block)}")
    if method == "compressed-tensors":
        return _compressed_tensors(root, block)
    if method == "fp8":
        return _fp8(root, block)
    if method == "modelopt":
        return _modelopt(root, _algorithm(block) or algorithm or "none")
    if method == "mxfp4" and config.get("model_type") == "gpt_oss":
        return Scheme("mxfp4", frozenset({"per-block"}), (1, 32), "e2m1")
    raise refusal(root, f"config.json has a quantization_config (method {method or 'unknown'})")


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the contents of config.json without quantization blocks, also without those of nested parts."""
    kept = {key: value for key, value in config.items() if key not in _KEYS}
    return {key: without_quantization(value) if isinstance(value, dict) and any(k in value for k in _KEYS) else value
            for key, value in kept.items()}  # fmt: skip


def _nested(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [value for key, value in config.items() if isinstance(value, dict) and key not in _KEYS]


def _algorithm(block: Mapping[str, Any]) -> str | None:
    # ModelOpt's `quant_algo` in upper case; None if it is not stated.
    inner = block.get("quantization")
    found = (inner if isinstance(inner, dict) else block).get("quant_algo")
    return None if found is None else str(found).upper()


def _modelopt(root: Path, algorithm: str) -> Scheme:
    if algorithm not in _ALGORITHMS:
        raise refusal(root, f"ModelOpt's quant_algo is {algorithm}; {', '.join(_ALGORITHMS)} can be read")
    granularity = _ALGORITHMS[algorithm]
    if algorithm in ("NVFP4", "W4A16_NVFP4"):  # with inputs in NVFP4, too, or without
        return Scheme("modelopt", frozenset({granularity}), (1, NVFP4_BLOCK), "e2m1")
    return Scheme("modelopt", frozenset({granularity}), _BLOCK if granularity == "per-block" else None)


def _fp8(root: Path, block: Mapping[str, Any]) -> Scheme:
    if (grid := str(block.get("fmt", "e4m3")).removeprefix("float8_")) not in ("e4m3", "e4m3fn"):
        raise refusal(root, f"its codes are {grid}, not e4m3 (quant_method fp8)")
    size = block.get("weight_block_size")
    if size is None:
        return Scheme("fp8", frozenset({"per-tensor"}))
    return Scheme("fp8", frozenset({"per-block"}), _sides(root, size, "weight_block_size"))


def _compressed_tensors(root: Path, block: Mapping[str, Any]) -> Scheme:
    if (form := block.get("format")) not in ("float-quantized", "naive-quantized", _NVFP4):
        read = f"float-quantized, naive-quantized and {_NVFP4}"
        raise refusal(root, f"compressed-tensors in the format {form}; {read} can be read")
    if (status := block.get("quantization_status", "compressed")) != "compressed":
        raise refusal(root, f"compressed-tensors whose quantization_status is {status}, not compressed")
    if block.get("transform_config"):
        raise refusal(root, "compressed-tensors with a transform_config: its weights are rotated, its inputs must be")
    sparsity = block.get("sparsity_config")
    if isinstance(sparsity, dict) and sparsity.get("format") not in _DENSE:
        raise refusal(root, f"compressed-tensors with sparse weights ({sparsity.get('format')})")
    groups = block.get("config_groups")
    if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
        raise refusal(root, "compressed-tensors whose config_groups are not spelt out")
    schemes = [(name, group["weights"]) for name, group in groups.items() if group.get("weights")]
    if odd := [f"weights of {name} are {weights!r}" for name, weights in schemes if not isinstance(weights, dict)]:
        raise refusal(root, f"compressed-tensors whose {odd[0]}, not an object")
    if form == _NVFP4:
        return _nvfp4(root, schemes)
    found: set[Granularity] = set()
    sizes: set[tuple[int, int]] = set()
    for name, weights in schemes:
        kind = (weights.get("type"), weights.get("num_bits"), weights.get("symmetric", True))
        strategy = str(weights.get("strategy"))
        if kind != ("float", 8, True) or strategy not in _STRATEGIES:
            said = f"{kind[1]}-bit {kind[0]}, {'' if kind[2] else 'not '}symmetric, {strategy}"
            raise refusal(
                root, f"{name} of compressed-tensors is {said}; only 8-bit float per tensor, channel or block is read"
            )
        found.add(_STRATEGIES[strategy])
        if strategy == "block":
            sizes.add(_sides(root, weights.get("block_structure"), f"block_structure of {name}"))
    if not found or len(sizes) > 1:
        raise refusal(root, f"compressed-tensors with {len(found)} weight formats and {len(sizes)} block sizes")
    return Scheme("compressed-tensors", frozenset(found), next(iter(sizes), None))


def _nvfp4(root: Path, schemes: Sequence[tuple[str, Mapping[str, Any]]]) -> Scheme:
    """NVFP4 of compressed-tensors, given the names and weights of its groups."""
    if not schemes:
        raise refusal(root, f"compressed-tensors in the format {_NVFP4} with no weight format")
    wanted = {"type": "float", "num_bits": 4, "strategy": "tensor_group", "group_size": NVFP4_BLOCK}
    for name, weights in schemes:
        if wrong := [f"{key} {weights.get(key)}" for key, value in wanted.items() if weights.get(key) != value]:
            raise refusal(root, f"{name} of compressed-tensors in the format {_NVFP4} has {', '.join(wrong)}")
    return Scheme("compressed-tensors", frozenset({"per-block"}), (1, NVFP4_BLOCK), "e2m1")


def _sides(root: Path, size: Any, where: str) -> tuple[int, int]:
    sides = size if isinstance(size, list | tuple) else ()
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise refusal(root, f"{where} is {size!r}, not a pair of positive numbers")
    return int(sides[0]), int(sides[1])
