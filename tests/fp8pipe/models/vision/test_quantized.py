"""The quantized model: against quantizing by hand, equal bits after a fresh process, damage refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from quantized_families import quantized_family
from safetensors.torch import load_file, save_file
from torch.nn import functional
from vit_families import NAMES, family, random_pixels, vision_family

from fp8pipe.core.errors import BadArtifactError
from fp8pipe.models.vision.prepare import vision_outputs
from fp8pipe.models.vision.quantized import QuantizedVit, load_quantized, save_quantized
from fp8pipe.models.vision.structure import read_structure
from fp8pipe.numerics.kinds import Kind
from fp8pipe.numerics.quantizers import ActivationQuantizer


@pytest.mark.parametrize("name", NAMES)
def test_without_quantizers_it_is_the_model_itself(name):
    vision = vision_family(family(name))
    structure = read_structure(vision.model, vision.architecture.image_size)
    plain = QuantizedVit(vision.model, vision.architecture, vision.preprocessing, structure, {}, {})
    pixels = random_pixels(family(name), 2)
    with torch.no_grad():
        expected, found = vision_outputs(vision.model, pixels), plain(pixels)
    # The explicit formula against torch's fused one: fp32 in another order.
    assert (expected - found).abs().max() <= 1e-5 * expected.abs().max().clamp(min=1)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_saved_and_rebuilt_with_the_same_bits(name, tmp_path):
    quantized = quantized_family(name)
    save_quantized(tmp_path, quantized)
    again = load_quantized(tmp_path)
    pixels = random_pixels(family(name), 2)
    with torch.no_grad():
        assert torch.equal(quantized(pixels), again(pixels))
    assert again.activations == quantized.activations
    for key, weight in quantized.weights.items():
        assert torch.equal(again.weights[key].codes, weight.codes)
        assert torch.equal(again.weights[key].scale, weight.scale)


@pytest.mark.parametrize("kind", Kind)
def test_a_fresh_process_gives_the_same_logits(kind, tmp_path):
    quantized = quantized_family(NAMES[0], kind=kind)
    save_quantized(tmp_path / "model", quantized)
    pixels = random_pixels(family(NAMES[0]), 2)
    save_file({"pixels": pixels}, tmp_path / "pixels.safetensors")
    script = (
        "import sys, torch; from pathlib import Path\n"
        "from safetensors.torch import load_file, save_file\n"
        "from fp8pipe.models.vision.quantized import load_quantized\n"
        "torch.set_num_threads(int(sys.argv[2])); folder = Path(sys.argv[1])\n"
        "with torch.no_grad():\n"
        "    logits = load_quantized(folder / 'model')(load_file(folder / 'pixels.safetensors')['pixels'])\n"
        "save_file({'logits': logits.contiguous()}, folder / 'logits.safetensors')\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path), str(torch.get_num_threads())]
    subprocess.run(command, check=True, cwd=Path(__file__).resolve().parents[4])
    with torch.no_grad():
        assert torch.equal(load_file(tmp_path / "logits.safetensors")["logits"], quantized(pixels))


def test_every_layer_computes_what_quantizing_by_hand_gives():
    quantized = quantized_family(NAMES[0])
    taps = quantized.taps(random_pixels(family(NAMES[0]), 2))
    assert set(taps) == {*quantized.structure.linear_names, *quantized.structure.attention_names}
    for site in quantized.structure.linears:
        layer, tap = quantized.model.get_submodule(site.name), taps[site.name]
        x = quantized.activations[f"{site.input_group}.input"].fake(tap["input"])
        weight = quantized.weights[site.name].dequantize()
        product = functional.linear if site.kind == "linear" else functional.conv2d
        options = {} if site.kind == "linear" else {"stride": layer.stride}
        assert torch.equal(product(x, weight, layer.bias, **options), tap["output"])
    for site in quantized.structure.attentions:
        tap, grids = taps[site.name], quantized.activations
        q, k, v, p = (
            grids[f"{site.name}.{what}"].fake(tap[key])
            for what, key in (("q", "q"), ("k", "k"), ("v", "v"), ("probs", "probs_in"))
        )
        assert torch.equal(q @ k.transpose(-2, -1), tap["logits"])
        assert torch.equal(p @ v, tap["output"])


def test_no_weight_has_more_codes_than_its_bits_allow():
    quantized = quantized_family(NAMES[0], bits=3)
    assert all(len(w.codes.unique()) <= 2**w.bits for w in quantized.weights.values())


def test_names_that_the_model_does_not_have_are_refused():
    vision = vision_family(family(NAMES[0]))
    structure = read_structure(vision.model, vision.architecture.image_size)
    grid = {"blocks.99.attn.q": ActivationQuantizer(1.0)}
    with pytest.raises(ValueError, match=r"blocks\.99\.attn\.q"):
        QuantizedVit(vision.model, vision.architecture, vision.preprocessing, structure, {}, grid)


def _drop_scale(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors.pop(next(name for name in tensors if name.endswith("weight_scale")))
    save_file(tensors, folder / "model.safetensors")


def _negative_scale(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors[next(name for name in tensors if name.endswith("weight_scale"))].neg_()
    save_file(tensors, folder / "model.safetensors")


def _float_weight(folder):
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("weight_scale")).removesuffix("_scale")
    tensors[name] = tensors[name].float()
    save_file(tensors, folder / "model.safetensors")


def _unknown_site(folder):
    document = json.loads((folder / "quantizers.json").read_text())
    document["activations"]["nowhere.q"] = {"scale": 1.0, "low": -8, "high": 7, "kind": "int"}
    (folder / "quantizers.json").write_text(json.dumps(document))


def _unknown_key(folder):
    document = json.loads((folder / "quantizers.json").read_text())
    (folder / "quantizers.json").write_text(json.dumps(document | {"surprise": 1}))


def _cut_short(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize(
    "damage", [_drop_scale, _negative_scale, _float_weight, _unknown_site, _unknown_key, _cut_short]
)
def test_damage_is_named(damage, tmp_path):
    save_quantized(tmp_path, quantized_family(NAMES[0]))
    damage(tmp_path)
    with pytest.raises(BadArtifactError) as caught:
        load_quantized(tmp_path)
    assert caught.value.exit_code == 12
