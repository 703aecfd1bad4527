"""How much each patch is attended: by the class token where there is one, by the patches themselves otherwise.

Terms that treat patches unequally (masks, priors) and the pruning of tokens all ask this one question.
"""

from __future__ import annotations

from torch import Tensor

from fp8pipe.core.errors import ConfigurationError
from fp8pipe.models.vision.structure import AttentionSite, VitStructure


def asking(queries: Tensor, site: AttentionSite) -> Tensor:
    """The query that asks for the whole picture: the class token's, or the mean of all patches'.

    Args:
        queries: `(N, H, tokens, d)`; or maps `(N, H, tokens, keys)`, whose rows are queries too.
        site: tells whether there are prefix tokens; the first of them is taken for the class token.

    Returns:
        `(N, H, 1, d)`, of the same dtype.
    """
    return queries[:, :, :1] if site.prefix_tokens else queries.mean(2, keepdim=True)


def attended(probabilities: Tensor, site: AttentionSite) -> Tensor:
    """The share of each patch in what is attended among patches, `(N, H, patches)` fp32 with sums of 1.

    Args:
        probabilities: `(N, H, tokens, tokens)`.
        site: tells prefix tokens.
    """
    among = asking(probabilities, site)[:, :, 0, site.prefix_tokens :].float()
    return among / among.sum(-1, keepdim=True).clamp(min=1e-12)


def plain_sites(structure: VitStructure, wish: str) -> dict[str, AttentionSite]:
    """The attentions of a plain transformer by name, in their order: global, over all patches, equally many heads.

    Args:
        structure: of the model.
        wish: what needs them, for the message.

    Raises:
        ConfigurationError: there is none, or one has windows, merged patches, or other heads.
    """
    sites = [site for site in structure.attentions if not site.pools]
    area = structure.patch_grid[0] * structure.patch_grid[1]
    odd = [s for s in sites if s.windows > 1 or s.tokens - s.prefix_tokens != area or s.heads != sites[0].heads]
    if sites and not odd:
        return {site.name: site for site in sites}
    raise ConfigurationError(
        f"{wish} need a plain vision transformer",
        why=f"the attention {odd[0].name} has windows or merged patches" if odd else "the model has no attention",
        fix=f"leave {wish} off for this model",
    )
