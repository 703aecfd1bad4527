"""One step's data and the normaliser of its loss follow from the step's number, at any accumulation."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch

import pipeline.finetune.loop as loop
from fp8pipe.artifact import ArtifactWriter
from fp8pipe.core.config import build_config
from fp8pipe.core.errors import BadArtifactError
from fp8pipe.models.language.text import IGNORED
from pipeline.finetune.batches import Batch
from pipeline.finetune.config import FinetuneConfig
from pipeline.finetune.loop import Trainer


def batch(number: int, answers: int) -> Batch:
    labels = torch.full((1, 16), IGNORED)
    labels[0, 0] = 5  # of no predictor, so it is no answer
    labels[0, 1 : 1 + answers] = 7
    ids = torch.full((1, 16), number)
    return Batch(ids, labels, torch.arange(16)[None], 10 + number, answers, (number,))


def own_methods(trainer: SimpleNamespace, *names: str) -> None:
    """Gives what stands for a trainer these methods of `Trainer`."""
    for name in names:
        setattr(trainer, name, partial(getattr(Trainer, name), trainer))


class Data:
    def __init__(self, *answers: int) -> None:
        self.answers, self.asked = answers, []

    def at(self, step: int) -> Batch:
        self.asked.append(step)
        return batch(step, self.answers[step % len(self.answers)])


@pytest.mark.parametrize(
    ("step", "accumulation", "asked"), [(0, 1, [0]), (3, 1, [3]), (3, 2, [6, 7]), (2, 3, [6, 7, 8])]
)
def test_a_step_takes_its_own_batches_and_no_others(monkeypatch, step, accumulation, asked):
    data, given = Data(1, 0, 3, 4, 2), []

    def loss(model, inputs, labels, normaliser):
        given.append((int(inputs["input_ids"][0, 0]), normaliser))
        return torch.tensor(1.5, requires_grad=True)

    monkeypatch.setattr(loop, "answer_loss", loss)
    trainer = SimpleNamespace(
        config=SimpleNamespace(gradient_accumulation=accumulation, device="cpu"), step=step, train_batches=data,
        model=None, method=SimpleNamespace(forward_context=nullcontext),
    )  # fmt: skip
    own_methods(trainer, "micro_batches", "backward")
    losses, answers, tokens = Trainer.accumulate(trainer)
    assert data.asked == asked
    counts = {number: data.answers[number % 5] for number in asked}
    assert answers == sum(counts.values())
    assert given == [(number, float(answers)) for number in asked if counts[number]]
    assert [float(loss) for loss in losses] == [1.5] * len(given)
    assert tokens == sum(10 + number for number in asked)


def test_calibration_takes_the_first_batches_until_there_are_enough():
    for wanted, rows, asked in ((4, 2, [0, 1]), (5, 2, [0, 1, 2]), (1, 8, [0])):
        data = Data(1)
        config = build_config(
            FinetuneConfig,
            {"model": "m", "data": "d", "final_merge_batches": wanted, "batch_size": rows, "device": "cpu"},
        )
        trainer = SimpleNamespace(config=config, train_batches=data)
        own_methods(trainer, "_calibration_batches")
        found = Trainer.calibration_inputs(trainer)
        assert data.asked == []  # one at a time, when it is needed
        assert [int(inputs["input_ids"][0, 0]) for inputs in found] == data.asked == asked


class Store:
    """Checkpoints in memory."""

    def __init__(self, **saved) -> None:
        self.saved = saved

    def steps(self):
        return sorted(map(int, self.saved))

    def load(self, step):
        return self.saved[str(step)]


def test_a_resumed_run_continues_from_the_newest_checkpoint_alone(monkeypatch, tmp_path):
    taken = {}
    monkeypatch.setattr(loop, "restore_optimizer", lambda optimizer, names, tensors: taken.update(optimizer=tensors))
    tensors = {"codes": torch.ones(1), "optimizer/b/step": torch.ones(1)}
    old, new = ({"step": step, "history": [{"step": step}]} for step in (4, 8))
    trainer = SimpleNamespace(
        store=Store(**{"4": ({}, old), "8": (tensors, new)}), optimizer=None, names={}, step=0, history=[],
        method=SimpleNamespace(load_step_state=lambda state: taken.update(method=state)),
        metrics_file=tmp_path / "metrics.jsonl",
    )  # fmt: skip
    own_methods(trainer, "restore", "write_metrics")
    assert Trainer.resume(trainer) is True
    assert (trainer.step, trainer.history) == (8, [{"step": 8}])
    assert list(taken["method"]) == ["codes"]
    assert taken["optimizer"] is tensors
    assert trainer.metrics_file.read_text() == '{"step": 8}\n'
    trainer.store, trainer.step = Store(), 0
    assert Trainer.resume(trainer) is False
    assert (trainer.step, trainer.metrics_file.read_text()) == (0, "")


def test_what_was_written_is_read_back_and_counted(make_base, tmp_path, monkeypatch):
    import pipeline.finetune.weights as deploy
    from pipeline.finetune.weights import Deployed, count_differing, write_checkpoint

    base, name = make_base(), "model.layers.0.mlp.up_proj"
    codes = torch.arange(96 * 64).remainder(100).to(torch.uint8).view(torch.float8_e4m3fn).reshape(96, 64)
    weights = {name: Deployed(codes, torch.tensor(0.5), False)}

    def wrong(base, root, given):
        values, scale, transposed, _ = given[name]
        other = values.clone()
        other.view(torch.uint8)[3, 5] ^= 1
        write_checkpoint(base, root, {name: Deployed(other, scale * 2, transposed)})

    def gates(place):
        with ArtifactWriter(tmp_path / place, kind="falqon", stage="finetune") as writer:
            deploy.write_deployed(writer, base, {"own": weights[name]}, {}, {"own": name})
            return [(gate.name, gate.value, gate.passed) for gate in writer.gates], writer.root

    assert gates("right")[0] == [("reopened bytes differing", 0, True)]
    monkeypatch.setattr(deploy, "write_checkpoint", wrong)
    found, root = gates("wrong")
    assert found == [("reopened bytes differing", 2, False)]  # a code, and the scale's exponent
    with pytest.raises(BadArtifactError, match="is not quantized"):
        count_differing(root, {name: Deployed(codes.bfloat16(), None, False)})
    with pytest.raises(BadArtifactError, match=r"missing from .*"):
        count_differing(root, {"model.none": Deployed(codes, None, False)})
