"""A contender's first run, in a process of its own."""

import time

import pytest
import torch

from transxssm_lab.benchmarking import workers
from transxssm_lab.benchmarking.steps import Entry, Step
from transxssm_lab.benchmarking.workers import Setup, first_run

COMPILATION = 8.0


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """A clock that only `slow_at_first` moves on."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


@pytest.fixture
def slow_at_first(clock):
    def build(*, device):
        seconds = [COMPILATION]

        def run():
            clock[0] += seconds.pop() if seconds else 1.0

        return Step(run)

    return build


@pytest.mark.parametrize("compiles", [True, False])
def test_a_second_run_is_made_where_the_first_one_compiles(slow_at_first, compiles):
    entry = Entry("contender", slow_at_first, (), num_tokens=1, flops=None, compiles=compiles)
    first = first_run(lambda message: None, Setup(torch.device("cpu")), entry)
    assert (first.seconds, first.steady_seconds) == (COMPILATION, 1.0 if compiles else COMPILATION)


def test_a_second_run_is_made_on_a_gpu(slow_at_first, monkeypatch):
    """Kernels of any contender may be compiled and tuned in the first."""
    entry = Entry("contender", slow_at_first, (), num_tokens=1, flops=None)
    assert workers.first_run_may_compile(entry, torch.device("cuda"))
    monkeypatch.setattr(workers, "first_run_may_compile", lambda entry, device: True)
    assert first_run(lambda message: None, Setup(torch.device("cpu")), entry).steady_seconds == 1.0
