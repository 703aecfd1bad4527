"""The interception gives every attention to a handler and changes nothing else."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from vit_families import FAMILIES, NAMES, Family, build_family, family, random_pixels

from fp8pipe.core.errors import ConfigurationError
from fp8pipe.models.vision.attention import explicit_attention, intercept_attention
from fp8pipe.models.vision.prepare import vision_outputs
from fp8pipe.models.vision.structure import read_structure

FUSED = functional.scaled_dot_product_attention


def explicit(name: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    return explicit_attention(q, k, v, mask, scale)


@torch.no_grad()
def attention_names(model: nn.Module, pixels: Tensor) -> list[str]:
    """The modules that call the fused attention, in the order of their calls; once for each call."""
    everything = {name: module for name, module in model.named_modules() if name}
    found: list[str] = []

    def note(name: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        found.append(name)
        return explicit_attention(q, k, v, mask, scale)

    with intercept_attention(model, everything, note):
        model(pixels)
    return found


class Toy(nn.Module):
    """An attention with options, inside another that has one of its own."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        self.inner = ToyAttention(**options)

    def forward(self, x: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(self.inner(x), x, x)


class ToyAttention(nn.Module):
    def __init__(self, **options: object) -> None:
        super().__init__()
        self.options = options

    def forward(self, x: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(x, x, x, **self.options)


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_formula_in_slow_loops():
    q, k, v, mask = rows(2, 3, 4, 5), rows(2, 3, 6, 5, seed=1), rows(2, 3, 6, 5, seed=2), rows(1, 3, 4, 6, seed=3)
    expected = torch.zeros(2, 3, 4, 5, dtype=torch.float64)
    for b in range(2):
        for h in range(3):
            for i in range(4):
                logits = [0.7 * float(q[b, h, i] @ k[b, h, j]) + float(mask[0, h, i, j]) for j in range(6)]
                weights = [math.exp(x) for x in logits]
                for j in range(6):
                    expected[b, h, i] += weights[j] / sum(weights) * v[b, h, j]
    torch.testing.assert_close(explicit_attention(q, k, v, mask, 0.7), expected, rtol=1e-12, atol=1e-12)


def test_the_scale_is_on_q_before_the_product():
    q, k, v = (rows(1, 2, 5, 4, seed=s).float() for s in range(3))
    seen: list[Tensor] = []
    explicit_attention(q, k, v, None, 0.3, on_logits=lambda x: seen.append(x) or x)
    # Bit for bit: scaling the product instead would round differently.
    assert torch.equal(seen[0], (q * 0.3) @ k.transpose(-2, -1))


def test_hooks_replace_logits_and_probabilities():
    q, k, v = (rows(1, 1, 3, 2, seed=s) for s in range(3))
    uniform = explicit_attention(q, k, v, None, 1.0, on_logits=torch.zeros_like)
    torch.testing.assert_close(uniform, v.mean(dim=2, keepdim=True).expand_as(v))
    nothing = explicit_attention(q, k, v, None, 1.0, on_probs=torch.zeros_like)
    assert not nothing.any()


@pytest.mark.parametrize("one", FAMILIES, ids=NAMES)
def test_the_explicit_formula_gives_the_models_own_output(one: Family):
    model = build_family(one)
    pixels = random_pixels(one, 3)
    names = read_structure(model, one.architecture.image_size).attention_names
    with torch.no_grad():
        own = vision_outputs(model, pixels)
        with intercept_attention(model, names, explicit):
            ours = vision_outputs(model, pixels)
        again = vision_outputs(model, pixels)
    assert own.std() > 0.1  # not a comparison of zeros
    # Two orders of summation in float32: about 1e-7 a layer, a few layers, values near one.
    torch.testing.assert_close(ours, own, rtol=0, atol=1e-5)
    assert torch.equal(again, own)
    assert functional.scaled_dot_product_attention is FUSED


@pytest.mark.parametrize("name", ["timm-vit", "hf-swin"])
def test_gradients_agree_too(name: str):
    model = build_family(family(name))
    sites = attention_names(model, random_pixels(family(name), 1))
    gradients = []
    for names in (sites, []):  # all explicit, all fused
        pixels = random_pixels(family(name), 2).requires_grad_()
        with intercept_attention(model, names, explicit):
            vision_outputs(model, pixels).square().sum().backward()
        gradients.append(pixels.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_names_come_in_the_order_of_the_calls():
    model = build_family(family("timm-swin"))
    pixels = random_pixels(family("timm-swin"), 1)
    blocks = [f"layers.{layer}.blocks.{block}.attn" for layer in range(2) for block in range(2)]
    assert attention_names(model, pixels) == blocks
    assert attention_names(Toy(), torch.ones(1, 1, 2, 2)) == ["inner"]


def test_only_the_named_attentions_are_handed_over():
    model = build_family(family("timm-vit"))
    pixels = random_pixels(family("timm-vit"), 2)
    seen: list[tuple[str, tuple[int, ...], float]] = []

    def note(name: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        seen.append((name, tuple(q.shape), scale))
        return explicit_attention(q, k, v, mask, scale)

    with torch.no_grad(), intercept_attention(model, ["blocks.1.attn"], note):
        vision_outputs(model, pixels)
    assert seen == [("blocks.1.attn", (2, 4, 25, 8), pytest.approx(8**-0.5))]


def test_a_boolean_mask_arrives_in_its_additive_form():
    mask = torch.tensor([[True, False], [True, True]])
    toy = Toy(attn_mask=mask)
    masks: list[Tensor | None] = []
    x = rows(1, 1, 2, 3)

    def note(name: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        masks.append(mask)
        return explicit_attention(q, k, v, mask, scale)

    with intercept_attention(toy, ["inner"], note):
        ours = toy(x)
    assert masks[0] is not None
    assert masks[0].tolist() == [[0.0, -math.inf], [0.0, 0.0]]
    torch.testing.assert_close(ours, toy(x))


@pytest.mark.parametrize(
    ("options", "word"),
    [({"dropout_p": 0.5}, "drops"), ({"is_causal": True}, "causal"), ({"enable_gqa": True}, "share keys")],
)
def test_other_kinds_of_attention_are_refused_by_name(options: dict[str, object], word: str):
    toy = Toy(**options)
    with intercept_attention(toy, ["inner"], explicit), pytest.raises(ConfigurationError, match="inner") as caught:
        toy(torch.ones(1, 1, 2, 2))
    assert word in caught.value.why


def test_everything_is_restored_after_an_error():
    toy = Toy()
    x = rows(1, 1, 2, 2)

    def fail(*_: object) -> Tensor:
        raise KeyError("on purpose")

    with pytest.raises(KeyError, match="on purpose"), intercept_attention(toy, ["inner"], fail):
        toy(x)
    assert functional.scaled_dot_product_attention is FUSED
    assert not toy.inner._forward_hooks
    assert not toy.inner._forward_pre_hooks


def test_a_forward_that_failed_inside_leaves_the_context_usable():
    toy = Toy()
    calls: list[str] = []

    def fail_once(name: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        calls.append(name)
        if len(calls) == 1:
            raise KeyError("on purpose")
        return explicit_attention(q, k, v, mask, scale)

    with intercept_attention(toy, ["inner"], fail_once):
        with pytest.raises(KeyError):
            toy(rows(1, 1, 2, 2))
        toy(rows(1, 1, 2, 2))  # the outer attention must not be taken for the inner one
    assert calls == ["inner", "inner"]


def test_nesting_is_refused_and_harmless():
    toy = Toy()
    with intercept_attention(toy, ["inner"], explicit):
        with pytest.raises(RuntimeError, match="already"), intercept_attention(toy, ["inner"], explicit):
            pass
        assert functional.scaled_dot_product_attention is not FUSED
    assert functional.scaled_dot_product_attention is FUSED


def test_an_unknown_name_is_refused():
    with (
        pytest.raises(ConfigurationError, match="no module elsewhere"),
        intercept_attention(Toy(), ["elsewhere"], explicit),
    ):
        pass
    assert functional.scaled_dot_product_attention is FUSED


def test_inside_bfloat16_autocast():
    one = family("timm-vit")
    model = build_family(one)
    pixels = random_pixels(one, 2)
    names = attention_names(model, pixels)
    with torch.no_grad():
        exact = vision_outputs(model, pixels)
        with torch.autocast("cpu", torch.bfloat16), intercept_attention(model, names, explicit):
            ours = vision_outputs(model, pixels)
    # bfloat16 keeps 8 bits, 4e-3 a rounding; ten roundings on values near one.
    torch.testing.assert_close(ours.float(), exact, rtol=0, atol=0.1)


class Plain(nn.Module):
    """A family's model as one that takes and gives a tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        return vision_outputs(self.model, pixels)


@pytest.mark.parametrize("name", ["timm-swin-wide", "hf-dinov2-registers", "timm-beit"])
def test_torch_export_with_a_dynamic_batch(name: str):
    one = family(name)
    plain = Plain(build_family(one)).eval()
    names = [f"model.{site}" for site in attention_names(plain.model, random_pixels(one, 1))]
    dynamic = ({0: torch.export.Dim("batch", min=1, max=64)},)
    with intercept_attention(plain, names, explicit):
        program = torch.export.export(plain, (random_pixels(one, 2),), dynamic_shapes=dynamic, strict=False)
    operations = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not any("scaled_dot_product" in operation for operation in operations)
    assert any("softmax" in operation for operation in operations)
    pixels = random_pixels(one, 3)
    # The same operations in the same order: equal up to the threading of a product.
    torch.testing.assert_close(program.module()(pixels), plain(pixels), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["timm-vit", "hf-swin"])
def test_onnx_export_with_a_dynamic_batch(name: str):
    ort = pytest.importorskip("onnxruntime")
    one = family(name)
    plain = Plain(build_family(one)).eval()
    names = [f"model.{site}" for site in attention_names(plain.model, random_pixels(one, 1))]
    dynamic = ({0: torch.export.Dim("batch", min=1, max=64)},)
    with intercept_attention(plain, names, explicit):
        program = torch.onnx.export(
            plain, (random_pixels(one, 2),), dynamo=True, dynamic_shapes=dynamic, opset_version=21, verbose=False
        )
    assert program is not None
    session = ort.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    pixels = random_pixels(one, 5)
    (given,) = session.run(None, {session.get_inputs()[0].name: pixels.numpy()})
    # Another implementation of the same float32 operations.
    torch.testing.assert_close(torch.from_numpy(given), plain(pixels), rtol=0, atol=1e-4)
