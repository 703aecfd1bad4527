"""GGUF files become checkpoints, once, in a cache that is checked; what cannot be read is told."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gguf_packages import needs_gguf
from safetensors.torch import load_file
from tiny_disk import tiny_disk_at

from fp8pipe.core.errors import BadArtifactError, ConfigurationError, MissingCapabilityError, OutOfMemoryError
from fp8pipe.models.checkpoint.gguf import cache_root, convert_gguf
from fp8pipe.models.checkpoint.quantized.base import read_base
from fp8pipe.models.compat import import_transformers
from fp8pipe.models.language.sources import resolve_model

ROOT = Path(__file__).resolve().parents[4]


def write_gguf(
    path: Path, *, tied: bool, architecture: str = "llama", without: str = "", blocks: int = 1
) -> dict[str, torch.Tensor]:
    """A small GGUF file in the layout llama.cpp gives Llama models; returns what the checkpoint must hold."""
    from gguf import GGUFWriter

    torch.manual_seed(0)
    hidden, heads, kv_heads, inner, words = 64, 4, 2, 96, 40
    writer = GGUFWriter(str(path), architecture)
    writer.add_context_length(128)
    writer.add_embedding_length(hidden)
    writer.add_block_count(blocks)
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
        if name == without:
            continue
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
def test_a_file_that_lacks_a_tensor_is_refused_and_nothing_is_cached(tmp_path: Path, cache: Path) -> None:
    """transformers would fill the weight with random values."""
    write_gguf(tmp_path / "m.gguf", tied=True, without="blk.0.ffn_up")
    with pytest.raises(ConfigurationError, match="lacks 1 weight") as refused:
        convert_gguf(tmp_path / "m.gguf")
    assert "model.layers.0.mlp.up_proj.weight" in refused.value.why
    assert [path for path in cache.iterdir() if path.is_dir()] == []


@needs_gguf
@pytest.mark.parametrize(("blocks", "why"), [(0, "it declares 0 block"), (2, "none of its tensors")])
def test_a_file_with_another_number_of_blocks_than_it_declares_is_refused(
    blocks: int, why: str, tmp_path: Path, cache: Path
) -> None:
    write_gguf(tmp_path / "m.gguf", tied=True, blocks=blocks)
    with pytest.raises(ConfigurationError) as refused:
        convert_gguf(tmp_path / "m.gguf")
    assert why in refused.value.why


@needs_gguf
def test_an_existing_gguf_file_can_be_exported(tmp_path: Path, cache: Path) -> None:
    from exporters.vllm.export import export_vllm
    from exporters.vllm.options import VllmExportOptions

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
    assert read_base(source.path).stored is None
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
        "import logging, sys; from pathlib import Path; from fp8pipe.models.checkpoint.gguf import convert_gguf\n"
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
    with pytest.raises(ConfigurationError, match="is not a GGUF file"):
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
def test_a_cache_whose_disk_is_full_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights are written by safetensors, which has its own exception for that."""
    write_gguf(tmp_path / "m.gguf", tied=True)
    with tiny_disk_at(tmp_path / "disk", "32k") as mount:
        monkeypatch.setenv("FP8PIPE_CACHE", str(mount))
        with pytest.raises(OutOfMemoryError, match="is full") as caught:
            convert_gguf(tmp_path / "m.gguf")
        assert not [path for path in cache_root().iterdir() if path.is_dir()]
    assert "set FP8PIPE_CACHE" in caught.value.fix


@needs_gguf
def test_a_cache_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "m.gguf", tied=True)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FP8PIPE_CACHE", str(tmp_path / "file"))
    with pytest.raises(ConfigurationError, match="cannot be written") as caught:
        resolve_model(str(tmp_path / "m.gguf"))
    assert "FP8PIPE_CACHE" in caught.value.fix
