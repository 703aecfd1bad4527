"""What the run of tests remembers of a traced net is known by everything that tracing sees."""

from __future__ import annotations

import copy

import onnx_ir as ir
import pytest
import torch
from quantized_families import quantized_family
from torch import nn
from traced_once import fingerprint, traced_once

from exporters.graph import trace
from exporters.graph.produce import float_model


@pytest.fixture(scope="module")
def net():
    return float_model(quantized_family("timm-vit"))


def _scale(net):
    net.blocks[1].attn.scale *= 2


def _activation(net):
    net.blocks[0].mlp.act = nn.GELU(approximate="tanh")


def _epsilon(net):
    net.blocks[0].norm1.eps *= 2


def _bias(net):
    with torch.no_grad():
        net.blocks[0].mlp.fc1.bias[0] += 1e-6


def _norm(net):
    with torch.no_grad():
        net.blocks[0].norm1.weight[0] += 1e-6


def _same_weight(net):
    net.blocks[0].mlp.fc1.weight = net.blocks[1].mlp.fc1.weight


def _hook(net):
    net.register_forward_hook(lambda *given: None)


def _type(net):
    net.double()


@pytest.mark.parametrize("change", [_scale, _activation, _epsilon, _bias, _norm, _same_weight, _hook, _type])
def test_a_net_that_computes_something_else_is_another(net, change):
    other = copy.deepcopy(net)
    assert fingerprint(other, "x") == fingerprint(net, "x")
    assert fingerprint(other, "y") != fingerprint(net, "x")
    change(other)
    assert fingerprint(other, "x") != fingerprint(net, "x")


def _trace(net, folder):
    given = (net, (torch.zeros(2, 3),), ({0: torch.export.Dim("batch")},), "a net", "fix")
    with traced_once(folder):
        return ir.to_proto(trace.export_program(*given)).SerializeToString()


def test_the_second_trace_is_the_first_one(tmp_path):
    net = nn.Linear(3, 2)
    assert _trace(net, tmp_path) == _trace(net, tmp_path)
    assert len(list(tmp_path.glob("*.onnx"))) == 1


class _Sum(nn.Module):
    """One linear, and one that the tracer stores as another tensor than its weight."""

    def __init__(self, folded):
        super().__init__()
        self.first, self.second, self.folded = nn.Linear(3, 4), nn.Linear(4, 5), folded

    def forward(self, x):
        y = self.first(x)
        return y @ (self.second.weight * 2).T if self.folded else self.second(y)


@pytest.mark.parametrize(("folded", "traces"), [(False, 1), (True, 2)])
def test_another_net_with_other_weights_has_the_graph_of_its_own_trace(tmp_path, folded, traces):
    one, other = _Sum(folded).eval(), _Sum(folded).eval()
    other.first.bias, other.second.bias = one.first.bias, one.second.bias
    _trace(one, tmp_path)
    (alone := tmp_path / "alone").mkdir()
    assert _trace(other, tmp_path) == _trace(other, alone) != _trace(one, tmp_path)
    assert len(list(tmp_path.glob("*.onnx"))) == traces
