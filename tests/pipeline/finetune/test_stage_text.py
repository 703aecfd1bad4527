"""The stage and its text: what is passed over, templates, ends of turns, and text longer than a model has positions."""

from __future__ import annotations

import json

import pytest
from tuning_config import config

from fp8pipe.core.errors import ConfigurationError
from fp8pipe.models.language.base import positions
from fp8pipe.models.language.sources import resolve_model
from pipeline.finetune.stage import finetune
from pipeline.finetune.text import load_text


def test_what_is_dropped_and_passed_over_stands_in_the_manifest(make_base, tmp_path):
    rows = [
        {"tools": [{"name": "f"}], "source": "x", "messages": [
            {"role": "user", "content": f"q{i % 5}"}, {"role": "assistant", "content": f"a{i % 10}", "weight": i % 2},
        ]} for i in range(20)
    ]  # fmt: skip
    (tmp_path / "data").mkdir()
    for name, part in (("a", rows[:7]), ("b", rows[7:]), ("test", rows)):
        (tmp_path / "data" / f"{name}.json").write_text(json.dumps(part))
    artifact = finetune(config(make_base(), tmp_path / "data", steps=1, answers="last"), tmp_path / "out")
    warnings = "\n".join(artifact.manifest.warnings)
    for said in (
        "for evaluation, by their names: test.json", "'source' (in 20 of 20)",
        "10 of 20 records were left out: they repeat another one exactly",
        "4 of 8 examples were left out: every answer of them has weight 0", "ignores the tools of records: 4",
        "held-out text: the chat template ignores the tools of records: 1",
    ):  # fmt: skip
        assert said in warnings
    assert (artifact.manifest.details.data.train, artifact.manifest.details.data.heldout) == (8, 2)


def test_a_chat_template_that_is_not_valid_is_refused_before_the_data_is_read(make_base, tmp_path):
    base = make_base()
    (base / "chat_template.jinja").write_text("{% for m in messages %}")
    with pytest.raises(ConfigurationError, match=r"chat_template\.jinja is not valid"):
        finetune(config(base, tmp_path / "absent.jsonl"), tmp_path / "out")


@pytest.mark.parametrize("end", ["<|system|>", "<|end|>", ""])
def test_engines_are_told_the_end_that_the_model_has_learned(make_base, pairs, tmp_path, end):
    base = make_base()
    (base / "chat_template.jinja").write_text((base / "chat_template.jinja").read_text().replace("<|end|>", end))
    artifact = finetune(config(base, pairs, steps=1, warmup_steps=0), tmp_path / "out")
    before, after = ((root / "generation_config.json").read_bytes() for root in (base, artifact.root))
    said = [warning for warning in artifact.manifest.warnings if "engine" in warning or "no end-of-turn" in warning]
    if end == "<|system|>":  # id 4; the tokenizer's is <|end|>, and the configuration's default is 2
        assert json.loads(after) == json.loads(before) | {"eos_token_id": [2, 4]}
        assert artifact.manifest.details.stop_token_added == 4
        assert len(said) == 1
    else:
        assert after == before
        assert artifact.manifest.details.stop_token_added is None
        assert bool(said) == (end == "")


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_text_longer_than_the_positions_is_refused_and_a_long_row_of_short_text_is_not(make_base, tmp_path, family):
    base = make_base(family, **{"gpt2": {"n_positions": 64}, "llama": {"max_position_embeddings": 64}}[family])
    (data := tmp_path / "long.jsonl").write_text(
        "".join(json.dumps({"prompt": f"q{i}", "completion": "a" * 100}) + "\n" for i in range(9))
    )
    with pytest.raises(ConfigurationError, match="has 64 positions") as error:
        finetune(config(base, data, sequence_length=256), tmp_path / "out")
    assert error.value.exit_code == 10
    assert "--sequence-length 64" in error.value.fix
    assert load_text(config(base, data, sequence_length=64), resolve_model(str(base))).train
    data.write_text(data.read_text().replace("a" * 90, ""))
    text = load_text(config(base, data, sequence_length=256), resolve_model(str(base)))
    learned = family == "gpt2"
    assert max(text.train.at(i).input_ids.shape[1] for i in range(len(text.train))) <= (64 if learned else 256)
    assert any("rows hold 64 tokens" in warning for warning in text.warnings) == learned
    if learned:
        finetune(config(base, data, sequence_length=256, steps=1), tmp_path / "out")


def test_scaled_positions_reach_further():
    from transformers import LlamaConfig, OPTConfig

    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e4}
    llama3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 16, "rope_theta": 1e4,
              "low_freq_factor": 1.0, "high_freq_factor": 4.0}  # fmt: skip
    for rope, reach in ((None, 64), (yarn, 256), (llama3, 64)):
        assert positions(LlamaConfig(max_position_embeddings=64, rope_scaling=rope)) == reach
    assert positions(OPTConfig(max_position_embeddings=32)) == 32


def test_the_plain_template_travels_with_a_model_that_has_none(make_base, pairs, tmp_path):
    from fp8pipe.models.compat import import_transformers
    from fp8pipe.models.language.text.template import template_info

    base = make_base()
    (base / "chat_template.jinja").unlink()
    trained = template_info(import_transformers().AutoTokenizer.from_pretrained(base))
    assert trained.origin == "plain"
    artifact = finetune(config(base, pairs, steps=1), tmp_path / "out")
    served = import_transformers().AutoTokenizer.from_pretrained(artifact.root)
    talk = [{"role": "user", "content": "double 2"}]
    asked = served.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    assert asked == "### Question:\ndouble 2\n\n### Answer:\n"
    assert template_info(served).template == trained.template
    assert any("no chat template" in warning for warning in artifact.manifest.warnings)
