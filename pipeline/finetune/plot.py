"""One picture of a run: loss, and what becomes of the update on its way into FP8."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def plot_run(history: list[dict[str, Any]], path: Path, title: str) -> None:
    """Draw training and held-out loss above, FP8 health below; PNG at `path`.

    Args:
        history: the run's metric lines.
        path: destination.
        title: what was trained.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    health = sorted({key for line in history for key in line if key.startswith(("flush_", "pending_"))})
    figure, axes = pyplot.subplots(2 if health else 1, 1, figsize=(8, 6 if health else 3.5), squeeze=False, sharex=True)
    top = axes[0][0]
    _curve(top, history, "loss", "training, answer tokens")
    _curve(top, history, "heldout_loss", "held out", marker="o")
    top.set_ylabel("loss (nats a token)")
    top.set_title(title)
    top.legend()
    if health:
        bottom = axes[1][0]
        for key in health:
            _curve(bottom, history, key, key.replace("_", " "))
        bottom.set_ylim(-0.05, 1.25)
        bottom.set_ylabel("share, ratio, cosine")
        bottom.legend()
    axes[-1][0].set_xlabel("optimizer step")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _curve(axis: Any, history: list[dict[str, Any]], key: str, label: str, marker: str = "") -> None:
    points = [(line["step"], line[key]) for line in history if key in line]
    if points:
        axis.plot(*zip(*points, strict=True), label=label, marker=marker)
