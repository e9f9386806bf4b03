"""A run that is stopped from outside, by Ctrl-C or because its time is up, with a checkpoint to go on from."""

import logging
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)


class BudgetSpentError(Exception):
    """A run's time was up before its last step; a checkpoint was saved."""


class Interrupt(TrainerCallback):
    """Ctrl-C ends the run after the step it falls into, with a checkpoint; a second one ends it at once.

    Args:
        budget_seconds: so much wall time after the first step began the run ends in the same way; None: never.
    """

    def __init__(self, budget_seconds: float | None = None) -> None:
        self.requested = False
        self.is_out_of_time = False
        self.budget_seconds = budget_seconds
        self._began = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._began = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        spent = time.monotonic() - self._began
        self.is_out_of_time = self.budget_seconds is not None and spent > self.budget_seconds
        if self.requested or self.is_out_of_time:
            control.should_save = control.should_training_stop = True

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
        logger.warning("interrupted: saving a checkpoint after this step (Ctrl-C again stops at once)")
