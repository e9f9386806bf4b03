"""Kernels read memory: they are for tensors that are what they seem, where nobody watches."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from transxssm.ops import linear_cross_entropy, rms_norm, swiglu
from transxssm.ops.csrc import kernels_for
from transxssm.ops.csrc.build import compiled_library

pytestmark = pytest.mark.skipif(compiled_library() is None, reason="no C++ compiler here")
LARGE = 600, 700  # beyond what is left to torch for being small


class Subclass(torch.Tensor):
    """Of a tensor, that may hold its numbers elsewhere."""


def test_plain_tensors_of_the_cpu_have_kernels():
    for dtype in (torch.float32, torch.bfloat16):
        tensor = torch.zeros(2, dtype=dtype)
        assert kernels_for(tensor, torch.nn.Parameter(tensor), None) is not None
    assert kernels_for(torch.zeros(2, dtype=torch.float64)) is None


def test_what_has_no_memory_here_has_none():
    tensor = torch.zeros(2)
    assert kernels_for(tensor, tensor.to("meta")) is None
    assert kernels_for(tensor.as_subclass(Subclass)) is None


def test_nobody_who_watches_is_bypassed():
    tensor = torch.zeros(2)
    with FlopCounterMode(display=False):
        assert kernels_for(tensor) is None
    with forward_ad.dual_level():
        assert kernels_for(tensor) is None


def test_fake_tensors_keep_their_shapes():
    with FakeTensorMode():
        gate = torch.empty(LARGE)
        assert swiglu(gate, gate).shape == LARGE
        assert rms_norm(gate, torch.empty(LARGE[1]), 1e-6).shape == LARGE


@pytest.mark.parametrize("trace", [lambda f, x: torch.jit.trace(f, x), lambda f, x: make_fx(f)(x)], ids=["jit", "fx"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_trace_holds_the_operations(trace):
    def function(x):
        return swiglu(x, x)

    traced = trace(function, torch.randn(LARGE))
    x = torch.randn(LARGE)
    torch.testing.assert_close(traced(x), function(x))


def test_mixed_formats_are_left_to_torch():
    gate = torch.randn(LARGE)
    up = torch.randn(LARGE).bfloat16()
    torch.testing.assert_close(swiglu(gate, up), torch.nn.functional.silu(gate) * up)


def test_any_integer_can_be_the_ignored_label():
    hidden, weight, labels = torch.randn(6, 5), torch.randn(11, 5), torch.tensor([1, 2, 3, 4, 5, -100])
    ignored = torch.tensor(-100).numpy()[()]  # numpy's
    loss = linear_cross_entropy(hidden, weight, labels)
    assert linear_cross_entropy(hidden, weight, labels, ignore_index=ignored) == loss
