"""Which grid every weight and every activation gets: the precision asked for, and the policy for both ends."""

from __future__ import annotations

from fp8pipe.vision.quantized import activation_sites
from fp8pipe.vision.quantizers import Precision
from fp8pipe.vision.structure import VitStructure
from pipeline.vit.student import WeightFormat

_EDGE_BITS = 8


def weight_formats(structure: VitStructure, precision: Precision, edges: str) -> dict[str, WeightFormat]:
    """The format of every linear.

    Args:
        structure: of the model.
        precision: what was asked for.
        edges: `8bit` keeps patch embedding and head at 8 bits, `same` gives them the precision of the rest. They
            are a hundredth of the weights, and errors there reach everything after or everything before.
    """
    ends = _ends(structure) if edges == "8bit" else set()
    return {
        site.name: WeightFormat(_EDGE_BITS if site.name in ends else precision.weight_bits, precision.kind)
        for site in structure.linears
    }


def activation_bits(structure: VitStructure, precision: Precision, edges: str) -> dict[str, int]:
    """Bits of every activation site; the image that the patch embedding reads counts as one."""
    ends = {f"{name}.input" for name in _ends(structure)} if edges == "8bit" else set()
    return {site: _EDGE_BITS if site in ends else precision.activation_bits for site in activation_sites(structure)}


def _ends(structure: VitStructure) -> set[str]:
    return {structure.patch_embed, *structure.heads}
