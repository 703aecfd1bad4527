"""What a machine says about itself, read from a processor description of the right shape."""

import importlib.metadata

from fp8pipe.core.machine import Gpu, cpu_features, cpu_model, distribution_version, memory_bytes

CPUINFO = """processor\t: 0
model name\t: Some CPU 9000
flags\t\t: fpu avx2 avx512f amx_bf16 avx512_bf16 amx_tile

processor\t: 1
model name\t: Another
flags\t\t: fpu
"""


def test_features_and_name(tmp_path):
    path = tmp_path / "cpuinfo"
    path.write_text(CPUINFO)
    assert cpu_features(path) == ["avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16"]
    assert cpu_model(path) == "Some CPU 9000"
    assert cpu_features(tmp_path / "none") == []


def test_fp8_begins_at_8_9():
    capabilities = [(8, 0), (8, 6), (8, 9), (9, 0), (12, 0)]
    assert [Gpu("g", c, 1).fp8 for c in capabilities] == [False, False, True, True, True]


def test_installed_versions_and_memory():
    assert distribution_version("click") == importlib.metadata.version("click")
    assert distribution_version("no-such-distribution-at-all") is None
    assert memory_bytes() > 2**28
