"""Says why a directory has no weights that can be read, for downloads, training, exports and inspection alike.

The three usual cases need three different remedies: pickled weights have to be converted, the index of numbered files
was not downloaded, or nothing was.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from fp8pipe.core.errors import BadArtifactError, ConfigurationError
from fp8pipe.models.checkpoint.blame import unusable

__all__ = ["pickled_weights", "weightless"]

_PICKLED: Final = ("*.bin", "*.pt", "*.pth")


def pickled_weights(root: Path) -> list[str]:
    """Names of the files in a directory that may contain pickled weights, sorted."""
    return sorted(file.name for form in _PICKLED for file in root.glob(form))


def weightless(root: Path, expected: tuple[str, str]) -> BadArtifactError | ConfigurationError:
    """Create the error for a directory without readable weights; the caller raises it.

    Args:
        root: the model's directory.
        expected: names of the single weight file and of the index of several, neither of which is there.
    """
    what, single = f"{root} holds no weights", sorted(file.name for file in root.glob("*.safetensors"))
    if single:
        return unusable(
            root,
            what,
            why=f"neither {expected[0]} nor {expected[1]} is there; {len(single)} other .safetensors file(s) are, the "
            f"first: {single[0]}, and only an index says which of them belong to the model",
            fix=f"fetch {expected[1]}, too, or save the model again (save_pretrained writes both)",
        )
    what = f"{root} holds no safetensors weights"
    if not (pickled := pickled_weights(root)):
        return unusable(root, what, why="no *.safetensors file is there", fix="check that the download is complete")
    target = f"{root.absolute()}-safetensors"
    classes = "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T"
    saved = "; ".join(f"{kind}.from_pretrained({str(root)!r}{more}).save_pretrained({target!r})"
                      for kind, more in (("M", ", dtype='auto'"), ("T", "")))  # fmt: skip
    return unusable(
        root,
        what,
        why=f"only pickled weights are there, which can run code and are not loaded: {len(pickled)} file(s), the "
        f"first: {pickled[0]}",
        fix=f'if you trust them, convert them once: python -c "{classes}; {saved}", and give {target}',
    )
