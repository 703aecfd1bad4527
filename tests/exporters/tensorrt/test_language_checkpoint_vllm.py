"""The ModelOpt layout as vLLM's reader sees it: its method, the layers it leaves alone, the tensors it wants."""

from __future__ import annotations

import json
import subprocess

import pytest
from language_edits import even
from safetensors import safe_open

from exporters.modelopt.checkpoint import export_checkpoint
from exporters.modelopt.target import ModeloptExportOptions
from exporters.vllm.environment import find_vllm_python, subprocess_environment
from fp8pipe.core.config import build_config
from fp8pipe.core.errors import MissingCapabilityError

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

READ = """
import json, sys, torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import get_quantization_config

root, out = sys.argv[1:]
described = json.load(open(root + "/config.json"))
block = described["quantization_config"]
found = {"method": None}
for name in ("modelopt", "modelopt_fp8"):
    try:
        kind = get_quantization_config(name)
    except ValueError:
        continue
    found["override"] = kind.override_quantization_method(block, None)
    config = kind.from_config(block)
    found["method"] = name
    break
found["file_agrees"] = vars(kind.from_config(json.load(open(root + "/hf_quant_config.json")))) == vars(config)
with set_current_vllm_config(VllmConfig()):
    init_distributed_environment(1, 0, "file://" + out + ".init", 0, "gloo")
    initialize_model_parallel(1, 1)
    size, heads, kv = described["hidden_size"], described["num_attention_heads"], described["num_key_value_heads"]
    wide = described["intermediate_size"]
    layers = {
        "model.layers.0.self_attn.qkv_proj":
            lambda p: QKVParallelLinear(size, size // heads, heads, kv, bias=False, quant_config=config, prefix=p),
        "model.layers.0.mlp.down_proj":
            lambda p: RowParallelLinear(wide, size, bias=False, quant_config=config, prefix=p),
        "lm_head": lambda p: RowParallelLinear(size, 8, bias=False, quant_config=config, prefix=p),
    }
    for prefix, make in layers.items():
        layer = make(prefix)
        found[prefix] = {
            "method": type(layer.quant_method).__name__,
            "parameters": {name: [str(p.dtype), list(p.shape)] for name, p in layer.named_parameters()},
        }
json.dump(found, open(out, "w"), default=str)
"""


@pytest.fixture
def python():
    try:
        return find_vllm_python()
    except MissingCapabilityError as error:
        pytest.skip(str(error))


def test_vllm_wants_the_tensors_that_are_written(language_artifact, language_text, tmp_path, python):
    source = language_artifact("llama", edit=even)
    chosen = {"format": "modelopt-checkpoint", "calibration_data": str(language_text)}
    written = export_checkpoint(source, tmp_path / "export", build_config(ModeloptExportOptions, chosen)).root
    (tmp_path / "read.py").write_text(READ)
    ended = subprocess.run(
        [python, "-P", str(tmp_path / "read.py"), str(written), str(tmp_path / "found.json")],
        env=subprocess_environment(), capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["method"] == "modelopt"
    assert found["file_agrees"]
    assert found["lm_head"]["method"] == "UnquantizedLinearMethod"
    with safe_open(written / "model.safetensors", "pt") as file:
        slices = {name: file.get_slice(name) for name in list(file.keys())}
        stored = {name: (part.get_dtype(), part.get_shape()) for name, part in slices.items()}
    for prefix, parts in (("self_attn.qkv_proj", "qkv"), ("mlp.down_proj", ("down",))):
        layer = found[f"model.layers.0.{prefix}"]
        assert layer["method"].startswith("ModelOpt")
        names = [f"model.layers.0.{prefix.split('.')[0]}.{part}_proj" for part in parts]
        assert set(layer["parameters"]) == {"weight", "weight_scale", "input_scale"}
        for kind, (dtype, shape) in layer["parameters"].items():
            assert {stored[f"{name}.{kind}"][0] for name in names} == {"F8_E4M3" if kind == "weight" else "F32"}
            assert dtype == ("torch.float8_e4m3fn" if kind == "weight" else "torch.float32")
            if kind == "weight":
                rows = sum(stored[f"{name}.weight"][1][0] for name in names)
                assert shape == [rows, stored[f"{names[0]}.weight"][1][1]]
            else:  # one number a joined part
                assert shape == [len(names)]
                assert all(stored[f"{name}.{kind}"][1] == [] for name in names)
