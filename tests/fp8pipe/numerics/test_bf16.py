"""bf16 products in fp32: the definition of a bf16 product, whatever the processor has.

Run in a process of its own, since the kernels are replaced for good.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import torch
from torch.nn import functional
from fp8pipe.numerics.bf16 import widen_bf16_products

torch.manual_seed(0)

def draw(*shape):
    # Whole numbers up to 8: every sum below is exact in fp32, in any order, so only the last rounding remains.
    return torch.randint(-8, 9, shape).bfloat16()

a, b, c = draw(5, 7), draw(7, 6), draw(5, 6)
x, y, z = draw(3, 5, 7), draw(3, 7, 6), draw(3, 5, 6)
image, kernel, bias = draw(2, 3, 8, 8), draw(4, 3, 4, 4), draw(4)
q = draw(1, 2, 4, 8)

def gradients(image, kernel, bias):
    leaves = [t.clone().requires_grad_() for t in (image, kernel, bias)]
    out = functional.conv2d(*leaves, stride=4)
    return torch.autograd.grad(out, leaves, out.detach())

cases = {
    "mm": lambda f: f(a) @ f(b),
    "addmm": lambda f: torch.addmm(f(c), f(a), f(b), beta=2, alpha=0.5),
    "linear": lambda f: functional.linear(f(x), f(b).T, f(c)[0]),
    "bmm": lambda f: torch.bmm(f(x), f(y)),
    "baddbmm": lambda f: torch.baddbmm(f(z), f(x), f(y)),
    "mv": lambda f: f(a) @ f(b)[:, 0],
    "addmv": lambda f: torch.addmv(f(c)[:, 0], f(a), f(b)[:, 0]),
    "conv2d": lambda f: functional.conv2d(f(image), f(kernel), f(bias), stride=4),
    **{f"conv2d gradient {i}": lambda f, i=i: gradients(f(image), f(kernel), f(bias))[i] for i in range(3)},
}
before = {name: case(lambda t: t.double()) for name, case in cases.items()}
assert widen_bf16_products(force=True) and widen_bf16_products()
for name, case in cases.items():
    found = case(lambda t: t)
    assert found.dtype is torch.bfloat16, name
    # conv2d's gradients are products of rounded outputs, so the reference takes the same ones.
    if name.startswith("conv2d gradient"):
        rounded = functional.conv2d(image.double(), kernel.double(), bias.double(), stride=4).bfloat16().double()
        leaves = [t.double().requires_grad_() for t in (image, kernel, bias)]
        out = functional.conv2d(*leaves, stride=4)
        expected = torch.autograd.grad(out, leaves, rounded)[int(name[-1])].bfloat16()
    else:
        expected = before[name].bfloat16()
    assert torch.equal(found, expected), (name, found, expected)
    assert torch.equal(case(lambda t: t.double()), before[name]), name  # other types are left alone
random = torch.randn(64, 512).bfloat16(), torch.randn(512, 64).bfloat16()
exact = (random[0].double() @ random[1].double())
# Sums of 512 products in fp32: within 512 * 2^-24 of the sum of magnitudes, then one rounding to 8 bits.
bound = exact.abs() * 2**-8 + 512 * 2**-24 * (random[0].double().abs() @ random[1].double().abs())
assert bool(((random[0] @ random[1]).double() - exact).abs().le(bound).all())
print("held")
"""


def test_widened_products_are_the_exact_ones_rounded_once():
    ended = subprocess.run([sys.executable, "-P", "-c", PROGRAM], capture_output=True, text=True)
    assert ended.stdout == "held\n", ended.stderr
    assert "overrid" not in ended.stderr


def test_processors_with_bf16_arithmetic_are_left_alone(monkeypatch: pytest.MonkeyPatch):
    from fp8pipe.numerics import bf16

    monkeypatch.setattr(bf16, "has_fast_bf16", lambda: True)
    monkeypatch.setattr(bf16, "_library", None)
    assert not bf16.widen_bf16_products()
