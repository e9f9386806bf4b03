"""Stops a run on Ctrl-C or at a deadline, with a checkpoint from which it can be resumed."""

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)


class BudgetSpentError(Exception):
    """A run reached its deadline before its last step. A checkpoint was saved."""


@contextmanager
def stopped_at(deadline: float | None) -> Iterator[None]:
    """Interrupts the block at a deadline, wherever it is. The work must be safe to interrupt.

    Outside the main thread, and on systems without a timer, the deadline is checked only before the block.

    Args:
        deadline: in seconds of `time.monotonic`. None for no deadline.

    Raises:
        BudgetSpentError: the deadline passed before the block or inside it.
    """
    if deadline is None:
        yield
        return
    left = deadline - time.monotonic()
    if left <= 0:
        raise BudgetSpentError("nothing more was begun")
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return
    is_over = False

    def stop(signum: int, frame: FrameType | None) -> None:
        nonlocal is_over
        is_over = True
        raise BudgetSpentError("the time was up in the middle")

    previous = signal.signal(signal.SIGALRM, stop)
    before = signal.setitimer(signal.ITIMER_REAL, left)
    try:
        yield
    except Exception as error:  # libraries may wrap the exception
        if is_over and not isinstance(error, BudgetSpentError):
            raise BudgetSpentError("the time was up in the middle") from error
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, *before)
        signal.signal(signal.SIGALRM, previous)


class Interrupt(TrainerCallback):
    """Ends the run after the current step with a checkpoint on Ctrl-C. A second Ctrl-C ends it at once.

    Args:
        deadline: in `time.monotonic`'s seconds. The run ends in the same way before a step that would end after it. A step is expected to
            take as long as the longest so far, including evaluation and saving. One step is always made. Defaults to no deadline.
    """

    def __init__(self, deadline: float | None = None) -> None:
        self.requested = False
        self.is_out_of_time = False
        self.deadline = deadline
        self._last = self._longest = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._last = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        now = time.monotonic()
        self._longest, self._last = max(self._longest, now - self._last), now
        self.is_out_of_time = self.deadline is not None and now + self._longest > self.deadline
        if dist.is_available() and dist.is_initialized():
            self._agree(args.device)
        if self.requested or self.is_out_of_time:
            control.should_save = control.should_training_stop = True

    def _agree(self, device: torch.device) -> None:
        """Makes all processes stop if one was asked to, so that they save and stop after the same step."""
        asked = torch.tensor([self.requested, self.is_out_of_time], dtype=torch.int32, device=device)
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        self.requested, self.is_out_of_time = map(bool, asked.tolist())

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handles Ctrl-C inside the block. Only the main thread gets signals; in another, nothing is handled."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = signal.signal(signal.SIGINT, self._on_signal)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        if os.environ.get("RANK", "0") != "0":
            return
        logger.warning("interrupted: saving a checkpoint after this step (Ctrl-C again stops at once)")
