"""A run that is stopped from outside, by Ctrl-C or because its time is up, with a checkpoint to go on from."""

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
    """A run's time was up before its last step; a checkpoint was saved."""


@contextmanager
def stopped_at(deadline: float | None) -> Iterator[None]:
    """Ends the block when a time is up, wherever it is: for work that leaves nothing half-done behind.

    Outside the main thread, and where the system has no such timer, the block is only not begun too late.

    Args:
        deadline: in seconds of `time.monotonic`. With None there is no deadline.

    Raises:
        BudgetSpentError: the time was up, before the block or inside it.
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
    except Exception as error:  # libraries wrap what passes through them
        if is_over and not isinstance(error, BudgetSpentError):
            raise BudgetSpentError("the time was up in the middle") from error
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, *before)
        signal.signal(signal.SIGALRM, previous)


class Interrupt(TrainerCallback):
    """Ctrl-C ends the run after the step it falls into, with a checkpoint; a second one ends it at once.

    Args:
        deadline: in `time.monotonic`'s seconds. The run ends in the same way before a step that would end later, if it took as long as
            the longest one so far, with what was evaluated and saved after it; one step is always made. Defaults to no deadline.
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
        """What one process is asked all do, after the same step: they save and stop together."""
        asked = torch.tensor([self.requested, self.is_out_of_time], dtype=torch.int32, device=device)
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        self.requested, self.is_out_of_time = map(bool, asked.tolist())

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Listens for Ctrl-C inside the block. Threads other than the main one get no signals, and none is awaited there."""
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
