"""The settings of ONNX Runtime's sessions: which of them a processor needs, and that the others change nothing."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from quantized_families import quantized_family
from vit_families import family, random_pixels

from exporters.graph import runtime
from exporters.graph.formats import OnnxFormat
from exporters.graph.produce import quantize_graph
from exporters.graph.runtime import SESSION_ENTRIES, open_session, run, session_entries
from fp8pipe.core.machine import cpu_features

PRECISION = "session.x64quantprecision"


@pytest.mark.parametrize("features", [[], ["avx2"], ["avx2", "avx512f", "avx512_bf16"]])
def test_without_vnni_sums_are_kept_exact_by_the_precision_mode(features):
    assert session_entries(features) == SESSION_ENTRIES


@pytest.mark.parametrize("features", [["avx2", "avx_vnni"], ["avx2", "avx512f", "avx512_vnni"]])
def test_with_vnni_the_slower_mode_is_left_out_and_nothing_else(features):
    assert session_entries(features) == {name: SESSION_ENTRIES[name] for name in SESSION_ENTRIES if name != PRECISION}


def test_vnni_gives_the_same_bits_in_both_modes(monkeypatch):
    """Inputs three times too large and 8-bit weights: sums that saturate where processors add pairs in 16 bits."""
    if session_entries() == SESSION_ENTRIES:
        pytest.skip(f"needs a processor with VNNI; this one has {', '.join(cpu_features())}")
    quantized = quantized_family("timm-vit", bits=8)
    pixels = {"pixels": (3 * random_pixels(family("timm-vit"), 4)).numpy()}
    graph = ir.to_proto(quantize_graph(quantized, OnnxFormat.QDQ, "test").model).SerializeToString()
    fast = run(open_session(graph), pixels)["logits"]
    monkeypatch.setattr(runtime, "session_entries", lambda: SESSION_ENTRIES)
    assert np.array_equal(fast, run(open_session(graph), pixels)["logits"])
