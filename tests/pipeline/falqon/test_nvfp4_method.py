"""Training for NVFP4 as a method: the final merge keeps what was learned, and is what is deployed."""

from __future__ import annotations

import copy

import pytest
import torch

from fp8pipe.core.errors import ConfigurationError
from fp8pipe.models.compat import import_transformers
from fp8pipe.numerics.plain_nvfp4 import dequantize_nvfp4
from pipeline.falqon.base_files import BaseFiles
from pipeline.falqon.nvfp4_method import Nvfp4Method
from pipeline.falqon.rules import Initialisation, update_rule
from pipeline.finetune.method import replace_layer


def prepared(base, rule="live", folder=None):
    model = import_transformers().AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    method = Nvfp4Method(update_rule(rule), rank=8, rows=None, initialisation=Initialisation.RANDOM, seed=0)
    records = method.prepare(model, None if folder is None else BaseFiles(folder, "key"))
    return model, method, records


def batches(count):
    """Texts of 16 different tokens, so that inputs have directions that matter, as those of real text do."""
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(0, 16, (4, 32), generator=generator)} for _ in range(count)]


def losses_of(model, batches):
    """What a method is given: the loss of each batch."""
    return lambda: (model(**batch, labels=batch["input_ids"]).loss for batch in batches)


def move(method):
    """Give every B a small update."""
    generator = torch.Generator().manual_seed(1)
    for b in method.parameters().values():
        b.data = 0.02 * torch.randn(b.shape, generator=generator)


@pytest.fixture
def base(make_base):
    return make_base(num_hidden_layers=1)


@torch.no_grad()
def test_the_compensated_merge_keeps_more_of_what_was_learned_and_clears_b(base):
    errors, tokens = {}, batches(9)
    for rule in ("live", "live-nearest"):
        model, method, records = prepared(base, rule)
        untuned = model(**tokens[8]).logits
        move(method)
        tuned = model(**tokens[8]).logits
        reports = method.finish(model, lambda: tokens[:8], losses_of(model, tokens[:8]))
        errors[rule] = float((model(**tokens[8]).logits - tuned).norm() / (tuned - untuned).norm())
        assert not any(b.any() for b in method.parameters().values())
        assert reports.keys() == method.layers.keys()
        assert all(0 < report.changed < report.codes for report in reports.values())
        encodings = {str(record.weight) for record in records if record.converted}
        assert encodings == {f"4-bit nvfp4, per-block, {'calibrated' if rule == 'live' else 'amax'}"}
    assert errors["live"] < 0.7 * errors["live-nearest"]  # of text that the merge has not seen


@torch.no_grad()
def test_what_is_deployed_is_what_the_merged_layers_compute_with(base):
    model, method, _ = prepared(base)
    move(method)
    method.finish(model, lambda: batches(2), losses_of(model, batches(2)))
    deployed = method.deployed_weights()
    assert tuple(deployed) == method.names
    for group in method.groups:
        assert len({float(deployed[name].divisor) for name in group.members}) == 1  # engines fuse these layers
    tokens = batches(1)[0]
    logits = model(**tokens).logits
    for name, weight in deployed.items():
        plain = dequantize_nvfp4(weight.values, weight.scale, float(weight.divisor)).float()
        layer = torch.nn.Linear(plain.shape[1], plain.shape[0], bias=False)
        layer.weight.data = plain
        replace_layer(model, name, layer)
    assert torch.equal(model(**tokens).logits, logits)


def test_the_compensated_merge_needs_losses(base):
    model, method, _ = prepared(base)
    with pytest.raises(ValueError, match="training losses"):
        method.finish(model, list)


def test_a_run_goes_on_from_its_state_and_leaves_the_files_of_the_base_as_they_are(base, tmp_path):
    model, method, _ = prepared(base, folder=tmp_path)
    move(method)
    state = copy.deepcopy(method.step_state())
    files = {path: path.read_bytes() for path in tmp_path.glob("*.safetensors")}
    method.finish(model, lambda: batches(2), losses_of(model, batches(2)))
    assert files
    assert all(path.read_bytes() == content for path, content in files.items())
    model, again, _ = prepared(base, folder=tmp_path)
    again.load_step_state(state)
    again.finish(model, lambda: batches(2), losses_of(model, batches(2)))
    for name, weight in method.deployed_weights().items():
        assert all(torch.equal(one.view(torch.uint8), other.view(torch.uint8)) for one, other in zip(
            weight.tensors(name).values(), again.deployed_weights()[name].tensors(name).values(), strict=True
        ))  # fmt: skip


@pytest.mark.parametrize(
    ("family", "options", "why"),
    [("gpt2", {}, r"\(in, out\)"), ("llama", {"intermediate_size": 72}, "multiples of 16")],
)
def test_layers_that_no_export_in_nvfp4_holds_are_refused(family, options, why, make_base):
    with pytest.raises(ConfigurationError, match=why):
        prepared(make_base(family, num_hidden_layers=1, **options) if family == "llama" else make_base(family))
