"""What is no plain vision transformer is refused for that, before anything else about it is asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from vision_checkpoints import save_model, save_timm, save_transformers

from fp8pipe.core.errors import ConfigurationError
from fp8pipe.models.vision.sources import load_vision_model

_DEEP = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_labels": 3}
_STAGES = {
    "hidden_sizes": [8, 16, 16, 16],
    "depths": [1, 1, 1, 1],
    "num_attention_heads": [1, 1, 2, 2],
    "num_labels": 3,
}
OTHERS: list[tuple[str, dict[str, Any]]] = [
    ("ResNetForImageClassification", _DEEP | {"embedding_size": 8}),
    ("ConvNextForImageClassification", _DEEP | {"num_stages": 2}),
    ("PvtForImageClassification", _STAGES | {"image_size": 64}),
    ("PvtV2ForImageClassification", _STAGES),
    ("SegformerForImageClassification", _STAGES),
    ("HieraForImageClassification", {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "image_size": [64, 64],
                                     "query_stride": [2, 2], "num_query_pool": 1, "num_labels": 3}),
]  # fmt: skip


@pytest.mark.parametrize(("cls", "arguments"), OTHERS)
def test_other_kinds_of_models(cls: str, arguments: dict[str, Any], tmp_path: Path):
    save_model(tmp_path, cls, arguments)
    with pytest.raises(ConfigurationError, match="is not a plain vision transformer") as caught:
        load_vision_model(str(tmp_path))
    assert "Conv2d" in caught.value.why
    assert "DeiT" in caught.value.fix


def test_models_without_patches(tmp_path: Path):
    text = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "vocab_size": 9,
    }
    save_model(tmp_path, "BertModel", text)
    with pytest.raises(ConfigurationError, match="is not a plain vision transformer") as caught:
        load_vision_model(str(tmp_path))
    assert "into patches" in caught.value.why


@pytest.mark.parametrize("size", [None, (64, 64)])
def test_other_kinds_of_timm(size, tmp_path: Path):
    save_timm(tmp_path / "timm", model="test_convnext", drop_rate=0.1)
    with pytest.raises(ConfigurationError, match="is not a plain vision transformer"):
        load_vision_model(str(tmp_path / "timm"), size)


def test_images_of_one_channel(tmp_path: Path):
    save_transformers(tmp_path / "hf", "hf-deit", num_channels=1)
    save_timm(tmp_path / "timm", img_size=64, in_chans=1)
    for name in ("hf", "timm"):
        with pytest.raises(ConfigurationError, match="only three are supported") as caught:
            load_vision_model(str(tmp_path / name))
        assert "RGB" in caught.value.why
