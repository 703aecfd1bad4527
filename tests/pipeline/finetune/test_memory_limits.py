"""What preparing a model takes of a GPU's memory: of LLaMA-7B little more than the model in bf16, of 13B far less.

A GPU is counted on fake tensors (`support/fake_cuda.py`), with a few of the 32 layers.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fake_cuda import fake_cuda

from fp8pipe.models.compat import import_transformers
from pipeline.falqon import sums
from pipeline.falqon.convert import convert_model
from pipeline.falqon.flush import preview
from pipeline.falqon.rules import Initialisation, update_rule
from pipeline.finetune.config import FinetuneConfig
from pipeline.finetune.loss import answer_loss
from pipeline.finetune.streaming import stream_weights

SUPPORT = Path(__file__).parents[2] / "support"
SHAPES = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "vocab_size": 32000}
WHOLE = 13.5e9  # bytes of all 32 layers in bf16
LIMIT = 0.06  # of them
SHAPES_13B = {"hidden_size": 5120, "intermediate_size": 13824, "num_attention_heads": 40, "vocab_size": 32000}
LAYERS_13B, CARD = 40, 24e9

DEFAULTS = {name: field.default for name, field in FinetuneConfig.model_fields.items()}


def make_model(layers, shapes=SHAPES, device="cuda"):
    transformers = import_transformers()
    transformers.LlamaForCausalLM  # noqa: B018
    shapes = transformers.LlamaConfig(**shapes, num_hidden_layers=layers)
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(shapes, dtype=torch.bfloat16).eval()


def default_losses(model, batches=DEFAULTS["gradient_batches"]):
    batch, length = DEFAULTS["batch_size"], DEFAULTS["sequence_length"]
    for _ in range(batches):
        ids = torch.zeros(batch, length, dtype=torch.int64)
        places = torch.arange(length).expand(batch, length).contiguous()
        inputs = {"input_ids": ids.to("cuda"), "position_ids": places.to("cuda")}
        yield answer_loss(model, inputs, ids, 1.0)


@pytest.mark.filterwarnings("ignore:Accessing the data pointer")
def test_the_default_preparation_holds_little_beside_the_model(monkeypatch):
    """Gradients are observed of the default batches, all of whose tokens count here; 1.1 times the model at most.

    From layer to layer only what a checkpoint keeps may be added: its input.
    """
    batch, length = DEFAULTS["batch_size"], DEFAULTS["sequence_length"]
    monkeypatch.setattr(sums, "_bytes", lambda tensor: memoryview(bytearray()))  # fake tensors have none
    observed, converted = [], []
    for layers in (1, 3):
        with fake_cuda(found=batch * length) as counter:
            model = make_model(layers)
            loaded = sum(parameter.nbytes for parameter in model.parameters())

            def losses(model=model):
                yield from default_losses(model)
                observed.append(counter.peak - loaded)  # noqa: B023 - called within this turn

            counter.clear()
            how = {"rank": DEFAULTS["rank"], "initialisation": Initialisation.GRADIENT, "seed": 0}
            convert_model(model, update_rule("live"), losses=losses, **how)
            converted.append(counter.peak - loaded)
    fewer, more = max(observed[:2]), max(observed[2:])
    input_bytes = batch * length * SHAPES["hidden_size"] * 2
    assert more - fewer <= 2 * input_bytes
    whole = max(converted[1], more + (32 - 3) * input_bytes)
    assert whole < 0.1 * WHOLE, (observed, converted, whole / WHOLE)


@pytest.mark.filterwarnings("ignore:Accessing the data pointer")
def test_13b_in_bf16_is_converted_on_a_card_that_cannot_hold_it(monkeypatch):
    """26 GB in bf16, of which a card of 24 GB sees one decoder layer at a time.

    From layer to layer are added its codes, its B and, while gradients are observed, its input.
    """
    monkeypatch.setattr(sums, "_bytes", lambda tensor: memoryview(bytearray()))
    batch, length = DEFAULTS["batch_size"], DEFAULTS["sequence_length"]
    peaks = {}
    for layers in (1, 2):
        with fake_cuda(found=batch * length) as counter:
            model = make_model(layers, SHAPES_13B, "cpu")
            names = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
            stream_weights(model, names, torch.device("cuda"))
            beside = counter.peak
            assert beside < 2 * 2 * 5120 * 32000 + 1e7  # embedding and head
            how = {"rank": DEFAULTS["rank"], "initialisation": Initialisation.GRADIENT, "seed": 0}
            observed = []

            def losses(model=model):
                yield from default_losses(model, 1)
                observed.append(counter.peak)  # noqa: B023 - called within this turn

            groups, _ = convert_model(model, update_rule("live"), losses=losses, **how)
            assert all(group.layer.codes.is_cuda and group.layer.lora_B.is_cuda for group in groups)
            peaks[layers] = (max(observed), counter.peak)
    layer = 4 * 5120**2 + 3 * 5120 * 13824  # weights
    input_bytes = batch * length * 5120 * 2
    assert peaks[2][0] - peaks[1][0] <= 2 * input_bytes  # no weight stays from one layer to the next
    added = peaks[2][1] - peaks[1][1]
    assert added < 1.1 * layer
    assert 2 * LAYERS_13B * layer > CARD  # in bf16
    whole = max(peaks[2][0] + (LAYERS_13B - 2) * input_bytes, peaks[1][1] + (LAYERS_13B - 1) * max(added, layer))
    assert whole < 0.75 * CARD, (peaks, whole)


@pytest.mark.filterwarnings("ignore:Accessing the data pointer")
def test_conversion_and_preview_hold_little_beside_the_model():
    with fake_cuda() as counter:
        model = make_model(4)
        loaded = sum(parameter.nbytes for parameter in model.parameters())
        counter.clear()
        how = {"rank": 64, "initialisation": Initialisation.RANDOMIZED_SVD, "seed": 0}
        groups, _ = convert_model(model, update_rule("live"), **how)
        # The first layers are converted beside the whole model; each gives back more than the next one takes.
        assert counter.peak - loaded < LIMIT * WHOLE, (counter.peak - loaded) / WHOLE
        counter.clear()
        held = counter.peak
        assert held < 0.65 * loaded  # codes, embedding and head: nothing of the old weights is left
        preview(max((group.layer for group in groups), key=lambda layer: layer.codes.numel()))
        assert counter.peak - held < LIMIT * WHOLE, (counter.peak - held) / WHOLE


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux for anonymous memory")
def test_the_host_holds_less_than_the_model_while_a_checkpoint_is_loaded_and_prepared(tmp_path):
    """In a process of its own, on a CPU: the memory that is no file's, for weights and codes are mapped from theirs.

    Freed memory is returned at once (`host_peak.py` says why), so the figures show what is held, and hardly depend on
    the vector instructions that torch, oneDNN and MKL use. While gradients are observed, 0.11 of the model is held:
    0.24 if their sums are kept in memory, and 0.49 if layers are not recomputed; the limit of 0.17 lies between.
    Afterwards it is 0.13: what was not converted, and the temporaries of one layer. With the codes in memory, too, it
    would be 0.60, and with the old weights 0.9 more.
    """
    command = [sys.executable, str(SUPPORT / "host_peak.py"), str(tmp_path)]
    returning = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    environment = {**os.environ, "PYTHONPATH": str(SUPPORT.parents[1]), "OMP_NUM_THREADS": "1", **returning}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert 0 < found["observing"] < 0.17 * found["model"], found
    assert 0 < found["converting"] < 0.3 * found["model"], found
