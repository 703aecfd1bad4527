"""Batch sizes that change bits are found when the server starts, and used only when that was asked for."""

from __future__ import annotations

import numpy as np
import pytest

from fp8pipe.core.errors import ConfigurationError
from serving.config import VisionConfig
from serving.vision.engine import Layout, Measured, _best, _chosen, _refuse_streams, open_engine, read_model


@pytest.fixture(scope="module")
def model(export):
    return read_model(export)


def _sums(pixels):
    """One output a row; batches of more than two are a rounding away."""
    sums = pixels.reshape(len(pixels), -1).sum(axis=1, keepdims=True)
    return np.nextafter(sums, np.inf, dtype=np.float32) if len(pixels) > 2 else sums


def test_sizes_that_change_bits_are_not_used(model, caplog):
    layouts = [Layout(1, 1, lambda: (_sums,))]
    engine = _chosen(layouts, model, VisionConfig(max_batch=4), "test", (1, 2, 4))
    assert engine.sizes == (1, 2)
    assert [measured.exact for measured in engine.measured] == [True, True, False]
    assert "not bit-identical" in caplog.text
    all_of_them = _chosen(layouts, model, VisionConfig(max_batch=4, inexact_batches=True), "test", (1, 2, 4))
    assert all_of_them.sizes == (1, 2, 4)


def test_more_at_once_must_gain_clearly():
    alone, four = Measured(2, 1, 1, 100.0, True), Measured(2, 1, 4, 104.0, True)
    streams = Measured(1, 2, 1, 104.0, True)
    assert _best([alone, four, streams], fixed=False) == alone
    better = Measured(1, 2, 1, 130.0, True)
    assert _best([alone, Measured(2, 1, 8, 134.0, True), better, Measured(1, 2, 2, 131.0, True)], fixed=False) == better
    assert _best([alone, four, better], fixed=True) == four


def test_streams_give_the_bits_of_one(model):
    config = VisionConfig(max_batch=2, threads=1, streams=3)
    engine = open_engine(model, config)
    assert (len(engine.runs), engine.measured[0].streams) == (3, 3)
    pixels = np.random.default_rng(1).standard_normal((2, *model.shape), dtype=np.float32)
    alone = open_engine(model, VisionConfig(max_batch=1, threads=1)).runs[0]
    for run in engine.runs:
        assert np.array_equal(run(pixels), np.concatenate([alone(pixels[:1]), alone(pixels[1:])]))


def test_cores_are_divided_among_the_streams(model, monkeypatch):
    monkeypatch.setattr("serving.vision.engine._cores", lambda: 4)
    shapes = {(m.threads, m.streams) for m in open_engine(model, VisionConfig(max_batch=1)).measured}
    assert shapes == {(4, 1), (3, 1), (2, 2), (1, 4)}
    fixed = open_engine(model, VisionConfig(max_batch=1, streams=2))
    assert (fixed.threads, len(fixed.runs)) == (2, 2)


def test_streams_are_refused_where_they_mean_nothing():
    with pytest.raises(ConfigurationError, match="--streams does not apply"):
        _refuse_streams(VisionConfig(streams=2))
    _refuse_streams(VisionConfig())


def test_a_real_export_keeps_its_bits_at_every_size(model):
    engine = open_engine(model, VisionConfig(max_batch=8, threads=1))
    assert engine.sizes == (1, 2, 4, 8)
    assert (engine.threads, engine.width) == (1, 5)
