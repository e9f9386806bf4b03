"""An op's table of implementations: what is asked for, what is taken by itself, and what is said of it."""

import warnings
from types import SimpleNamespace

import pytest
import torch

from transxssm.ops import dispatch
from transxssm.ops.dispatch import Backend, accepts_all, choose

FAST = Backend("fast", lambda tensor: "too odd" if tensor.odd else None, lambda: None)
PLAIN = Backend("plain", accepts_all, lambda: None)


def call(odd=False, device="cpu", dtype=torch.float32):
    return SimpleNamespace(odd=odd, device=torch.device(device), dtype=dtype)


@pytest.fixture(autouse=True)
def nothing_said():
    dispatch._say_once.cache_clear()


def test_the_first_that_does_not_refuse():
    assert choose("op", (FAST, PLAIN), None, call()) is FAST
    assert choose("op", (FAST, PLAIN), None, call(odd=True)) is PLAIN
    assert choose("op", (FAST, PLAIN), "plain", call()) is PLAIN


def test_what_is_asked_for_and_refuses_says_why():
    with pytest.raises(ValueError, match="op cannot be computed by the backend 'fast': too odd"):
        choose("op", (FAST, PLAIN), "fast", call(odd=True))
    with pytest.raises(ValueError, match="unknown backend 'slow' of op: expected one of fast, plain"):
        choose("op", (FAST, PLAIN), "slow", call())


def test_a_slower_implementation_on_a_gpu_is_said_once():
    with pytest.warns(
        UserWarning, match="op is slower here than it could be: the backend 'fast' does not take it. too odd"
    ):
        choose("op", (FAST, PLAIN), None, call(odd=True, device="cuda"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        choose("op", (FAST, PLAIN), None, call(odd=True, device="cuda"))
        choose("op", (FAST, PLAIN), None, call(odd=True))


def test_nothing_is_said_of_float64_which_nobody_takes_for_speed():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose("op", (FAST, PLAIN), None, call(odd=True, device="cuda", dtype=torch.float64)) is PLAIN
