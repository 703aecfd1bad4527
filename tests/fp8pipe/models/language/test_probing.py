"""Which linears can be replaced is seen in a pass, live or on the meta device."""

from __future__ import annotations

import pytest
import torch
from language_models import ARCHITECTURES, build
from torch import nn

from fp8pipe.core.errors import ConfigurationError
from fp8pipe.models.compat import import_transformers
from fp8pipe.models.language.structure import structure_of
from fp8pipe.models.language.unstacking import unstack_experts


class Reads(nn.Module):
    """A model whose linears are used in every way."""

    def __init__(self) -> None:
        super().__init__()
        names = ("called", "read", "idle", "both", "in_training")
        for name in names:
            setattr(self, name, nn.Linear(16, 16))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = torch.ones(*input_ids.shape, 16)
        y = self.called(x) + nn.functional.linear(x, self.read.weight) + self.both(x).to(self.both.weight.dtype)
        return y + (x @ self.in_training.weight if self.training else self.in_training(x))


def test_only_what_is_called_and_never_read_is_a_candidate() -> None:
    model = Reads().eval()
    state = torch.get_rng_state()
    structure = structure_of(model).probed(model)
    assert structure.trainable == ("called",)
    assert structure.input_groups == (("called",),)
    reads, idle = "the model reads its weight without calling it", "a pass of text does not call it"
    assert structure.left_out == {"read": reads, "idle": idle, "both": reads, "in_training": reads}
    assert not model.training
    assert type(model.read) is nn.Linear
    assert torch.equal(torch.get_rng_state(), state)


class Changes(nn.Module):
    """A model that changes in place what it gives to its linears."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = torch.ones(*input_ids.shape, 16)
        y = self.first(x) + self.second(x)
        x += 1
        return y + self.third(x)


def test_what_was_changed_in_place_is_another_input() -> None:
    assert structure_of(Changes()).probed(Changes()).input_groups == (("first", "second"), ("third",))


@pytest.mark.parametrize("name", ["llama", "jamba", "mamba2", "gpt2", "opt", "mixtral", "gemma3_mm"])
def test_a_plan_sees_what_the_run_sees(name: str) -> None:
    one = ARCHITECTURES[name]
    live = build(one)
    with torch.device("meta"):
        paper = type(live)._from_config(live.config)
    for model in (live, paper):
        unstack_experts(model)
    seen, told = (structure_of(model).probed(model) for model in (live, paper))
    assert told.input_groups == seen.input_groups
    assert told.left_out == seen.left_out
    assert len(seen.trainable) == one.trained
    assert all(seen.in_decoder(module) for module in seen.trainable)


def test_a_model_that_needs_more_than_tokens_is_refused() -> None:
    transformers = import_transformers()
    config = transformers.T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    model = transformers.T5ForConditionalGeneration(config)
    with pytest.raises(ConfigurationError, match="does not run on token ids alone") as refused:
        structure_of(model).probed(model)
    assert refused.value.fix
