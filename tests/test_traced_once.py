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


def _weight(net):
    with torch.no_grad():
        net.blocks[0].mlp.fc1.weight[0, 0] += 1e-6


def _hook(net):
    net.register_forward_hook(lambda *given: None)


def _type(net):
    net.double()


@pytest.mark.parametrize("change", [_scale, _activation, _epsilon, _weight, _hook, _type])
def test_a_net_that_computes_something_else_is_another(net, change):
    other = copy.deepcopy(net)
    assert fingerprint(other, "x") == fingerprint(net, "x")
    assert fingerprint(other, "y") != fingerprint(net, "x")
    change(other)
    assert fingerprint(other, "x") != fingerprint(net, "x")


def test_the_second_trace_is_the_first_one(tmp_path):
    given = (nn.Linear(3, 2), (torch.zeros(2, 3),), ({0: torch.export.Dim("batch")},), "a net", "fix")
    with traced_once(tmp_path):
        models = [trace.export_program(*given) for _ in range(2)]
    assert len(list(tmp_path.iterdir())) == 1
    first, second = (ir.to_proto(model).SerializeToString() for model in models)
    assert first == second
