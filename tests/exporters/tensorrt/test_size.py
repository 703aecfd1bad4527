"""What engines weigh: text and weights told apart, and dequantized weights noticed in a real engine."""

from __future__ import annotations

import lzma

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from exporters.graph.produce import float_model
from exporters.graph.trace import stored_bytes, trace_float
from exporters.tensorrt.builder import build_rtx
from exporters.tensorrt.engines import ALLOWANCE_BYTES, LIMIT, EngineSize, measure_engine, size_gate
from exporters.tensorrt.graph import typed_graph
from exporters.tensorrt.half import halve
from exporters.tensorrt.recipe import pack_engine, unpack_engine
from exporters.tensorrt.target import TrtFormat
from fp8pipe.core.config import build_config
from fp8pipe.core.errors import BadArtifactError
from fp8pipe.models.vision.quantized import load_quantized
from pipeline.vit.config import QuantizeVitConfig
from pipeline.vit.stage import quantize_vit


def test_long_runs_of_text_are_counted_apart(tmp_path):
    rng = np.random.default_rng(0)
    weights = rng.integers(0, 256, 50_000, dtype=np.uint8).tobytes()
    text = b"__global__ void kernel() {}\n" * 100  # 2,800 bytes
    (tmp_path / "x.engine").write_bytes(weights + b"\0" + text + b"\0" + b"short text" + b"\0" + weights)
    size = measure_engine(tmp_path / "x.engine", 80_000)
    assert size.text_bytes == len(text)
    assert size.engine_bytes == 2 * len(weights) + len(text) + 13
    assert size.weights_over_ideal == (size.engine_bytes - len(text)) / 80_000


def test_block_scales_are_no_text(tmp_path):
    """E4M3 scales from 1/8 to 16, as NVFP4 weights have, are printable bytes, each and all."""
    scales = np.random.default_rng(0).uniform(0.125, 16, 30_000).astype(ml_dtypes.float8_e4m3fn).tobytes()
    assert all(0x20 <= byte <= 0x7E for byte in scales)
    (tmp_path / "x.engine").write_bytes(scales)
    assert measure_engine(tmp_path / "x.engine", 30_000).text_bytes == 0


def test_int4_codes_count_half_a_byte():
    codes = ir.tensor(np.zeros((64, 33), ml_dtypes.int4), name="codes")
    scale = ir.tensor(np.zeros((2, 33), np.float16), name="scale")
    values = [ir.Value(name=t.name, const_value=t) for t in (codes, scale)]
    model = ir.Model(ir.Graph([], [], nodes=[], initializers=values, opset_imports={"": 21}), ir_version=10)
    assert stored_bytes(model) == 64 * 33 // 2 + 2 * 33 * 2


def test_the_gate_is_a_figure_where_it_is_not_required():
    ideal = 10_000_000
    limit = int(LIMIT * ideal) + ALLOWANCE_BYTES
    for extra, passes in ((0, True), (1, False)):
        size = EngineSize(engine_bytes=limit + 5_000 + extra, text_bytes=5_000, ideal_bytes=ideal)
        assert size_gate(size, "8.9", required=True).passed is passes
        assert size_gate(size, "8.9", required=False).passed
        assert size_gate(size, "8.9", required=True).value == (limit + extra) / 1e6


def test_dequantized_weights_are_noticed_in_a_real_engine(tmp_path):
    """The digits model in INT8 holds its codes; the same model in FP16, as a builder might keep it, has them twice."""
    pytest.importorskip("tensorrt_rtx")
    config = {"model": "sample:vit-digits", "bits": "w8a8", "calibration": "gaussian", "images": 4}
    quantize_vit(build_config(QuantizeVitConfig, config | {"distill": {"steps": 0}}), tmp_path / "model")
    quantized = load_quantized(tmp_path / "model")
    typed = typed_graph(quantized, TrtFormat.INT8, "digits").model
    traced = trace_float(float_model(quantized), quantized.structure).model
    gates = []
    for name, model in (("int8", typed), ("fp16", traced)):
        halve(model)
        ir.save(model, tmp_path / f"{name}.onnx")
        profiles = {"pixels": tuple((count, 3, 24, 24) for count in (1, 2, 4))}
        build_rtx(tmp_path / f"{name}.onnx", tmp_path / name, ["8.9"], profiles)
        gates.append(size_gate(measure_engine(tmp_path / name, stored_bytes(typed)), "8.9", required=True))
    assert gates[0].passed
    assert not gates[1].passed
    assert gates[1].value > 1.7 * gates[0].value


def test_packed_engines_come_back_whole(tmp_path):
    engine = tmp_path / "x.engine"
    content = np.random.default_rng(1).integers(0, 256, 3_000_000, dtype=np.uint8).tobytes() + b"text " * 400_000
    engine.write_bytes(content)
    packed = pack_engine(engine)
    assert packed.name == "x.engine.xz"
    assert not engine.exists()
    assert packed.stat().st_size < 3_010_000
    assert lzma.decompress(packed.read_bytes()) == content  # what `xz -d` reads
    unpack_engine(packed, engine)
    assert engine.read_bytes() == content
    packed.write_bytes(packed.read_bytes()[:-1000])
    with pytest.raises(BadArtifactError, match="damaged"):
        unpack_engine(packed, engine)


def test_a_file_that_unpacks_without_end_is_refused(tmp_path):
    """A thousand times its size: no engine is so compressible."""
    packed = tmp_path / "zeros.engine.xz"
    packed.write_bytes(lzma.compress(bytes(64 << 20), preset=9))
    with pytest.raises(BadArtifactError, match="is damaged") as caught:
        unpack_engine(packed, tmp_path / "zeros.engine")
    assert "unpacks to more than" in caught.value.why
