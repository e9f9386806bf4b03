"""An op's table of implementations: what is asked for, what is taken by itself, what is said of it, and what the tables ask of a call."""

import logging
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from transxssm.ops import dispatch, linear, rms_norm, swiglu
from transxssm.ops.csrc import compiled_library
from transxssm.ops.dispatch import (
    Backend,
    Op,
    cpp_refusal,
    eager_cpp_refusal,
    eager_triton_refusal,
    is_plain,
    is_watched,
    triton_refusal,
)

NEEDS_CPP = pytest.mark.skipif(compiled_library() is None, reason="no C++ compiler here")
OP = Op(
    "op",
    (
        Backend(
            "fast",
            lambda call: "fast",
            refusal=lambda call: "too odd" if call.odd else None,
            shortfall=lambda call: "no compiler" if call.bare else None,
        ),
        Backend("plain", lambda call: "plain"),
    ),
)


class Subclass(torch.Tensor):
    """Of a tensor, that may hold its numbers elsewhere."""


def call(odd=False, bare=False):
    return SimpleNamespace(odd=odd, bare=bare)


@pytest.fixture(autouse=True)
def nothing_said_yet():
    dispatch._say_once.cache_clear()


@pytest.mark.parametrize(
    ("requested", "given", "expected"),
    [
        (None, call(), "fast"),
        (None, call(odd=True), "plain"),
        (None, call(bare=True), "plain"),
        ("plain", call(), "plain"),
        ("fast", call(), "fast"),
    ],
)
def test_the_first_that_takes_the_call(requested, given, expected):
    assert OP.choose(requested, given).forward(given) == expected


def test_what_is_asked_for_and_refuses_says_why():
    for given, reason in ((call(odd=True), "too odd"), (call(bare=True), "no compiler")):
        with pytest.raises(ValueError, match=f"op cannot be computed by the backend 'fast': {reason}"):
            OP.choose("fast", given)
    with pytest.raises(ValueError, match="unknown backend 'slow' of op: expected one of fast, plain"):
        OP.choose("slow", call())


def test_what_is_slower_for_want_of_something_is_said_once_where_users_see_it(caplog):
    with caplog.at_level(logging.WARNING, "transxssm"):
        OP.choose(None, call(odd=True))
        assert not caplog.messages, "a call that is none for the fast backend loses nothing"
        for _ in range(3):
            OP.choose(None, call(bare=True))
    (message,) = caplog.messages
    assert "slower than it could: no compiler" in message


def test_a_program_without_a_compiler_says_so_in_one_line(tmp_path):
    """Whatever logging the program has set up, and however many ops would have taken the kernels."""
    code = (
        "import torch; from transxssm.ops import rms_norm, ssd_chunk_scan, swiglu; x = torch.randn(600, 700); rms_norm(x, x[0], 1e-6); "
        "swiglu(x, x); ssd_chunk_scan(torch.ones(1, 2, 1, 2), torch.ones(1, 2, 1), -torch.ones(1), *torch.ones(2, 1, 2, 1, 2))"
    )
    environment = {"PATH": "/nowhere", "HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    lines = [line for line in done.stderr.splitlines() if "slower than it could" in line]
    assert len(lines) == 1
    assert "C++ kernels could not be made" in lines[0]


def test_a_table_explains_itself():
    choice = OP.explain(call(odd=True))
    assert (choice.op, choice.backend) == ("op", "plain")
    assert choice.refusals == {"fast": "too odd", "plain": None}
    assert OP.explain(call(bare=True)).refusals["fast"] == "no compiler"
    assert OP.explain(call()).backend == "fast"


@NEEDS_CPP
class TestCpp:
    def test_plain_tensors_of_the_cpu_are_taken(self):
        for dtype in (torch.float32, torch.bfloat16):
            tensor = torch.zeros(2, dtype=dtype)
            assert eager_cpp_refusal(tensor, torch.nn.Parameter(tensor), None) is None
        assert "float32 and bfloat16" in cpp_refusal(torch.zeros(2, dtype=torch.float64))
        assert cpp_refusal(torch.zeros(2, dtype=torch.float16), dtype=torch.float32) is None

    def test_what_has_no_memory_here_is_not(self):
        tensor = torch.zeros(2)
        assert "CPU" in cpp_refusal(tensor, tensor.to("meta"))
        assert "subclass" in cpp_refusal(tensor.as_subclass(Subclass))

    def test_nobody_who_watches_is_bypassed(self):
        with FlopCounterMode(display=False):
            assert eager_cpp_refusal(torch.zeros(2)) == dispatch.WATCHED


class TestTriton:
    """Of a GPU's kernels; on a CPU Triton's interpreter stands for the GPU."""

    @pytest.fixture(autouse=True)
    def kernels(self, monkeypatch, device):
        monkeypatch.setattr(dispatch, "_TRITON_DEVICE", device.type)

    def test_plain_tensors_of_one_gpu_are_taken(self, device):
        tensor = torch.zeros(2, device=device)
        assert eager_triton_refusal(tensor, None, tensor.bfloat16(), tensor.long()) is None
        assert eager_triton_refusal(torch.nn.Parameter(tensor)) is None
        assert "got torch.float64" in triton_refusal(tensor, tensor.double())
        assert "one CUDA device" in triton_refusal(tensor, torch.zeros(2, device="meta"))
        assert "got Subclass" in triton_refusal(tensor, tensor.as_subclass(Subclass))
        assert triton_refusal(torch.zeros(2, device="meta")) == dispatch.ON_GPU

    def test_the_compiler_can_ask(self, device):
        tensor = torch.zeros(2, device=device)
        compiled = torch.compile(lambda x: x + (eager_triton_refusal(x) is None), fullgraph=True, backend="eager")
        assert [compiled(each).sum() for each in (tensor, tensor.double(), tensor.as_subclass(Subclass))] == [2, 0, 0]

    def test_nobody_who_watches_is_bypassed(self, device):
        answers = []
        torch.vmap(lambda row: answers.append(eager_triton_refusal(row)) or row)(torch.zeros(2, 2, device=device))
        assert answers == [dispatch.WATCHED]


LARGE = 600, 700  # numbers beyond which ops do not leave a call to torch for being small
TRANSFORMS = {
    "grad": lambda f, x: torch.func.grad(lambda x: f(x).square().sum())(x),
    "vmap": lambda f, x: torch.vmap(f)(x.expand(2, *LARGE) * torch.tensor([1.0, -2.0])[:, None, None]),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x.flip(0),))[1],
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize(
    ("op", "expected"),
    [
        (lambda x: rms_norm(x, x[0], 1e-6), lambda x: F.rms_norm(x, (LARGE[1],), x[0], 1e-6)),
        (lambda x: swiglu(x, x.flip(1)), lambda x: F.silu(x) * x.flip(1)),
    ],
    ids=["rms_norm", "swiglu"],
)
def test_function_transforms_see_torchs_operations(op, expected, transform):
    x = torch.randn(LARGE)
    torch.testing.assert_close(transform(op, x), transform(expected, x))


