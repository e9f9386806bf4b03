"""Whoever would not see a kernel is noticed."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from transxssm.ops.watched import is_plain, is_watched


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
def test_who_looks_on(run):
    assert True in answers_of(run)
    assert not is_watched(), "it is over"


def test_autograd_does_not():
    assert answers_of(lambda asking: asking(torch.ones(2, requires_grad=True)).sum().backward()) == [False]


def test_a_subclass_is_not_plain():
    class Subclass(torch.Tensor):
        pass

    assert is_plain(torch.ones(2))
    assert is_plain(torch.nn.Parameter(torch.ones(2)))
    assert not is_plain(torch.ones(2).as_subclass(Subclass))
