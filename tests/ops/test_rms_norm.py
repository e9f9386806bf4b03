"""The normalisation equals its formula, gradients included, in blocks of tokens and in torch's own form alike."""

import pytest
import torch

from tests.tolerances import assert_close
from transxssm.ops import rms_norm

pytestmark = pytest.mark.usefixtures("with_and_without_kernels")

EPS = 1e-6
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)


def formula(x, weight):
    x, weight = x.double(), weight.double()
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight


def inputs(*shape, dtype=torch.float64, device=None):
    x = 3 * torch.randn(*shape, dtype=torch.float64) + 1
    weight = 1 + 0.3 * torch.randn(shape[-1], dtype=torch.float64)
    return x.to(device, dtype), weight.to(device, dtype)


def result_and_gradients(function, x, weight):
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y = function(x, weight)
    incoming = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(y.device, y.dtype)
    return y.detach(), *torch.autograd.grad(y, (x, weight), incoming)


def assert_equals_formula(x, weight):
    actual = result_and_gradients(lambda x, weight: rms_norm(x, weight, EPS), x, weight)
    expected = result_and_gradients(formula, x.double(), weight.double())
    for name, one, other in zip(("y", "gradient of x", "gradient of weight"), actual, expected, strict=True):
        assert one.dtype == x.dtype, name
        assert_close(one, other, x.dtype, name)


@DTYPES
@pytest.mark.parametrize("shape", [(1, 2), (1, 6), (97, 6), (2, 3, 5, 64)], ids=str)
def test_equals_the_formula(shape, dtype, device):
    assert_equals_formula(*inputs(*shape, dtype=dtype, device=device))


@pytest.mark.parametrize("elements", [1, 30, 31, 60, 10_000])
def test_any_block(elements, device, monkeypatch):
    monkeypatch.setattr("transxssm.ops.devices.ELEMENTS_PER_BLOCK", elements)
    assert_equals_formula(*inputs(17, 30, device=device))


@DTYPES
@pytest.mark.parametrize("num_tokens", [1, 4, 3000])
def test_without_gradients_it_is_the_same(num_tokens, dtype, device):
    """One token takes torch's own operator, many take the blocks."""
    x, weight = inputs(num_tokens, 128, dtype=dtype, device=device)
    assert_close(rms_norm(x, weight, EPS), formula(x, weight), dtype)


def test_strided_inputs(device):
    x, weight = inputs(5, 4, 12, device=device)
    view = x.transpose(0, 1)
    assert_equals_formula(view, weight)


def test_a_row_of_zeros_stays_finite(device):
    x = torch.zeros(3, 8, dtype=torch.float32, device=device)
    for tensor in result_and_gradients(lambda x, weight: rms_norm(x, weight, EPS), x, torch.ones(8, device=device)):
        assert tensor.isfinite().all()


def test_keeps_its_input_and_one_number_a_token():
    """What lies between the forward and the backward pass, beside the input and the result, is small."""
    x, weight = inputs(64, 32, dtype=torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        x.requires_grad_()
        rms_norm(x, weight.requires_grad_(), EPS)
    others = [tensor for tensor in kept if tensor.data_ptr() not in (x.data_ptr(), weight.data_ptr())]
    assert [tensor.numel() for tensor in others] == [64]


def test_a_weight_of_another_width_is_refused():
    with pytest.raises(ValueError, match=r"\(8,\), as wide as x: got \(4,\)"):
        rms_norm(torch.ones(2, 8), torch.ones(4), EPS)
