"""Opens the checkpoint of a base model, in floating point, FP8, NVFP4 or MXFP4, as floating-point tensors.

A checkpoint without quantization is used unchanged. In one in FP8 or NVFP4, or gpt-oss in MXFP4, each weight is
dequantized only when it is read, so that no second copy of the model is kept in memory or on disk. The configuration is
returned without its quantization block, and the original format of the weights is recorded for the manifest.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from fp8pipe.artifact.stored_format import StoredFormat
from fp8pipe.core.errors import ConfigurationError
from fp8pipe.models.checkpoint.blame import unusable
from fp8pipe.models.checkpoint.quantized.entries import Plain, dequantized, refuse_codes
from fp8pipe.models.checkpoint.quantized.mxfp4 import dequantized_stacks
from fp8pipe.models.checkpoint.quantized.nvfp4 import dequantized_nvfp4
from fp8pipe.models.checkpoint.quantized.scheme import (
    QUANT_FILE,
    Scheme,
    read_scheme,
    refusal,
    without_quantization,
)
from fp8pipe.models.checkpoint.sidecars import BASE_MODEL_FILES, copy_sidecars, read_config
from fp8pipe.models.checkpoint.stacks import join_entries, split_stacks, stack_name
from fp8pipe.models.checkpoint.tensors import PLAIN_FLOATS, TensorEntry, weight_entries

__all__ = ["BaseCheckpoint", "base_entries", "copy_base_files", "read_base"]

_SPELLINGS: Final = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
# Model types that store linear weights as (in, out); for these, no format defines to which axis the scales belong.
_TRANSPOSED: Final = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})


@dataclass(frozen=True, slots=True)
class BaseCheckpoint:
    """A base model's weights and configuration.

    Attributes:
        config: contents of config.json, without a quantization block.
        entries: tensors by name; reading one gives floating-point values. Stacked experts one by one (`split_stacks`).
        stored: the low-precision format of the stored weights; None if they are stored in floating point.
        runtime: names of stored tensors that quantize activations or the key/value cache; they are not in `entries`.
    """

    config: dict[str, Any]
    entries: dict[str, TensorEntry]
    stored: StoredFormat | None = None
    runtime: tuple[str, ...] = ()

    def warnings(self) -> list[str]:
        """Warnings for the manifest about a base model in low precision; empty for one in floating point."""
        if self.stored is None:
            return []
        said = [f"the base model was already quantized, as {self.stored}; the precision lost then is not recovered"]
        if self.runtime:
            said.append(
                f"{len(self.runtime)} tensor(s) of the base for activations or the key/value cache were left out; "
                f"the first: {self.runtime[0]}"
            )
        return said

    def state(self) -> dict[str, Any]:
        """A state dict for transformers by tensor name, whose values are read from the file only when indexed."""
        return {name: _Unread(entry) for name, entry in join_entries(self.entries).items()}


@dataclass(frozen=True, slots=True)
class _Unread:
    """A tensor that is read from the file when it is indexed, like the result of safetensors' `get_slice`."""

    entry: TensorEntry

    def __getitem__(self, index: Any) -> Tensor:
        return self.entry.read()[index]


def read_base(root: Path) -> BaseCheckpoint:
    """Open the checkpoint of a base model; reads config.json and the headers of the weight files, but no weights.

    Raises:
        ConfigurationError: it is quantized in a format that cannot be decoded, and the message names the format; or it
            stores experts one by one in a family that stores them stacked.
        BadArtifactError, ConfigurationError: a file is missing or damaged; see `unusable`.
    """
    config = read_config(root / "config.json")
    if not isinstance(config.get("model_type", ""), str):
        why = f"model_type is {config['model_type']!r}, not text"
        raise unusable(root, f"{root / 'config.json'} names no architecture", why=why, fix="fetch the model again")
    scheme, entries = read_scheme(root), weight_entries(root)
    _refuse_single_experts(root, config, entries)
    if scheme is None:
        refuse_codes(root, entries)
        return BaseCheckpoint(config, split_stacks(config.get("model_type"), entries))
    _refuse_transposed(root, config, scheme)
    dtype = _dtype(config, entries)
    plain = _plain(root, entries, scheme, dtype)
    counts = Counter(plain.granularities.values())
    stored = StoredFormat(
        method=scheme.method, granularity=sorted(counts), block=scheme.block if counts["per-block"] else None,
        codes=scheme.codes, weights=counts.total(), dtype=dtype,
    )  # fmt: skip
    single = split_stacks(config.get("model_type"), plain.entries)
    return BaseCheckpoint(without_quantization(config), single, stored, plain.runtime)


def _plain(root: Path, entries: dict[str, TensorEntry], scheme: Scheme, dtype: str) -> Plain:
    if scheme.method == "mxfp4":
        return dequantized_stacks(root, entries, dtype)
    read = dequantized_nvfp4 if scheme.codes == "e2m1" else dequantized
    return read(root, entries, scheme, dtype)


def base_entries(root: Path) -> dict[str, TensorEntry]:
    """The tensors of a base model by name, see `BaseCheckpoint.entries`; raises like `read_base`."""
    return read_base(root).entries


def copy_base_files(root: Path, target: Path) -> None:
    """Copy the files beside a base model's weights to `target`, without the description of a quantized format.

    For a quantized base model, hf_quant_config.json is left out, and config.json loses its quantization block.
    """
    copy_sidecars(root, target, BASE_MODEL_FILES)
    base = read_base(root)
    if base.stored is not None:
        (target / QUANT_FILE).unlink(missing_ok=True)
        text = json.dumps(base.config, indent=2, ensure_ascii=False) + "\n"
        (target / "config.json").write_text(text, encoding="utf-8")


def _dtype(config: dict[str, Any], entries: dict[str, TensorEntry]) -> str:
    """The model's dtype in safetensors' spelling: the one in config.json, or the most frequent one of its matrices."""
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        if (said := str(part.get("dtype") or part.get("torch_dtype")).removeprefix("torch.")) in _SPELLINGS:
            return _SPELLINGS[said]
    floats = Counter(e.dtype for e in entries.values() if e.dtype in PLAIN_FLOATS and not e.name.endswith("_scale_inv")
                     and not e.name.endswith("_scale") and len(e.shape) > 1)  # fmt: skip
    return floats.most_common(1)[0][0] if floats else "BF16"


def _refuse_single_experts(root: Path, config: dict[str, Any], entries: dict[str, TensorEntry]) -> None:
    """Refuse what transformers would load without a word, with random experts in place of those it does not find."""
    kind = config.get("model_type")
    single = next((name for name in entries if stack_name(kind, name) is not None), None)
    if single is not None:
        raise ConfigurationError(
            f"the experts of the model in {root} are stored one by one, as vLLM reads them: it cannot be a base",
            why=f"it holds {single}, and transformers loads {stack_name(kind, single)}",
            fix="start from the model that it was made from",
        )


def _refuse_transposed(root: Path, config: dict[str, Any], scheme: Scheme) -> None:
    kind = config.get("model_type")
    if kind in _TRANSPOSED and scheme.granularities != {"per-tensor"}:
        how = " and ".join(sorted(scheme.granularities))
        raise refusal(
            root, f"a {kind} stores its linears as (in, out); which axis their scales ({how}) belong to is not stated"
        )
