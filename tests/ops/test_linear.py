"""The product equals x · weightᵀ on CPUs with and without half-precision products, gradients included."""

import sys

import pytest
import torch
import torch.nn.functional as F

from tests.tolerances import assert_close
from transxssm.ops import linear


@pytest.fixture(params=[True, False], ids=["products in hardware", "no products in hardware"])
def fast_products(request, monkeypatch):
    # By its path: the attribute `linear` of `transxssm.ops` is the function.
    monkeypatch.setattr(sys.modules["transxssm.ops.linear"], "has_fast_products", lambda *_: request.param)
    return request.param


def result_and_gradients(function, x, weight):
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y = function(x, weight)
    incoming = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(y.dtype)
    return y.detach(), *torch.autograd.grad(y, (x, weight), incoming)


def assert_equals_the_product(x, weight):
    actual = result_and_gradients(linear, x, weight)
    expected = result_and_gradients(F.linear, x.double(), weight.double())
    for name, one, other in zip(("y", "gradient of x", "gradient of weight"), actual, expected, strict=True):
        assert one.dtype == x.dtype, name
        assert_close(one, other, x.dtype, name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 6), (7, 6), (8, 6), (2, 300, 6), (1025, 6)], ids=str)
def test_equals_the_product(shape, dtype, fast_products):
    x, weight = torch.randn(*shape, dtype=torch.float64), torch.randn(5, 6, dtype=torch.float64)
    assert_equals_the_product(x.to(dtype), weight.to(dtype))


def test_sums_are_not_rounded_in_between(fast_products):
    """A weight's gradient over 4096 tokens keeps what sums in bfloat16 would lose."""
    x, weight = torch.ones(4096, 2).bfloat16(), torch.ones(3, 2).bfloat16()
    x.requires_grad_(), weight.requires_grad_()
    linear(x, weight).sum().backward()
    assert (weight.grad == 4096).all()


def test_only_what_is_asked_for_gets_a_gradient(fast_products):
    x, weight = torch.randn(16, 6).bfloat16(), torch.randn(5, 6).bfloat16()
    for frozen, trained in ((x, weight), (weight, x)):
        frozen.requires_grad_(False)
        trained.requires_grad_(True)
        linear(x, weight).sum().backward()
        assert frozen.grad is None
        assert trained.grad.isfinite().all()
        trained.grad = None


def test_autocast_chooses_the_type(fast_products):
    x, weight = torch.randn(16, 6, dtype=torch.float64).float(), torch.randn(5, 6, dtype=torch.float64).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual, gradient_x, gradient_weight = result_and_gradients(linear, x, weight)
    assert (actual.dtype, gradient_x.dtype, gradient_weight.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    assert_close(actual, F.linear(x, weight), torch.bfloat16)


def test_a_strided_input_and_an_empty_one(fast_products):
    weight = torch.randn(5, 6).bfloat16()
    assert linear(torch.randn(0, 6).bfloat16(), weight).shape == (0, 5)
    assert_equals_the_product(torch.randn(6, 12, 40).bfloat16().transpose(0, 2), weight)


@pytest.mark.parametrize("shape", [(1, 64), (1, 1, 37), (2, 2, 300), (4, 5), (5, 64)], ids=str)
@pytest.mark.usefixtures("with_and_without_kernels")
def test_few_tokens_without_gradients(shape):
    """A decoding step: sums in float32, rounded once."""
    x, weight = torch.randn(shape).bfloat16(), torch.randn(19, shape[-1]).bfloat16()
    for given in (x, x.mT.contiguous().mT):
        assert_close(linear(given, weight), F.linear(x.double(), weight.double()), torch.bfloat16)
    ones = torch.ones(1, 4096).bfloat16()
    assert linear(ones, ones) == 4096


def test_few_tokens_take_the_kernel_where_it_is_of_use(monkeypatch):
    module, taken = sys.modules["transxssm.ops.linear"], []
    kernels_of = module.kernels_of
    monkeypatch.setattr(module, "kernels_of", lambda dtype: taken.append(dtype) or kernels_of(dtype))
    x, weight = torch.randn(2, 8).bfloat16(), torch.nn.Parameter(torch.randn(5, 8).bfloat16())
    with torch.no_grad():
        linear(x, weight)
        assert len(taken) == 1
        linear(x.float(), weight.float())
        linear(x.expand(3, 2, 8), weight)
        linear(x, weight.detach().T.contiguous().T)
        with torch.autocast("cpu", torch.bfloat16):
            linear(x, weight)
    linear(x, weight).sum().backward()
    assert len(taken) == 1
    assert weight.grad is not None
