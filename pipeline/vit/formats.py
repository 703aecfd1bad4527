"""Which grid every weight and every activation gets: the precision asked for, and the policy for both ends."""

from __future__ import annotations

from fp8pipe.models.vision.quantized import activation_sites
from fp8pipe.models.vision.structure import VitStructure
from fp8pipe.numerics.kinds import Kind, Precision
from fp8pipe.numerics.nvfp4 import BLOCK
from pipeline.vit.student import WeightFormat

_EDGE_BITS = 8
_FP8, _BLOCKS = WeightFormat(8, Kind.E4M3), WeightFormat(4, Kind.NVFP4)


def weight_formats(structure: VitStructure, precision: Precision, edges: str) -> dict[str, WeightFormat]:
    """The format of every linear.

    Args:
        structure: of the model.
        precision: what was asked for.
        edges: `8bit` keeps patch embedding and head at 8 bits, `same` gives them the precision of the rest. They
            are a hundredth of the weights, and errors there reach everything after or everything before. NVFP4
            leaves them in FP8, whatever is given: the pixels of a patch do not lie in blocks.
    """
    if precision.kind is Kind.NVFP4:
        blocks = _block_groups(structure)
        return {s.name: _BLOCKS if s.input_group in blocks else _FP8 for s in structure.linears}
    ends = _ends(structure) if edges == "8bit" else set()
    return {
        site.name: WeightFormat(_EDGE_BITS if site.name in ends else precision.weight_bits, precision.kind)
        for site in structure.linears
    }


def activation_bits(structure: VitStructure, precision: Precision, edges: str) -> dict[str, int]:
    """Bits of every activation site; the image that the patch embedding reads counts as one."""
    ends = {f"{name}.input" for name in _ends(structure)} if edges == "8bit" else set()
    return {site: _EDGE_BITS if site in ends else precision.activation_bits for site in activation_sites(structure)}


def activation_kinds(structure: VitStructure, precision: Precision) -> dict[str, Kind]:
    """The family of codes of every activation site.

    With NVFP4 these are inputs of linears; operands of attentions, for which no engine has NVFP4 kernels, are FP8.
    """
    if precision.kind is not Kind.NVFP4:
        return dict.fromkeys(activation_sites(structure), precision.kind)
    blocks = {f"{group}.input" for group in _block_groups(structure)}
    return {site: Kind.NVFP4 if site in blocks else Kind.E4M3 for site in activation_sites(structure)}


def _block_groups(structure: VitStructure) -> set[str]:
    """Groups of linears that can be NVFP4: inputs in whole blocks, and no end of the model among them."""
    ends = _ends(structure)
    groups = {site.input_group for site in structure.linears if site.shape[1] % BLOCK == 0}
    return groups - {site.input_group for site in structure.linears if site.name in ends or site.kind != "linear"}


def _ends(structure: VitStructure) -> set[str]:
    return {structure.patch_embed, *structure.heads}
