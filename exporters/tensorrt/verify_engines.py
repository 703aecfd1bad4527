"""Engines beside a graph: each must be of that graph, and the two lists of them must agree."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from exporters.tensorrt.engines import LAYERS_FILE, MODEL_FILE
from exporters.verify.common import compare_json
from fp8pipe.artifact import Artifact, sha256_file
from fp8pipe.artifact.discrepancy import Catcher, Discrepancy

__all__ = ["check_engines"]


def check_engines(artifact: Artifact) -> Iterator[Discrepancy]:
    """Engines in the manifest, in `layers.json` and on the disk."""
    engines: dict[str, Any] = artifact.manifest.extra.get("engines") or {}
    listed = {entry.path for entry in artifact.manifest.files}
    graph = sha256_file(artifact.root / MODEL_FILE)
    for capability, entry in engines.items():
        if entry["engine"] not in listed:
            yield Discrepancy(Catcher.MANIFEST, entry["engine"], f"the engine for {capability} is not in the export")
        recipe = entry.get("recipe")
        if recipe is not None and recipe["graph_sha256"] != graph:
            why = f"it was built from graph {recipe['graph_sha256'][:12]}; {MODEL_FILE} is {graph[:12]}"
            yield Discrepancy(Catcher.MANIFEST, entry["engine"], why)
        if recipe is not None and recipe["capability"] != capability:
            yield Discrepancy(Catcher.MANIFEST, entry["engine"], f"listed for {capability}, built for "
                              f"{recipe['capability']}")  # fmt: skip
    for path in sorted(listed):
        if path.startswith("engines/") and path not in {entry["engine"] for entry in engines.values()}:
            yield Discrepancy(Catcher.MANIFEST, path, "the manifest names no recipe for this engine")
    if not engines:
        return
    written = json.loads((artifact.root / LAYERS_FILE).read_text(encoding="utf-8"))
    shown = {c: {k: written.get(c, {}).get(k) for k in entry} for c, entry in engines.items()}
    yield from compare_json(shown, engines, LAYERS_FILE)
    products = artifact.manifest.extra.get("products")
    for capability, entry in engines.items():
        if products and sum(entry["precisions"].values()) != len(products):
            why = f"{sum(entry['precisions'].values())} products; the graph has {len(products)}"
            yield Discrepancy(Catcher.MANIFEST, f"{LAYERS_FILE} for {capability}", why)
