"""The form in which vLLM serves: what is filled in where nothing was given."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from exporters.vllm.form import ServingForm


@pytest.mark.parametrize(
    ("config", "given", "length"),
    [
        ({"max_position_embeddings": 64}, None, "-1"), ({"n_positions": 64}, None, "-1"),
        ({"text_config": {}}, None, "-1"), ({"alibi": True}, None, "2048"), ({"alibi": True}, 100, "100"),
    ],
)  # fmt: skip
def test_vllm_gets_a_length_where_the_model_states_none(
    config: dict[str, object], given: int | None, length: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    form = ServingForm(max_model_len=given).with_defaults(tmp_path, on_cpu=True)
    assert form.arguments() == ["--dtype", "bfloat16", "--max-model-len", length, "--enforce-eager"]
    assert "--enforce-eager" not in ServingForm(enforce_eager=False).with_defaults(tmp_path, on_cpu=True).arguments()
