from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from fp8pipe.core.errors import ConfigurationError
from fp8pipe.models.compat import import_transformers
from fp8pipe.models.language.text.encode import IGNORED, Encoded
from pipeline.finetune.batches import Batch, Batches, first_fit

PAD = 0


def example(length: int, first: int = 1, answers: int = 2) -> Encoded:
    ids = [1 + (first + i) % 96 for i in range(length)]
    keep = max(length - answers, 1)
    return Encoded(ids, [IGNORED] * keep + ids[keep:])


lengths = st.lists(st.integers(2, 40), min_size=1, max_size=40)


def same(a: Batch, b: Batch) -> bool:
    return torch.equal(a.input_ids, b.input_ids) and torch.equal(a.labels, b.labels) and a.examples == b.examples


@settings(deadline=None)
@given(lengths, st.integers(1, 9), st.booleans(), st.integers(0, 2**40), st.integers(0, 3))
def test_every_epoch_has_every_example_once_and_every_token(
    sizes: list[int], batch_size: int, packing: bool, seed: int, epoch: int
) -> None:
    encoded = [example(n, first=7 * i) for i, n in enumerate(sizes)]
    batches = Batches(encoded, batch_size, 40, seed, packing, PAD)
    steps = range(epoch * len(batches), (epoch + 1) * len(batches))
    seen = [batches.at(step) for step in steps]
    assert sorted(i for b in seen for i in b.examples) == list(range(len(encoded)))
    assert sum(b.tokens for b in seen) == sum(sizes)
    assert sum(b.answer_tokens for b in seen) == sum(e.answer_tokens for e in encoded)
    # Each example is found again from the tensors alone: a segment begins where the position is 0.
    found: Counter[tuple[tuple[int, int], ...]] = Counter()
    for b in seen:
        assert b.input_ids.shape == b.labels.shape == b.position_ids.shape
        assert b.input_ids.shape[1] % 16 == 0
        assert 1 <= len(b.input_ids) <= batch_size
        for ids, labels, positions in zip(b.input_ids, b.labels, b.position_ids, strict=True):
            real = int((ids != PAD).sum())  # examples never hold the pad id
            assert (ids[real:] == PAD).all()
            assert (labels[real:] == IGNORED).all()
            cuts = [*(i for i in range(real) if positions[i] == 0), real]
            for a, z in pairwise(cuts):
                assert positions[a:z].tolist() == list(range(z - a))
                found[tuple(zip(ids[a:z].tolist(), labels[a:z].tolist(), strict=True))] += 1
    assert found == Counter(tuple(zip(e.input_ids, e.labels, strict=True)) for e in encoded)
    sizes_of_batches = [len(b.input_ids) for b in seen]
    assert max(sizes_of_batches) - min(sizes_of_batches) <= 1


@settings(deadline=None)
@given(lengths, st.integers(1, 5), st.booleans(), st.integers(0, 5), st.lists(st.integers(0, 60), max_size=8))
def test_a_batch_depends_on_seed_and_step_alone(
    sizes: list[int], batch_size: int, packing: bool, seed: int, earlier: list[int]
) -> None:
    encoded = [example(n, first=7 * i) for i, n in enumerate(sizes)]
    used, fresh = (Batches(encoded, batch_size, 40, seed, packing, PAD) for _ in range(2))
    for step in earlier:
        used.at(step)
    assert same(used.at(17), fresh.at(17))


def test_epochs_and_seeds_are_ordered_differently() -> None:
    encoded = [example(8, first=i) for i in range(50)]
    a = Batches(encoded, 50, 16, 0, False, PAD)
    b = Batches(encoded, 50, 16, 1, False, PAD)
    assert len(a) == 1
    assert len({a.at(0).examples, a.at(1).examples, b.at(0).examples}) == 3


def plain_first_fit(sizes: list[int], order: list[int], capacity: int) -> list[list[int]]:
    rows: list[list[int]] = []
    for i in order:
        for row in rows:
            if sum(sizes[j] for j in row) + sizes[i] <= capacity:
                row.append(i)
                break
        else:
            rows.append([i])
    return rows


@given(lengths.flatmap(lambda s: st.tuples(st.just(s), st.permutations(range(len(s))))))
def test_first_fit_equals_the_textbook_loop(case: tuple[list[int], list[int]]) -> None:
    assert first_fit(*case, 40) == plain_first_fit(*case, 40)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model(request: pytest.FixtureRequest) -> Any:
    transformers = import_transformers()
    torch.manual_seed(0)
    if request.param == "llama":
        config = transformers.LlamaConfig(
            vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3,
        )  # fmt: skip
    else:  # learned positions instead of rotary ones
        config = transformers.GPT2Config(
            vocab_size=97, n_embd=64, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3
        )
    built = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    return built.eval()


