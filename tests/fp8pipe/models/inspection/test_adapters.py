"""An adapter of PEFT is told as what it is; peft itself writes it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from fp8pipe.cli import main
from fp8pipe.core.errors import ConfigurationError
from fp8pipe.models.checkpoint.adapters import ADAPTER_FILE, read_adapter
from fp8pipe.models.compat import import_transformers
from fp8pipe.models.language.sources import resolve_model


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    transformers = import_transformers()
    import peft

    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    settings = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 6}, modules_to_save=["lm_head"]
    )
    root = tmp_path / "adapter"
    peft.get_peft_model(model, settings).save_pretrained(root)
    said = json.loads((root / ADAPTER_FILE).read_text())
    (root / ADAPTER_FILE).write_text(json.dumps(said | {"base_model_name_or_path": "org/base"}))
    return root


def inspect(root: Path, *options: str) -> str:
    ended = CliRunner().invoke(main, ["inspect", str(root), *options])
    assert ended.exit_code == 0, ended.output
    return str(ended.stdout)


def test_inspect_says_what_it_is_of_and_what_to_do(adapter: Path) -> None:
    text = " ".join(inspect(adapter).split())
    for said in (
        "contents: PEFT adapter", "adapter LORA", "base_model org/base", "rank 4, 6", "alpha 8",
        "targets q_proj, v_proj", "replaced_whole lm_head", "an adapter is not a model on its own: merge it first",
        "merge_and_unload",
    ):  # fmt: skip
        assert said in text, said
    assert json.loads(inspect(adapter, "--json"))["contents"]["facts"]["base_model"] == "org/base"
    with pytest.raises(ConfigurationError, match="not a model on its own") as caught:
        resolve_model(str(adapter))
    assert caught.value.fix in inspect(adapter)  # the same advice everywhere


def test_weights_that_are_pickled_are_not_needed_to_tell(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    assert "its weights are pickled, and not read" in inspect(adapter)
    (adapter / ADAPTER_FILE).write_text("{")
    text = inspect(adapter)
    assert "PEFT adapter" in text
    assert "of an unknown kind" in text
    found = read_adapter(adapter)
    assert found is not None
    assert (found.base, found.ranks, found.targets) == ("", (), ())


def test_beside_a_model_both_are_told(adapter: Path) -> None:
    (adapter / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    text = inspect(adapter)
    assert "contents: plain" in text
    assert "a PEFT adapter lies next to the model" in text
