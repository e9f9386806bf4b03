"""Groups of contenders: turns, limits, interruptions."""

import time
from unittest import mock

import pytest
import torch

from transxssm_lab.benchmarking import comparison
from transxssm_lab.benchmarking.comparison import Comparison, Group, Limits
from transxssm_lab.benchmarking.processes import OutOfMemory
from transxssm_lab.benchmarking.steps import Entry, Step
from transxssm_lab.benchmarking.workers import FirstRun, Setup

SETUP = Setup(torch.device("cpu"), 1)
PLENTY = 4 * 10**9


class Clock:
    """A clock that only the steps move on."""

    now = 1000.0

    def build(self, seconds, *, device):
        def run():
            self.now += seconds

        return Step(run)


@pytest.fixture
def clock(monkeypatch):
    """Makes children run in this process, on a clock of their own, so that no figure depends on the machine."""
    clock = Clock()

    def run_here(function, *arguments, memory_limit, deadline, on_message=lambda message: None):
        return function(on_message, *arguments)

    monkeypatch.setattr(comparison, "run_in_child", run_here)
    for name in ("monotonic", "perf_counter"):
        monkeypatch.setattr(time, name, lambda: clock.now)
    return clock


def build_nothing(*, device):
    return Step(lambda: None)


def build_large(num_bytes, *, device):
    return Step(lambda: torch.ones(num_bytes // 4))


def build_broken(*, device):
    raise KeyError("no such layer")


def entry(name, build, *arguments):
    return Entry(name, build, arguments, num_tokens=10, flops=100.0)


def measured(groups, *, repeats=3, seconds=3600.0, memory=PLENTY):
    runner = Comparison(SETUP, Limits(repeats, time.monotonic() + seconds, memory))
    cells = []
    for group in groups:
        runner.measure(group, cells.extend)
    assert runner.num_done == sum(group.num_parts for group in groups)
    return cells


def test_ratios_are_taken_turn_by_turn(clock):
    entries = (entry("slow", clock.build, 0.75), entry("fast", clock.build, 0.25))
    slow, fast = measured([Group("sleep", 1, entries, "fast")])
    assert (slow.status, fast.status) == ("ok", "ok")
    assert (slow.repeat_seconds, fast.repeat_seconds) == ([0.75] * 3, [0.25] * 3)
    assert (slow.repeat_ratios, fast.repeat_ratios) == ([3] * 3, [1] * 3)
    told = slow.to_dict(peak_flops_per_second=1000.0)
    assert told["ratio_to_reference"] == {"min": 3, "median": 3, "max": 3}
    assert told["seconds"]["median"] == 0.75
    assert told["tokens_per_second"] == 10 / 0.75
    assert told["times_floor"] == 0.75 / 0.1


def test_memory_is_that_of_the_step():
    (cell,) = measured([Group("ones", 1, (entry("large", build_large, 400_000_000),), "large")])
    assert cell.first.step_bytes == pytest.approx(400_000_000, rel=0.1)
    assert cell.first.peak_bytes == pytest.approx(400_000_000, rel=0.1)


def test_what_does_not_fit_or_work_is_recorded_and_the_rest_is_measured():
    entries = (
        entry("large", build_large, 3 * 10**9),
        entry("broken", build_broken),
        entry("fine", build_nothing),
    )
    cells = measured([Group("x", length, entries, "large") for length in (1, 2)], memory=10**9)
    assert [cell.status for cell in cells] == 2 * ["out of memory", "failed", "ok"]
    assert cells[1].detail == "KeyError: 'no such layer'"
    assert cells[2].repeat_ratios == []  # the reference is not there
    assert cells[3].detail == "at 1 tokens already"  # and is not tried again at a greater length


def test_what_fits_alone_but_not_with_the_others_is_out_of_memory():
    first = FirstRun(build_seconds=0.0, seconds=0.0, steady_seconds=0.0, peak_bytes=1, step_bytes=1)
    outcomes = iter([first, first, OutOfMemory("was killed by the system")])

    def run(*arguments, **options):
        if isinstance(outcome := next(outcomes), Exception):
            raise outcome
        return outcome

    entries = (entry("a", build_nothing), entry("b", build_nothing))
    with mock.patch.object(comparison, "run_in_child", run):
        cells = measured([Group("x", 1, entries, "a")])
    assert {cell.status for cell in cells} == {"out of memory"}
    assert cells[0].detail == "in turn with the others: was killed by the system"
    assert cells[0].first is first


def test_what_the_budget_does_not_allow_is_out_of_time(clock):
    slow = Group("sleep", 1, (entry("slow", clock.build, 1.0),), "slow")
    cells = measured([slow, Group("sleep", 2, slow.entries, "slow")], seconds=3.5)
    assert [cell.status for cell in cells] == ["out of time"] * 2
    assert cells[0].detail == "3 repeats need about 4 s, 2 s were left"
    assert cells[0].first.seconds == 1.0
    assert measured([slow], seconds=0.0)[0].detail == "the time budget ended before"


@pytest.mark.parametrize(("seconds", "repeats"), [(1.25, 3), (2.75, 9), (100.0, 50)])
def test_repeats_give_way_to_the_budget_down_to_three(clock, seconds, repeats):
    """A first run, a warm-up, and turns of a quarter of a second each."""
    (cell,) = measured([Group("sleep", 1, (entry("slow", clock.build, 0.25),), "slow")], repeats=50, seconds=seconds)
    assert (cell.status, len(cell.repeat_seconds)) == ("ok", repeats)


def test_an_interruption_keeps_whole_turns(clock):
    entries = (entry("a", clock.build, 0.25), entry("b", clock.build, 0.25))
    runner = Comparison(SETUP, Limits(5, clock.now + 60, PLENTY))
    record, kept = runner._record, []

    def stop_at_the_third(cells, seconds):
        if len(cells[0].repeat_seconds) == 2:
            raise KeyboardInterrupt
        record(cells, seconds)

    with mock.patch.object(runner, "_record", stop_at_the_third), pytest.raises(KeyboardInterrupt):
        runner.measure(Group("sleep", 1, entries, "a"), kept.extend)
    assert [cell.status for cell in kept] == ["interrupted"] * 2
    assert [len(cell.repeat_seconds) for cell in kept] == [2, 2]
