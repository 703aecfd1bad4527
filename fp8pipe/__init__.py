"""fp8pipe: low-bit models from training to the engine that serves them, verified bit for bit.

The Python interface offers the commands of the command line, with the same option models: `finetune`, `quantize_vit`,
`export`, `validate`, `serve` and `run`; `open_artifact`; and `fp8pipe.falqon` for training loops of your own. Importing
this package imports none of them; each is loaded on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fp8pipe.core.version import __version__

if TYPE_CHECKING:
    from fp8pipe.api import export, finetune, quantize_vit, run, serve, validate
    from fp8pipe.artifact import open_artifact

__all__ = ["__version__", "export", "finetune", "open_artifact", "quantize_vit", "run", "serve", "validate"]


def __getattr__(name: str) -> Any:
    if name == "falqon":
        import importlib

        return importlib.import_module("fp8pipe.falqon")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fp8pipe import api

    return getattr(api, name)
