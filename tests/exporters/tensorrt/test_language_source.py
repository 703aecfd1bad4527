"""What language exports for TensorRT are made of: attention, the training's text, and linears of other models."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from language_models import ARCHITECTURES
from language_models import write as write_architecture
from picture_data import about, paint

from exporters.graph.layers import read_layers
from exporters.tensorrt.language.graph import decoder_graph
from exporters.tensorrt.language.source import check_attention, open_language
from exporters.tensorrt.target import Base
from exporters.text import read_text
from fp8pipe.artifact.kinds import TextFacts
from fp8pipe.core.config import build_config
from fp8pipe.core.errors import ConfigurationError
from pipeline.finetune.config import FinetuneConfig
from pipeline.finetune.stage import finetune

SCALES = 2.0**-4


@pytest.fixture(scope="module")
def llama(language_artifact):
    return language_artifact("llama")


def test_windows_of_attention_are_refused(llama, language_artifact, tmp_path):
    model = open_language(llama)
    check_attention(model)
    config = json.loads((llama / "config.json").read_text())
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps(config | {"model_type": "mistral", "sliding_window": 8}))

    class Elsewhere:
        root = other

    with pytest.raises(ConfigurationError, match="window"):
        check_attention(Elsewhere())


def test_training_text_that_is_split_otherwise_than_in_training_is_refused(llama, language_text):
    model = open_language(llama)
    manifest = model.artifact.manifest

    def trained(train: int, heldout: int):
        facts = TextFacts(records=60, train=train, heldout=heldout)
        changed = {
            "config": manifest.config | {"data": str(language_text)},
            "details": manifest.details.model_copy(update={"data": facts}),
        }
        return replace(model.artifact, manifest=manifest.model_copy(update=changed))

    assert len(read_text(llama, trained(54, 6), None, 8).heldout) == 6
    with pytest.raises(ConfigurationError, match="no longer splits as it did in training"):
        read_text(llama, trained(50, 5), None, 8)


def test_data_with_images_calls_for_another_text(llama, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps(about(paint(tmp_path / "a.png", (9, 9, 9)), "What?")) + "\n")
    with pytest.raises(ConfigurationError, match=r"the image of line 1, messages\[0\], part 1") as caught:
        read_text(llama, open_language(llama).artifact, str(data), 4)
    assert "--calibration-data" in caught.value.fix


def test_linears_that_read_two_axes_have_one_product_each(language_text, tmp_path):
    """OPT flattens tokens before its MLP, and tracing makes a Gemm of such a linear."""
    base = write_architecture(ARCHITECTURES["opt"], tmp_path / "base")
    small = {"steps": 1, "batch_size": 2, "sequence_length": 32, "rank": 4, "heldout_limit": 2, "warmup_steps": 0}
    few = {"final_merge_batches": 1, "gradient_batches": 1, "model": str(base), "data": str(language_text)}
    model = open_language(finetune(build_config(FinetuneConfig, small | few), tmp_path / "tuned").root)
    graph = decoder_graph(model, dict.fromkeys(model.weights, SCALES), Base.FP32, cache=False)
    products = {layer.name for layer in read_layers(graph.model) if layer.operands[1].weight is not None}
    assert products == model.weights.keys()
    assert len(products) == 12
    assert not any(node.op_type == "Gemm" for node in graph.model.graph)
