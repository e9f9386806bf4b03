"""A contender's first run, in a process of its own."""

import time

import pytest
import torch

from transxssm.benchmarking import workers
from transxssm.benchmarking.steps import Entry, Step
from transxssm.benchmarking.workers import Setup, first_run

COMPILATION = 0.2


def slow_at_first(*, device: torch.device) -> Step:
    seconds = [COMPILATION]
    return Step(lambda: time.sleep(seconds.pop() if seconds else 0))


@pytest.mark.parametrize("compiles", [True, False])
def test_a_second_run_is_made_where_the_first_one_compiles(compiles):
    entry = Entry("contender", slow_at_first, (), num_tokens=1, flops=None, compiles=compiles)
    first = first_run(lambda message: None, Setup(torch.device("cpu")), entry)
    assert first.seconds >= COMPILATION
    assert (first.steady_seconds < COMPILATION / 2) == compiles


def test_a_second_run_is_made_on_a_gpu(monkeypatch):
    """Kernels of any contender may be compiled and tuned in the first."""
    entry = Entry("contender", slow_at_first, (), num_tokens=1, flops=None)
    assert workers.first_run_may_compile(entry, torch.device("cuda"))
    monkeypatch.setattr(workers, "first_run_may_compile", lambda entry, device: True)
    first = first_run(lambda message: None, Setup(torch.device("cpu")), entry)
    assert first.steady_seconds < COMPILATION / 2
