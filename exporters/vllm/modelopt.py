"""The quantization settings of a checkpoint in ModelOpt's layout, in the two files where readers look for them.

TensorRT-LLM reads `hf_quant_config.json`, and vLLM `quantization_config` in config.json, with the same content under
other names. ModelOpt's names for NVFP4 are `NVFP4`, with inputs in four bits, too, and `W4A16_NVFP4`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from fp8pipe.models.checkpoint.quantized.scheme import QUANT_FILE
from fp8pipe.numerics.kinds import NVFP4_BLOCK

__all__ = ["CACHE_SCHEME", "QUANT_FILE", "nvfp4_settings", "quant_file", "settings_block"]

CACHE_SCHEME: Final = {"dynamic": False, "num_bits": 8, "type": "float"}
_PRODUCER: Final = {"name": "fp8pipe"}


def quant_file(
    algorithm: str, excluded: Sequence[str], kv_cache: str | None, *,
    group_size: int | None = None, producer: Mapping[str, str] = _PRODUCER,
) -> dict[str, Any]:  # fmt: skip
    """`hf_quant_config.json`, with exactly the keys that ModelOpt documents.

    Args:
        algorithm: ModelOpt's name for the format.
        excluded: full names of linear layers that are not quantized.
        kv_cache: format of the key/value cache; None for the compute dtype.
        group_size: number of neighbouring inputs that share a scale; None for other scales.
        producer: the program that wrote the checkpoint.
    """
    stored = None if kv_cache is None else kv_cache.upper()
    said: dict[str, Any] = {"quant_algo": algorithm, "kv_cache_quant_algo": stored}
    said |= {} if group_size is None else {"group_size": group_size}
    return {"producer": dict(producer), "quantization": said | {"exclude_modules": list(excluded)}}


def settings_block(stated: Mapping[str, Any], group: Mapping[str, Any] | None) -> dict[str, Any]:
    """`quantization_config` of config.json.

    Args:
        stated: the contents of `hf_quant_config.json`.
        group: formats of `weights` and `input_activations` of the quantized layers; None if ModelOpt states none.
    """
    said = stated["quantization"]
    block: dict[str, Any] = {} if group is None else {"config_groups": {"group_0": {**group, "targets": ["Linear"]}}}
    block |= {"ignore": list(said["exclude_modules"]), "quant_algo": said["quant_algo"]}
    if said["kv_cache_quant_algo"] is not None:
        block["kv_cache_scheme"] = dict(CACHE_SCHEME)
    return {**block, "producer": dict(stated["producer"]), "quant_method": "modelopt"}


def nvfp4_settings(
    ignore: Sequence[str], kv_cache: str | None, *, inputs: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """`hf_quant_config.json` and `quantization_config` of weights in NVFP4.

    The producer's version is left out, so that every later version of fp8pipe can verify the files.

    Args:
        ignore: full names of linear layers that are not quantized.
        kv_cache: format of the key/value cache; None for the compute dtype.
        inputs: whether inputs are quantized to NVFP4, too.
    """
    algorithm = "NVFP4" if inputs else "W4A16_NVFP4"
    stated = quant_file(algorithm, ignore, kv_cache, group_size=NVFP4_BLOCK)
    form = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": NVFP4_BLOCK}
    group = {**({"input_activations": dict(form)} if inputs else {}), "weights": dict(form)}
    return stated, settings_block(stated, group)
