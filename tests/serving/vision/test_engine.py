"""Batch sizes that change bits are found when the server starts, and used only when that was asked for."""

from __future__ import annotations

import numpy as np
import pytest

from serving.http.config import ServeConfig
from serving.vision.engine import _chosen, open_engine
from serving.vision.model import read_model


@pytest.fixture(scope="module")
def model(export):
    return read_model(export)


def _sums(pixels):
    """One output a row; batches of more than two are a rounding away."""
    sums = pixels.reshape(len(pixels), -1).sum(axis=1, keepdims=True)
    return np.nextafter(sums, np.inf, dtype=np.float32) if len(pixels) > 2 else sums


def test_sizes_that_change_bits_are_not_used(model, caplog):
    engine = _chosen({1: _sums}, model, ServeConfig(max_batch=4), "test", (1, 2, 4))
    assert engine.sizes == (1, 2)
    assert [measured.exact for measured in engine.measured] == [True, True, False]
    assert "differ in bits" in caplog.text
    all_of_them = _chosen({1: _sums}, model, ServeConfig(max_batch=4, inexact_batches=True), "test", (1, 2, 4))
    assert all_of_them.sizes == (1, 2, 4)


def test_a_real_export_keeps_its_bits_at_every_size(model):
    engine = open_engine(model, ServeConfig(max_batch=8, threads=1))
    assert engine.sizes == (1, 2, 4, 8)
    assert (engine.threads, engine.width) == (1, 5)
