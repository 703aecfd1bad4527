"""Base models that cannot be tuned or exported: each refused before the first step, by name, with a way out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from exporters.vllm.export import plan_export
from exporters.vllm.options import ExportFormat, VllmExportOptions
from exporters.vllm.source import open_source
from exporters.vllm.warnings import plan_warnings
from fp8pipe.core.errors import ConfigurationError
from fp8pipe.models.language.base import (
    check_base,
    check_tokens,
    check_values,
    embedding_rows,
    load_tokenizer,
    unknown_tensors,
)
from fp8pipe.models.language.sources import resolve_model

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def edit_weights(base: Path, change: Callable[[dict[str, Any]], None]) -> None:
    tensors = load_file(base / "model.safetensors")
    change(tensors)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})


def edit_config(base: Path, **changes: object) -> None:
    path = base / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def refusal(base: Path) -> str:
    """What a whole look at a base model says, and it must say how to go on."""
    with pytest.raises(ConfigurationError) as refused:
        check_values(base, "my model", check_base(base, "my model"))
    assert refused.value.fix
    return str(refused.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(make_base, value) -> None:
    base = make_base()
    edit_weights(base, lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"].view(-1)[5].fill_(value))
    assert "model.layers.1.mlp.up_proj.weight (1 values)" in refusal(base)


def test_a_tie_of_two_different_tensors_is_named(make_base) -> None:
    base = make_base(tie_word_embeddings=False)
    edit_config(base, tie_word_embeddings=True)
    assert HEAD in (found := refusal(base))
    assert EMBEDDING in found
    assert "set tie_word_embeddings to false" in found
    for change in (torch.clone, torch.Tensor.double):  # the same values, in one dtype or two
        edit_weights(base, lambda tensors, change=change: tensors.update({HEAD: change(tensors[EMBEDDING])}))
        check_values(base, "my model", check_base(base, "my model"))


def test_tensors_that_the_model_does_not_have_are_told(make_base) -> None:
    base = make_base()
    edit_weights(base, lambda tensors: tensors.update({"model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    assert unknown_tensors(base, check_base(base, "my model")) == []  # as in checkpoints of old versions
    edit_weights(base, lambda tensors: tensors.update({"model.added.weight_g_idx": torch.ones(8)}))
    (told,) = unknown_tensors(base, check_base(base, "my model"))
    assert told.startswith(
        "1 tensor(s) of the checkpoint belong to no part of a LlamaForCausalLM, the first: model.add"
    )
    plan = plan_export(base, VllmExportOptions(format=ExportFormat.BF16))
    assert told in plan_warnings(plan)


@pytest.mark.parametrize("count", [0, 1, -1])
def test_layers_that_the_configuration_does_not_declare_are_named(make_base, count) -> None:
    """transformers would drop them and say so only in its log."""
    base = make_base()
    edit_config(base, num_hidden_layers=count)
    first = max(count, 0)
    assert f"the first: model.layers.{first}.input_layernorm.weight" in refusal(base)
    for format in ExportFormat:
        with pytest.raises(ConfigurationError, match="does not declare"):
            plan_export(base, VllmExportOptions(format=format))


def test_layers_that_predict_further_tokens_may_follow_the_declared_ones(make_base) -> None:
    base = make_base()
    edit_config(base, num_hidden_layers=1, num_nextn_predict_layers=1)
    check_base(base, "my model")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_act": "sillu"}, "KeyError: 'sillu'"),
        ({"num_attention_heads": 0}, "modulo by zero"),
        ({"hidden_size": "64"}, "'hidden_size' expected int, got str (value: '64')"),
        ({"hidden_size": [64]}, "'hidden_size' expected int, got list"),
        ({"num_attention_heads": 7}, "not a multiple of the number of attention heads"),
        ({"architectures": "LlamaForCausalLM"}, "architectures = 'LlamaForCausalLM'"),
    ],
)
def test_settings_of_the_wrong_kind_are_refused_with_their_reason(make_base, changes, words) -> None:
    base = make_base()
    edit_config(base, **changes)
    assert words in refusal(base)


@pytest.mark.parametrize(
    ("named", "words"),
    [(None, "set `architectures` in config.json"), (["LlamaModel"], "LlamaForCausalLM can predict"),
     (["LlamaForSequenceClassification"], "is not a causal language model"), (["Mine"], "exactly one class")],
)  # fmt: skip
def test_an_architecture_that_predicts_no_token_is_refused(make_base, named, words) -> None:
    base = make_base()
    edit_config(base, architectures=named)
    assert words in refusal(base)


def test_a_checkpoint_that_is_not_its_configurations_is_refused(make_base) -> None:
    base = make_base()
    norm = "model.layers.0.input_layernorm.weight"
    edit_weights(base, lambda tensors: tensors.update({norm: torch.ones(32, dtype=torch.bfloat16)}))
    assert f"{norm} of my model has another shape" in refusal(base)
    edit_weights(base, lambda tensors: tensors.pop(norm))
    assert norm in (found := refusal(base))
    assert "would be random" in found


def test_a_base_model_without_its_prefix_is_whole(make_base) -> None:
    base = make_base()
    tensors = load_file(base / "model.safetensors")
    save_file({name.removeprefix("model."): tensor for name, tensor in tensors.items()}, base / "model.safetensors")
    check_values(base, "my model", check_base(base, "my model"))


@pytest.mark.parametrize("beside", [True, False])
def test_an_adapter_is_refused_with_its_base(make_base, beside) -> None:
    base = make_base()
    (base / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base"}))
    if not beside:
        (base / "config.json").unlink()
    with pytest.raises(ConfigurationError, match="holds a PEFT adapter") as refused:
        resolve_model(str(base))
    assert "merge it first" in refused.value.fix
    assert "org/base" in refused.value.fix
    if beside:
        with pytest.raises(ConfigurationError, match="holds a PEFT adapter"):
            open_source(base)


def test_a_model_without_a_tokenizer_is_refused(make_base) -> None:
    base = make_base()
    (base / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigurationError, match="cannot be read"):
        load_tokenizer(base)
    (base / "tokenizer.json").unlink()
    with pytest.raises(ConfigurationError, match="holds no tokenizer") as refused:
        load_tokenizer(base)
    assert "tokenizer.save_pretrained" in refused.value.fix


def test_tokens_without_a_row_are_refused_where_text_uses_them(make_base) -> None:
    base = make_base()
    tokenizer, rows = load_tokenizer(base), embedding_rows(base)
    assert rows == 272
    assert check_tokens(tokenizer, rows, [[0, 260]]) == []
    tokenizer.add_tokens([f"<extra {i}>" for i in range(rows - len(tokenizer) + 1)])
    (unused,) = check_tokens(tokenizer, rows, [[0, 260]])
    last = f"'<extra {rows - 261}>' (272)"
    assert last in unused
    with pytest.raises(ConfigurationError, match="uses 1 token") as refused:
        check_tokens(tokenizer, rows, [[0], [272]])
    assert last in refused.value.why
    assert "resize_token_embeddings" in refused.value.fix
