"""Stored weights that vLLM divides into parts: Q, K and V of one tensor, or gate and up.

With a scale per block, each part must consist of whole blocks. vLLM itself refuses other sizes only when it loads the
checkpoint; and where it rearranges the rows head by head, it would move the scales of blocks that two heads share.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from fp8pipe.models.language.structure import ModelStructure

__all__ = ["part_rows"]

_IN_ORDER: Final = frozenset({"qkv_proj", "Wqkv"})  # all of Q, then K, then V: Phi-3, DBRX
_BY_HEAD: Final = "query_key_value"  # Q, K and V of each head, or group of heads
_REARRANGED: Final = frozenset({"bloom", "falcon"})  # vLLM runs other such models by transformers' code, undivided
_PAIR: Final = "gate_up_proj"
_HEADS: Final = ("num_attention_heads", "n_head")  # in config.json


def part_rows(module: str, structure: ModelStructure, config: Mapping[str, Any]) -> dict[str, int] | None:
    """Rows of each part of a linear layer's stored weight, by name; empty if vLLM takes the weight as it is.

    None if vLLM divides it, and the sizes of the parts cannot be told from the model's layers.

    Args:
        module: name of the layer in the transformers model.
        structure: of that model.
        config: its config.json.
    """
    parent, _, leaf = module.rpartition(".")
    rows = structure.shape(module)[0]
    if leaf == _PAIR:
        return {"gate": rows // 2, "up": rows - rows // 2}
    by_head = leaf == _BY_HEAD and structure.model_type in _REARRANGED
    if leaf not in _IN_ORDER and not by_head:
        return {}
    # The only other linear layer of an attention with such a weight reads what Q attends to, so it is as wide as Q.
    others = [name for name in structure.projections if name.rpartition(".")[0] == parent and name != module]
    if len(others) != 1:
        return None
    query = structure.shape(others[0])[1]
    heads = next((config[name] for name in _HEADS if name in config), None)
    if by_head:
        return None if heads is None else {"each head": query // heads}
    return {"q": query, "k": (rows - query) // 2, "v": (rows - query) // 2}
