"""The structure is read off the forward, and what cannot be read is named."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from vit_families import FAMILIES, NAMES, Family, build_family, family

from fp8pipe.core.errors import ConfigurationError
from fp8pipe.models.compat import import_timm, import_transformers
from fp8pipe.models.vision.prepare import prepare_model
from fp8pipe.models.vision.structure import AttentionSite, read_structure


def facts(site: AttentionSite) -> tuple[object, ...]:
    return site.tokens, site.prefix_tokens, site.grid, site.windows, site.queries


@pytest.mark.parametrize("one", FAMILIES, ids=NAMES)
def test_every_family(one: Family):
    model = build_family(one)
    structure = read_structure(model, one.architecture.image_size)
    assert facts(structure.attentions[0]) == one.first
    assert facts(structure.attentions[-1]) == one.last
    assert structure.attentions[-1].pools == (one.last[0] != one.last[-1])
    assert any(site.mask for site in structure.attentions) == one.mask
    assert {site.head_dim for site in structure.attentions} == {8}
    assert structure.heads == one.heads
    assert structure.is_backbone == (one.architecture.classes is None)
    assert structure.classes == (5 if one.heads else None)
    assert len(structure.linears) == one.linears
    assert len(structure.constants) == one.constants
    shared = [site.name for site in structure.linears if site.input_group != site.name]
    assert len(shared) == one.shared
    assert all(name.endswith(("k_proj", "v_proj", "fc1_x")) for name in shared)
    first = structure.linears[0]
    assert (first.name, first.kind) == (structure.patch_embed, "patch")
    assert {site.kind for site in structure.linears[1:]} == {"linear"}
    for site in structure.linears:
        weight = model.get_submodule(site.name).weight
        assert site.shape == tuple(weight.flatten(1).shape)


def test_swin_has_heads_and_windows_of_its_own_in_each_stage():
    structure = read_structure(build_family(family("timm-swin-wide")), (32, 48))
    assert [site.heads for site in structure.attentions] == [2, 2, 4, 4]
    assert [site.windows for site in structure.attentions] == [6, 6, 2, 2]
    assert structure.patch_grid == (8, 12)


def test_the_model_is_left_as_it_was():
    model = build_family(family("timm-beit"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    read_structure(model, (32, 32))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.parameters())


def test_windows_that_are_no_square_are_read_from_the_module():
    arguments = {"embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "window_size": (2, 4), "num_classes": 3}
    model = import_timm().create_model("swin_tiny_patch4_window7_224", img_size=(32, 32), **arguments)
    structure = read_structure(prepare_model(model), (32, 32))
    assert structure.attentions[0].grid == (2, 4)
    assert structure.attentions[0].windows == 8


@pytest.mark.parametrize(
    ("name", "options", "part"),
    [
        ("levit_128s", {}, "stages.0.blocks.0.attn"),  # products of its own
        ("cait_xxs24_224", {"depth": 1}, "blocks.0.attn"),  # heads that talk
        ("swinv2_tiny_window8_256", {"depths": (1, 1, 1, 1), "img_size": 256}, "layers.0.blocks.0.attn"),  # cosines
        ("xcit_nano_12_p16_224", {"depth": 1}, "patch_embed.proj.0.0"),  # a stem of convolutions
        ("vit_tiny_r_s16_p8_224", {"depth": 1}, "patch_embed.backbone"),  # a hybrid
    ],
)
def test_unreadable_models_of_timm_are_named(name: str, options: dict[str, object], part: str):
    model = import_timm().create_model(name, pretrained=False, **options)
    size = int(options.get("img_size", 224))  # type: ignore[call-overload]
    with pytest.raises(ConfigurationError, match=part):
        read_structure(prepare_model(model), (size, size))


def test_swinv2_of_transformers_is_named():
    transformers = import_transformers()
    config = transformers.Swinv2Config(
        embed_dim=16, depths=[1, 1], num_heads=[2, 4], window_size=4, image_size=32, patch_size=4
    )
    with pytest.raises(ConfigurationError, match=r"layers\.0\.blocks\.0\.attention\.self"):
        read_structure(prepare_model(transformers.Swinv2ForImageClassification(config)), (32, 32))


class Made(nn.Module):
    """A transformer of one layer with a fault that can be chosen."""

    def __init__(self, fault: str = "") -> None:
        super().__init__()
        self.fault = fault
        self.patch = nn.Conv2d(3, 8, 4, stride=2 if fault == "overlap" else 4)
        self.attn = MadeAttention(fault)
        self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8)
        if fault == "tied":
            self.down.weight = self.up.weight
        if fault == "computed":
            nn.utils.parametrizations.weight_norm(self.down)
        self.num_classes = 5
        self.head = nn.Linear(8, 3 if fault == "head" else 5)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patch(pixels).flatten(2).transpose(1, 2)
        x = x + self.attn(x)
        x = x + self.down(self.up(x).relu())
        if self.fault == "twice":
            x = x + self.down(x)
        if self.fault == "softmax":
            x = x.softmax(dim=-1)
        if self.fault == "mixes":
            x = x.reshape(1, -1, 8)
            x = self.attn(x).reshape(len(pixels), -1, 8)
        logits = self.head(x.mean(dim=1))
        return functional.pad(logits, (0, 2)) if self.fault == "head" else logits


class MadeAttention(nn.Module):
    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault = fault
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.qkv.weight
        qkv = functional.linear(x, weight, self.qkv.bias) if self.fault == "weight" else self.qkv(x)
        q, k, v = (part.unsqueeze(1) for part in qkv.chunk(3, dim=-1))
        if self.fault == "own":
            return ((q @ k.transpose(-2, -1)).softmax(-1) @ v).squeeze(1)
        if self.fault == "none":
            return v.squeeze(1)
        x = functional.scaled_dot_product_attention(q, k, v)
        if self.fault == "again":
            x = functional.scaled_dot_product_attention(x, k, v)
        return x.squeeze(1)


def test_a_made_model_without_a_fault():
    structure = read_structure(prepare_model(Made()), (8, 12))
    assert [site.name for site in structure.linears] == ["patch", "attn.qkv", "up", "down", "head"]
    assert facts(structure.attentions[0]) == (6, 0, (2, 3), 1, 6)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("overlap", "a convolution beside its patch embedding: patch"),
        ("tied", "the linear down .* shares its weight with up"),
        ("computed", "the linear down .* parametrization"),
        ("twice", "the linear down .* more than once"),
        ("softmax", "the model itself.* a softmax"),
        ("weight", "cannot be quantized: attn\n.* a (matrix|batched) product"),
        ("own", "cannot be quantized: attn\n.* a batched product"),
        ("none", "no attention that can be reached.*suspicious modules: attn"),
        ("again", "the attention attn .* more than one attention"),
        ("mixes", "the attention attn"),
        ("head", "the head of Made was not found"),
    ],
)
def test_faults_name_the_module(fault: str, words: str):
    with pytest.raises(ConfigurationError, match=r"(?s)" + words):
        read_structure(prepare_model(Made(fault)), (8, 8))


def test_image_sizes_that_do_not_fit():
    with pytest.raises(ConfigurationError, match="does not run on images of 30x30"):
        read_structure(build_family(family("timm-vit")), (30, 30))
    # Here the model itself would run, without the last rows.
    with pytest.raises(ConfigurationError, match="would not see all of an image of 30x30"):
        read_structure(build_family(family("hf-dinov2")), (30, 30))


def test_layers_that_run_for_nothing_are_left_out():
    model = build_family(family("hf-siglip"))
    structure = read_structure(model, (32, 32))
    assert hasattr(model.vision_model.head, "attention")  # it is there and runs
    assert not any(".head." in name for name in (*structure.attention_names, *structure.linear_names))


@pytest.mark.parametrize("size", [(33, 48), (30, 32), (4, 4), (1, 1)])
@pytest.mark.parametrize("name", ["hf-dinov2", "hf-vit", "hf-beit", "timm-vit"])
def test_sides_that_are_no_multiple_of_the_patch_are_refused(name: str, size: tuple[int, int]):
    with pytest.raises(ConfigurationError) as caught:
        read_structure(build_family(family(name)), size)
    assert f"{size[0]}x{size[1]}" in caught.value.what
    assert "a multiple of the patch of 8x8" in caught.value.fix
    assert caught.value.why


def test_what_only_the_number_of_images_decides_is_no_constant():
    """A learned query is laid out for each image: its linear is quantized. Position biases are made once."""
    model = build_family(family("timm-siglip"))
    structure = read_structure(model, (48, 32))
    assert "attn_pool.q" in structure.linear_names
    assert structure.constants == structure.notes == ()
    relative = read_structure(build_family(family("timm-relpos-shared")), (32, 32))
    assert relative.constants == ("shared_rel_pos.mlp.fc1", "shared_rel_pos.mlp.fc2")
    assert "2 linears stay float" in relative.notes[0]
