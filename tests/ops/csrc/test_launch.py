"""Kernels read memory: they are for tensors that are what they seem, where nobody watches, and every argument is checked."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from transxssm.ops import linear_cross_entropy, rms_norm, swiglu
from transxssm.ops.csrc import Structure, compiled_library, kernels_of
from transxssm.ops.csrc.launch import Kernels, _structure

pytestmark = pytest.mark.skipif(compiled_library() is None, reason="no C++ compiler here")
LARGE = 600, 700  # beyond what is left to torch for being small


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


@pytest.fixture
def kernels() -> Kernels:
    found = kernels_of(torch.float32)
    assert found is not None
    return found


def rms_norm_arguments(**changes) -> list:
    x = torch.randn(3, 8)
    arguments = {"n": 3, "d": 8, "threads": 1, "eps": 1e-6, "x": x, "weight": torch.ones(8)}
    arguments |= {"y": torch.empty_like(x), "scales": torch.empty(3)}
    return list((arguments | changes).values())


def test_a_call_writes_what_it_is_given(kernels):
    arguments = rms_norm_arguments()
    kernels.run("rms_norm", *arguments)
    x, y = arguments[4], arguments[6]
    torch.testing.assert_close(y, torch.nn.functional.rms_norm(x, (8,), eps=1e-6))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"x": torch.zeros(3, 8, dtype=torch.bfloat16)},
            r"rms_norm \(float32\) takes float32\* on the CPU: got torch.bfloat16",
        ),
        ({"weight": torch.zeros(8, dtype=torch.float64)}, "takes float32.*got torch.float64"),
        ({"y": torch.zeros(3, 8, device="meta")}, "on the CPU: got torch.float32 on meta"),
        ({"x": torch.zeros(8, 3).T}, r"takes contiguous tensors: got strides \(1, 3\)"),
        ({"x": 0}, r"takes a tensor for float32\*: got 0"),
        ({"n": torch.zeros(3)}, "takes int64: got a tensor"),
        ({"n": 3.0}, r"takes \(int64, int64, int64, float32, float32\*"),
        ({"one_more": 1}, "takes 8 arguments .*: got 9"),
    ],
)
def test_arguments_of_another_type_are_refused(kernels, changes, message):
    with pytest.raises(TypeError, match=message):
        kernels.run("rms_norm", *rms_norm_arguments(**changes))


def test_sixty_four_bits_come_back(kernels):
    assert kernels.num_tasks(2**40) == 2**35


def test_fields_are_checked(kernels):
    step = kernels.structure("Step", batch=2**40, dt=torch.zeros(3), D=None)
    assert (step.batch, step.D) == (2**40, None)
    with pytest.raises(TypeError, match="Step has no field 'bach': expected one of batch, heads"):
        step.fill(bach=1)
    with pytest.raises(TypeError, match=r"dt takes float32\* on the CPU: got torch.bfloat16"):
        step.fill(dt=torch.zeros(3, dtype=torch.bfloat16))
    with pytest.raises(TypeError, match="batch takes int64: got a tensor"):
        step.fill(batch=torch.zeros(3))


def test_a_structure_keeps_its_tensors_alive(kernels):
    step = kernels.structure("Step", x=torch.full((1000,), 3.0))
    others = [torch.zeros(1000) for _ in range(100)]  # which would get the memory
    assert step.x not in [each.data_ptr() for each in others]


@pytest.mark.parametrize(
    "fields",
    [
        ["first", "0", "int64", "third", "16", "int64"],
        ["first", "0", "int64", "second", "8", "float32*"],
        ["second", "8", "int64", "first", "0", "float32*", "third", "16", "int64"],
    ],
    ids=["left out", "the last left out", "another order"],
)
def test_a_structure_that_is_described_in_part_is_refused(fields):
    whole = ["first", "0", "int64", "second", "8", "float32*", "third", "16", "int64"]
    assert issubclass(_structure("Example", 24, whole), Structure)
    with pytest.raises(RuntimeError, match="structure Example with other fields than it has"):
        _structure("Example", 24, fields)
