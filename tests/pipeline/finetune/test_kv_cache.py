"""What `finetune` measures for an FP8 key/value cache, on tiny models that were not trained."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from tiny_decoders import DECODERS

from fp8pipe.models.compat import import_transformers
from fp8pipe.models.language.kv_cache import observe_ranges
from fp8pipe.models.language.text import Encoded
from pipeline.finetune.batches import Batches
from pipeline.finetune.kv_cache import _standard_error, measure_kv_cache
from pipeline.finetune.loss import heldout_loss

LENGTHS = (9, 14, 20, 5, 31)


def tiny(family: str = "llama"):
    torch.manual_seed(0)
    return import_transformers().AutoModelForCausalLM.from_config(DECODERS[family]())


def batches(seed: int, packing: bool = True) -> Batches:
    draw = torch.Generator().manual_seed(seed)
    ids = [torch.randint(2, 272, (length,), generator=draw).tolist() for length in LENGTHS]
    return Batches([Encoded(row, [-100, *row[1:]]) for row in ids], 2, 48, seed=0, packing=packing, pad_id=0)


def test_ranges_are_of_single_examples_and_both_losses_of_the_same_heldout_tokens():
    model, train, heldout = tiny().train(), batches(1), batches(2)
    facts, reason = measure_kv_cache(model, train, heldout, {}, "cpu")
    assert reason == ""
    assert model.training
    model.eval()
    single = [
        ({"input_ids": torch.tensor([example.input_ids])}, (len(example.input_ids),)) for example in train._encoded
    ]
    expected = observe_ranges(model, single)
    assert list(facts.amax) == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    for name, seen in facts.amax.items():
        assert seen.k == pytest.approx(expected[name].k, rel=1e-5)  # other batches, so other sums in fp32
        assert seen.v == pytest.approx(expected[name].v, rel=1e-5)
    assert (facts.records, facts.tokens) == (len(LENGTHS), sum(LENGTHS))
    alone = heldout.unpacked()
    assert facts.loss == pytest.approx(heldout_loss(model, [alone.at(i) for i in range(len(alone))], "cpu"), rel=1e-6)
    assert facts.heldout_tokens == sum(LENGTHS) - len(LENGTHS)
    assert 0 < abs(facts.fp8_loss - facts.loss) < 0.01 * facts.loss
    assert 0 < facts.error < 0.01


def test_the_standard_error_is_that_of_the_mean_over_batches():
    """For batches of equal size it is the textbook's: their standard deviation over the root of their number."""
    differences = torch.tensor([0.1, -0.3, 0.25, 0.05], dtype=torch.float64)
    found = _standard_error(differences * 7, torch.full((4,), 7.0, dtype=torch.float64))
    assert found == pytest.approx(float(differences.std()) / 2)
    assert _standard_error(differences[:1], torch.ones(1, dtype=torch.float64)) is None


def test_layers_are_named_as_the_checkpoint_names_them():
    names = {f"model.layers.{layer}.self_attn.k_proj": f"language.h.{layer}.attn.k_proj" for layer in (0, 1)}
    facts, _ = measure_kv_cache(tiny(), batches(1), batches(2), names, "cpu")
    assert list(facts.amax) == ["language.h.0.attn", "language.h.1.attn"]


def test_a_model_without_such_a_cache_is_told_why_and_keeps_its_run():
    model = tiny()
    model.model.layers[0].self_attn.v_proj.weight.data[0, 0] = torch.inf
    facts, reason = measure_kv_cache(model, batches(1), batches(2), {}, "cpu")
    assert facts is None
    assert "not finite" in reason
    model.config.kv_lora_rank = 4
    assert "latent" in measure_kv_cache(model, batches(1), batches(2), {}, "cpu")[1]


@pytest.mark.parametrize(("error", "alone", "raised"), [
    (RuntimeError("no such cache"), True, False),
    (RuntimeError("Connection closed by peer"), False, True),
    (dist.DistBackendError("NCCL"), True, True),
    (ValueError("no such cache"), False, False),
])  # fmt: skip
def test_what_may_tell_of_a_lost_process_is_not_taken_for_a_model_without_such_a_cache(error, alone, raised):
    def fail(*arguments: object) -> None:
        raise error

    model = tiny()
    model.model.layers[0].register_forward_pre_hook(fail)
    if raised:
        with pytest.raises(type(error), match=str(error)):
            measure_kv_cache(model, batches(1), batches(2), {}, "cpu", alone=alone)
    else:
        assert measure_kv_cache(model, batches(1), batches(2), {}, "cpu", alone=alone) == (None, "no such cache")