@torch.no_grad()
def summed_loss(model: Any, batch: Batch, *, use_cache: bool = False) -> float:
    logits = model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        attention_mask=None,
        use_cache=use_cache,
    ).logits
    return float(
        cross_entropy(
            logits[:, :-1].flatten(0, 1).double(),
            batch.labels[:, 1:].flatten(),
            ignore_index=IGNORED,
            reduction="sum",
        )
    )


@torch.no_grad()
def one_by_one(model: Any, encoded: list[Encoded]) -> float:
    """The oracle: each example alone, no padding, no positions, no batches."""
    total = 0.0
    for e in encoded:
        logits = model(input_ids=torch.tensor([e.input_ids]), use_cache=False).logits[0].double()
        total += float(cross_entropy(logits[:-1], torch.tensor(e.labels[1:]), ignore_index=IGNORED, reduction="sum"))
    return total


# Sizes that leave rows unfilled, examples of two tokens, and one that fills a row.
SIZES = [5, 9, 2, 17, 30, 3, 11, 40, 2, 8, 21, 4]
# fp32 logits summed in another order (another mask, another row length) differ by a few 1e-6
# relative, and the summed loss averages such errors; leaking attention changes it by more than 1e-3 (below).
TOLERANCE = 1e-5


@pytest.mark.parametrize("packing", [True, False])
def test_the_loss_equals_that_of_the_examples_alone(model: Any, packing: bool) -> None:
    encoded = [example(n, first=13 * i, answers=n // 2 + 1) for i, n in enumerate(SIZES)]
    batches = Batches(encoded, 2, 40, 3, packing, PAD)
    assert not packing or batches.rows < len(encoded) // 2
    total = sum(summed_loss(model, batches.at(i)) for i in range(len(batches)))
    assert total == pytest.approx(one_by_one(model, encoded), rel=TOLERANCE)


def test_a_cache_would_let_packed_examples_see_each_other(model: Any) -> None:
    """Why callers must pass use_cache=False; if transformers mends this, the rule can go."""
    encoded = [example(n, first=13 * i, answers=n // 2 + 1) for i, n in enumerate(SIZES)]
    batches = Batches(encoded, 2, 40, 3, True, PAD)
    leaking = sum(summed_loss(model, batches.at(i), use_cache=True) for i in range(len(batches)))
    assert abs(leaking / one_by_one(model, encoded) - 1) > 1e-3


@pytest.mark.parametrize("packing", [True, False])
def test_padding_on_the_right_changes_nothing(model: Any, packing: bool) -> None:
    encoded = [example(n, first=13 * i) for i, n in enumerate([5, 9, 2])]
    batch = Batches(encoded, 3, 16, 0, packing, PAD).at(0)
    extra = 16
    rows = len(batch.input_ids)
    last = batch.position_ids[:, -1:]
    wider = Batch(
        torch.cat([batch.input_ids, torch.full((rows, extra), PAD)], 1),
        torch.cat([batch.labels, torch.full((rows, extra), IGNORED)], 1),
        torch.cat([batch.position_ids, last + 1 + torch.arange(extra)], 1),
        batch.tokens,
        batch.answer_tokens,
        batch.examples,
    )
    assert summed_loss(model, wider) == pytest.approx(summed_loss(model, batch), rel=TOLERANCE)


def test_the_first_token_of_a_packed_example_is_never_learned() -> None:
    answer_only = Encoded([5, 6, 7], [5, 6, 7])
    batch = Batches([answer_only] * 4, 1, 12, 0, True, PAD).at(0)
    assert batch.labels[0].tolist() == [IGNORED, 6, 7] * 4 + [IGNORED] * 4
    assert batch.answer_tokens == 8


def test_positions_stay_within_the_sequence_length() -> None:
    # 20 tokens pad to 32; a model with 20 learned positions must not be asked for position 20.
    for packing in (True, False):
        batch = Batches([example(20)], 1, 20, 0, packing, PAD).at(0)
        assert batch.input_ids.shape == (1, 32)
        assert int(batch.position_ids.max()) == 19


@pytest.mark.parametrize(
    ("encoded", "sizes", "said"),
    [
        ([], (1, 16, 0), "nothing to batch"),
        ([example(4)], (0, 16, 0), "batch_size is 0"),
        ([example(4)], (1, 1, 0), "sequence_length is 1"),
        ([example(4)], (1, 16, -1), "seed is -1"),
        ([example(17)], (1, 16, 0), "an example has 17 tokens"),
        ([Encoded([], [])], (1, 16, 0), "empty"),
        ([Encoded([1, 2], [1])], (1, 16, 0), "differ in length"),
    ],
)
def test_what_cannot_be_batched(encoded: list[Encoded], sizes: tuple[int, int, int], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        Batches(encoded, *sizes, True, PAD)
