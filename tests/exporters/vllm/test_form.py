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


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (("--tensor-par", "2"), "--tensor-par, short for --tensor-parallel-size, is an option of this command"),
        (("--tensor_par=2",), "short for --tensor-parallel-size, is an option of this command"),
        (("-t", "2"), "short for --tensor-parallel-size, is an option of this command"),
        (("--nnode", "2"), "short for --nnodes, is an option of this command"),
        (("-n2",), "-n is an option of this command"),
        (("--api-k=secret",), "short for --api-key, is set by fp8pipe"),
        (("--distributed-executor", "ray"), "--distributed-executor ray cannot be given"),
        (("--distributed-executor-backend=other.Executor",), "other.Executor cannot be given"),
        (("-dpb", "ray"), "-dpb ray cannot be given"),
    ],
)
def test_options_that_vllm_would_understand_are_refused_in_every_spelling(extra: tuple[str, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ServingForm(extra=extra)


def test_other_options_are_passed_on() -> None:
    extra = ("--seed", "-1", "--distributed-executor", "mp", "-dp", "2", "--model-impl", "auto", "-O3")
    assert ServingForm(extra=extra).arguments()[-len(extra) :] == list(extra)
