"""Settings of transformers in stored configurations: those that fetch or run something are refused by name."""

from __future__ import annotations

import dataclasses
import json

import pytest
from pydantic import ValidationError
from vit_families import FAMILIES

from fp8pipe.core.errors import BadArtifactError, ConfigurationError
from fp8pipe.models.settings import check_config, foreign_arguments
from fp8pipe.models.vision.architecture import Architecture

SETTINGS = [
    {"attn_implementation": "someone/kernel"},
    {"_attn_implementation": "paged|someone/kernel@main"},
    {"_attn_implementation_internal": "kernels-community/flash-attn2"},
    {"attn_implementation": {"": "someone/kernel"}},
    {"experts_implementation": "someone/kernel"},
    {"use_kernels": True},
    {"kernel_config": {"RMSNorm": "someone/kernel"}},
    {"dtype": "load"},
    {"torch_dtype": "float7"},
]


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: next(iter(setting)))
def test_a_configuration_that_chooses_code_is_refused_by_name(tmp_path, setting, nested):
    config = {"model_type": "llama", **({"text_config": setting} if nested else setting)}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigurationError, match="may not have") as caught:
        check_config(tmp_path)
    assert next(iter(setting)) in caught.value.why
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(BadArtifactError, match="may not have"):
        check_config(tmp_path)


@pytest.mark.parametrize("value", [None, "eager", "sdpa"])
def test_what_transformers_has_itself_is_right(tmp_path, value):
    config = {
        "attn_implementation": value,
        "dtype": "bfloat16",
        "layers": [{"torch_dtype": None}],
        "use_kernels": False,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    check_config(tmp_path)


def vision(**arguments):
    return Architecture(
        library="transformers", name=arguments.pop("name", "ViTModel"), arguments=arguments, image_size=(32, 32),
        head="features",
    )  # fmt: skip


@pytest.mark.parametrize(
    "arguments",
    [
        *SETTINGS,
        {"auto_map": {"AutoModel": "code.Model"}},
        {"trust_remote_code": True},
        {"quantization_config": {"quant_method": "fp8"}},
        {"hidden_act": "someone/activation"},
        {"hidden_size": {"a": 1}},
        {"unknown": 1},
        {"name": "DPTForDepthEstimation", "backbone": "someone/model", "use_pretrained_backbone": True},
        {"name": "TimmWrapperModel", "architecture": "hf-hub:someone/model"},
        {"name": "TimmWrapperModel", "model_args": {"checkpoint_path": "weights.pt"}},
        {"name": "CLIPVisionModelWithProjection", "patch_size": "a/b"},
        {"name": "CLIPForImageClassification", "vision_config": {"attn_implementation": "someone/kernel"}},
    ],
    ids=str,
)
def test_a_stored_vision_model_gives_shapes_and_parts_alone(arguments):
    name = next(key for key in arguments if key != "name")
    with pytest.raises(ValidationError, match=name):
        vision(**arguments)


def test_what_checkpoints_of_every_family_hold_is_right():
    """The whole configuration of a built model, as it is stored beside its weights."""
    from fp8pipe.models.compat import import_transformers
    from fp8pipe.models.vision.libraries import _declared

    library = import_transformers()
    for family in FAMILIES:
        stored = family.architecture
        if stored.library == "transformers":
            cls = getattr(library, stored.name).config_class
            whole = _declared(cls, cls.from_dict(dict(stored.arguments)).to_dict())
            again = Architecture.model_validate(stored.model_dump() | {"arguments": json.loads(json.dumps(whole))})
            assert cls.from_dict(dict(again.arguments)).to_dict() == cls.from_dict(dict(stored.arguments)).to_dict()


def test_a_class_may_declare_another_model_and_no_stored_configuration_may_name_one():
    config = dataclasses.make_dataclass("Config", [("backbone", str, None), ("use_timm_backbone", bool, False)])
    config.sub_configs = {}
    assert list(foreign_arguments(config, {"backbone": "someone/model", "use_timm_backbone": False})) == [
        "backbone is given"
    ]
