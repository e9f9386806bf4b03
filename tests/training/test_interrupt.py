"""Stops from outside: Ctrl-C and the end of the time, each with a checkpoint."""

import signal
import threading
import time

import pytest
from transformers import TrainerCallback, TrainerControl, TrainerState

from transxssm.training import BudgetSpentError, train
from transxssm.training.interrupt import Interrupt, stopped_at
from transxssm.training.run_folder import read_summary

STATE = TrainerState(global_step=5, max_steps=20)


def test_ctrl_c_asks_for_a_checkpoint_and_a_stop_and_the_handler_goes_back():
    interrupt, control = Interrupt(), TrainerControl()
    before = signal.getsignal(signal.SIGINT)
    with interrupt.listening():
        interrupt.on_step_end(None, STATE, control)
        assert not control.should_training_stop
        signal.raise_signal(signal.SIGINT)
        interrupt.on_step_end(None, STATE, control)
        assert control.should_save
        assert control.should_training_stop
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_outside_the_main_thread_nothing_listens_and_nothing_fails():
    failures = []

    def listen():
        try:
            with Interrupt().listening():
                pass
        except ValueError as error:
            failures.append(error)

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert not failures


class LateClock(TrainerCallback):
    """An hour goes by in the first step."""

    def __init__(self, monkeypatch):
        self.monkeypatch = monkeypatch

    def on_step_begin(self, args, state, control, **kwargs):
        late = time.monotonic() + 3600
        self.monkeypatch.setattr("time.monotonic", lambda: late)


class TestStoppedAt:
    """The alarm is raised by hand: no test waits for it."""

    def test_the_block_ends_in_the_middle(self):
        handler, timer = signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)
        with stopped_at(time.monotonic() + 600):
            assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 600
        with pytest.raises(BudgetSpentError, match="in the middle"), stopped_at(time.monotonic() + 600):
            signal.raise_signal(signal.SIGALRM)
        assert signal.getsignal(signal.SIGALRM) is handler
        assert (signal.getitimer(signal.ITIMER_REAL)[0] > 0) == (timer[0] > 0)

    def test_an_error_that_a_library_makes_of_it_is_still_the_end_of_the_time(self):
        def library():
            try:
                signal.raise_signal(signal.SIGALRM)
            except Exception as error:
                raise RuntimeError("generator failed") from error

        with pytest.raises(BudgetSpentError), stopped_at(time.monotonic() + 600):
            library()

    def test_other_errors_are_their_own(self):
        with pytest.raises(RuntimeError, match="mine"), stopped_at(time.monotonic() + 600):
            raise RuntimeError("mine")

    def test_nothing_is_begun_too_late_and_nothing_is_ended_without_a_deadline(self):
        with pytest.raises(BudgetSpentError, match="nothing more"), stopped_at(time.monotonic() - 1):
            raise AssertionError
        with stopped_at(None):
            pass

    def test_the_preparation_of_data_is_ended_and_leaves_nothing(self, recipe):
        def source(recipe):
            signal.raise_signal(signal.SIGALRM)

        with pytest.raises(BudgetSpentError):
            train(recipe(), source=source, budget_seconds=600.0)
        assert not recipe().output_dir.exists()


def test_a_run_ends_before_a_step_that_would_not_end_in_time(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    interrupt = Interrupt(deadline=35.0)
    interrupt.on_train_begin(None, STATE, TrainerControl())
    for seconds, stops in ((5.0, False), (10.0, False), (6.0, False), (5.0, True)):  # after 15, 21 and 26
        now[0] += seconds
        control = TrainerControl()
        interrupt.on_step_end(None, STATE, control)
        assert (control.should_training_stop, control.should_save) == (stops, stops)


def test_a_run_whose_time_is_up_goes_on_from_its_checkpoint(recipe, monkeypatch):
    chosen = recipe("training.max_steps=3", "training.eval_strategy=no", "training.save_strategy=no")
    with pytest.raises(BudgetSpentError, match="stopped after step 1"):
        train(chosen, budget_seconds=600.0, display=LateClock(monkeypatch))
    monkeypatch.undo()
    assert (chosen.output_dir / "checkpoint-1").is_dir()
    assert read_summary(chosen.output_dir) is None
    assert train(chosen, resume=True, budget_seconds=600.0)["steps"] == 3