@pytest.mark.parametrize("width", [8, 2048])
def test_a_compiled_graph_serves_every_length(width):
    """No table compares a length that is a symbol: each comparison would be a graph of its own."""
    weight, scale = torch.randn(width, width).bfloat16(), torch.ones(width)
    graphs = []

    def layer(x):
        y = linear(rms_norm(x, scale, 1e-6), weight)
        return swiglu(y, y)

    compiled = torch.compile(
        layer, fullgraph=True, dynamic=True, backend=lambda graph, _: graphs.append(graph) or graph
    )
    for length in (2, 3, 7, 9, 200):
        x = torch.randn(length, width).bfloat16()
        torch.testing.assert_close(compiled(x), layer(x), rtol=0.05, atol=0.05)
    assert len(graphs) == 1


@pytest.mark.parametrize(("variable", "refusal"), [("CPU", cpp_refusal), ("GPU", triton_refusal)])
def test_kernels_can_be_switched_off_without_a_word(variable, refusal, monkeypatch, caplog, device):
    monkeypatch.setenv(f"TRANSXSSM_{variable}_KERNELS", "0")
    monkeypatch.setattr(dispatch, "_TRITON_DEVICE", "cpu")
    dispatch._switches.cache_clear()
    try:
        assert refusal(torch.zeros(2)) == f"TRANSXSSM_{variable}_KERNELS=0 switches them off"
    finally:
        dispatch._switches.cache_clear()


def answers_of(run):
    """What `is_watched` says inside of `run`, which is handed a function of tensors."""
    answers = []

    def asking(tensor):
        answers.append(is_watched())
        return tensor * 2

    run(asking)
    return answers


def counting(asking):
    with FlopCounterMode(display=False):
        asking(torch.ones(2))


def faking(asking):
    with FakeTensorMode():
        asking(torch.ones(2))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "run",
    [
        lambda asking: torch.vmap(asking)(torch.ones(2, 2)),
        lambda asking: torch.func.grad(lambda x: asking(x).sum())(torch.ones(2)),
        lambda asking: torch.func.jvp(asking, (torch.ones(2),), (torch.ones(2),)),
        lambda asking: torch.jit.trace(asking, torch.ones(2), check_trace=False),
        counting,
        faking,
    ],
    ids=["vmap", "grad", "jvp", "trace", "counting", "faking"],
)
def test_what_watches_the_operations_is_noticed(run):
    assert True in answers_of(run)
    assert not is_watched(), "it is over"


def test_autograd_does_not_watch():
    assert answers_of(lambda asking: asking(torch.ones(2, requires_grad=True)).sum().backward()) == [False]


def test_a_subclass_is_not_plain():
    assert is_plain(torch.ones(2))
    assert is_plain(torch.nn.Parameter(torch.ones(2)))
    assert not is_plain(torch.ones(2).as_subclass(Subclass))
