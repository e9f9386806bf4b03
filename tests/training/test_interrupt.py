"""Stops from outside: Ctrl-C and the end of the time, each with a checkpoint."""

import signal
import threading

import pytest
from transformers import TrainerControl, TrainerState

from transxssm.training import BudgetSpentError, train
from transxssm.training.interrupt import Interrupt
from transxssm.training.report import read_summary

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


def test_a_run_whose_time_is_up_goes_on_from_its_checkpoint(recipe):
    chosen = recipe("training.max_steps=3", "training.eval_strategy=no", "training.save_strategy=no")
    with pytest.raises(BudgetSpentError, match="stopped after step 1"):
        train(chosen, budget_seconds=0.0)
    assert (chosen.output_dir / "checkpoint-1").is_dir()
    assert read_summary(chosen.output_dir) is None
    assert train(chosen, resume=True, budget_seconds=600.0)["steps"] == 3
