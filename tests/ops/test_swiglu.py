"""The gate equals silu(gate) · up, gradients included, and keeps nothing but its inputs."""

import sys

import pytest
import torch
import torch.nn.functional as F

from tests.tolerances import assert_close
from transxssm.ops import swiglu

pytestmark = pytest.mark.usefixtures("with_and_without_kernels")

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)


def formula(gate, up):
    return F.silu(gate) * up


def result_and_gradients(function, gate, up):
    gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
    y = function(gate, up)
    incoming = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(y.device, y.dtype)
    return y.detach(), *torch.autograd.grad(y, (gate, up), incoming)


def assert_equals_formula(gate, up):
    actual = result_and_gradients(swiglu, gate, up)
    expected = result_and_gradients(formula, gate.double(), up.double())
    for name, one, other in zip(("y", "gradient of gate", "gradient of up"), actual, expected, strict=True):
        assert one.dtype == gate.dtype, name
        assert_close(one, other, gate.dtype, name)


def inputs(*shape, dtype=torch.float64, device=None):
    return (2 * torch.randn(2, *shape, dtype=torch.float64)).to(device, dtype).unbind(0)


@DTYPES
@pytest.mark.parametrize("shape", [(1,), (1, 7), (97, 6), (2, 3, 40)], ids=str)
def test_equals_the_formula(shape, dtype, device):
    assert_equals_formula(*inputs(*shape, dtype=dtype, device=device))


@pytest.mark.parametrize("elements", [1, 30, 31, 60, 10_000])
def test_any_block(elements, device, monkeypatch):
    # By their paths: the attribute `swiglu` of `transxssm.ops` is the function.
    for module in ("transxssm.ops.devices", "transxssm.ops.swiglu"):
        monkeypatch.setattr(sys.modules[module], "ELEMENTS_PER_BLOCK", elements)
    assert_equals_formula(*inputs(17, 30, device=device))


@DTYPES
@pytest.mark.parametrize("num_tokens", [1, 3000])
def test_without_gradients_it_is_the_same(num_tokens, dtype, device):
    gate, up = inputs(num_tokens, 128, dtype=dtype, device=device)
    assert_close(swiglu(gate, up), formula(gate.double(), up.double()), dtype)


def test_strided_inputs(device):
    """The two halves of one wide projection, with tokens before rows."""
    gate, up = (half.transpose(0, 1) for half in torch.randn(5, 4, 24, dtype=torch.float64).to(device).chunk(2, dim=-1))
    assert_equals_formula(gate, up)


def test_keeps_its_two_inputs():
    gate, up = (tensor.requires_grad_() for tensor in inputs(64, 32, dtype=torch.float32))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        swiglu(gate, up)
    assert [tensor.data_ptr() for tensor in kept] == [gate.data_ptr(), up.data_ptr()]


def test_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match=r"one shape: got \(2, 8\) and \(2, 4\)"):
        swiglu(torch.ones(2, 8), torch.ones(2, 4))
