"""Estimates how long a run takes, from one batch before it begins and from its own steps while it runs. All times are in seconds."""

import statistics
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerState, TrainingArguments

# The first steps load, compile and warm up. This many steps after them give an estimate.
WARM_UP_STEPS = 2
STEADY_STEPS = 3
# Number of last steps in the estimate, since the load of a machine changes.
RECENT_STEPS = 50
# If a batch would take longer than this, only one of its rows is measured.
LONGEST_MEASURED_BATCH = 2.0
# A batch is measured this often, or until this time is over. The shortest time counts, since other load only adds to it.
MEASUREMENTS, MEASURING_SECONDS = 5, 3.0
# Share of the forward pass, and so of evaluation, in a step's work.
FORWARD_SHARE = 1 / 3
LONG_RUN = 3600.0


class StepClock:
    """Measures the times of a step, an evaluation and a checkpoint separately, without the first steps.

    Args:
        evaluation_in_steps: expected time of an evaluation, in steps, until one has been measured.
    """

    def __init__(self, evaluation_in_steps: float = 0.0) -> None:
        self.evaluation_in_steps = evaluation_in_steps
        self._steps: deque[float] = deque(maxlen=RECENT_STEPS)
        self._num_steps = 0
        self._evaluation: float | None = None
        self._checkpoint = 0.0
        self._last = time.perf_counter()

    def start(self) -> None:
        """Starts the clock when training begins."""
        self._elapsed()

    def step_ended(self) -> None:
        """Counts the time since the last call as that of a step, including the loading of its batch."""
        seconds = self._elapsed()
        self._num_steps += 1
        if self._num_steps > WARM_UP_STEPS:
            self._steps.append(seconds)

    def evaluated(self) -> None:
        """Counts the time since the last call as that of an evaluation."""
        self._evaluation = self._elapsed()

    def saved(self) -> None:
        """Counts the time since the last call as that of a checkpoint."""
        self._checkpoint = self._elapsed()

    def step_seconds(self) -> float | None:
        """Seconds of a step, or None until enough steps are known."""
        return statistics.median(self._steps) if len(self._steps) >= STEADY_STEPS else None

    def left(self, arguments: TrainingArguments, state: TrainerState, *, evaluates_now: bool = False) -> float | None:
        """Seconds to the end of the run, or None until they can be estimated.

        Args:
            arguments, state: arguments and state of the run.
            evaluates_now: whether an evaluation is about to begin.
        """
        step = self.step_seconds()
        if step is None:
            return None
        evaluation = self.evaluation_in_steps * step if self._evaluation is None else self._evaluation
        times = evaluations_left(arguments, state) + evaluates_now
        saves = _multiples(state.global_step, state.max_steps, state.save_steps)
        return (state.max_steps - state.global_step) * step + times * evaluation + saves * self._checkpoint

    def _elapsed(self) -> float:
        before, self._last = self._last, time.perf_counter()
        return self._last - before


def evaluations_left(arguments: TrainingArguments, state: TrainerState) -> int:
    """Number of evaluations that remain in the run. There is always one after the last step."""
    step, last = state.global_step, state.max_steps
    if step >= last:
        return 0
    if arguments.eval_strategy == "steps":
        return _multiples(step, last, state.eval_steps) + (last % state.eval_steps != 0)
    return 1


def _multiples(after: int, last: int, of: float) -> int:
    """Multiples of a number in (after, last]."""
    return int(last // of - after // of) if of else 0


def measured_step_seconds(
    model: nn.Module,
    arguments: TrainingArguments,
    batch_of: Callable[[int], dict[str, Tensor]],
    loss_of: Callable[[dict[str, Tensor]], Tensor],
) -> float:
    """Measures the time of a model's step in this process, without the optimizer's part.

    The weights and the state of the random number generators are unchanged.

    Args:
        model: the model that is trained.
        arguments: arguments of the run, with rows in a batch, batches in a step, precision and device.
        batch_of: makes a batch of a number of rows.
        loss_of: returns the model's loss of a batch.
    """
    rows = arguments.per_device_train_batch_size
    device = arguments.device
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        was_training = model.training
        model.train()
        try:
            _batch_seconds(loss_of, arguments, batch_of(1))
            row = _least_seconds(loss_of, arguments, batch_of(1))
            batch = row * rows
            if rows > 1 and batch <= LONGEST_MEASURED_BATCH:
                # A batch never takes longer than its rows one after the other.
                batch = min(batch, _least_seconds(loss_of, arguments, batch_of(rows)))
        finally:
            model.train(was_training)
            model.zero_grad(set_to_none=True)
    recomputed = 1 + FORWARD_SHARE if arguments.gradient_checkpointing else 1
    return batch * recomputed * arguments.gradient_accumulation_steps


def _least_seconds(
    loss_of: Callable[[dict[str, Tensor]], Tensor], arguments: TrainingArguments, batch: dict[str, Tensor]
) -> float:
    seconds: list[float] = []
    while len(seconds) < MEASUREMENTS and sum(seconds) < MEASURING_SECONDS:
        seconds.append(_batch_seconds(loss_of, arguments, batch))
    return min(seconds)


def _batch_seconds(
    loss_of: Callable[[dict[str, Tensor]], Tensor], arguments: TrainingArguments, batch: dict[str, Tensor]
) -> float:
    device = arguments.device
    inputs = {name: tensor.to(device) for name, tensor in batch.items()}
    dtype = torch.float16 if arguments.fp16 else torch.bfloat16
    started = time.perf_counter()
    with torch.autocast(device.type, dtype=dtype, enabled=arguments.fp16 or arguments.bf16):
        loss = loss_of(inputs)
    loss.backward()
    loss.item()  # waits for the device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def rows_per_step(arguments: TrainingArguments) -> int:
    """Rows of all processes in one optimizer step."""
    return (
        arguments.per_device_train_batch_size
        * arguments.gradient_accumulation_steps
        * processes_with_own_rows(arguments)
    )


def processes_with_own_rows(arguments: TrainingArguments) -> int:
    """Number of processes, where those that share rows count as one."""
    return arguments.world_size // getattr(arguments, "processes_of_a_row", 1)


def number_of_steps(arguments: TrainingArguments, train: Any) -> int | None:
    """Number of steps in the whole run, or None if it depends on the length of a stream."""
    if arguments.max_steps > 0:
        return arguments.max_steps
    if not hasattr(train, "__len__"):
        return None
    batches = -(-len(train) // (arguments.per_device_train_batch_size * processes_with_own_rows(arguments)))
    return round(max(1, batches // arguments.gradient_accumulation_steps) * arguments.num_train_epochs)


def in_words(seconds: float) -> str:
    """Formats a time, such as "40 seconds", "9 minutes" or "29 hours"."""
    for unit, size in (("day", 48 * 3600), ("hour", 100 * 60), ("minute", 90)):
        if seconds >= size:
            whole = {"day": 86400, "hour": 3600, "minute": 60}[unit]
            return f"{round(seconds / whole)} {unit}s"
    return f"{max(1, round(seconds))} second{'s' * (round(seconds) > 1)}"


def estimate_line(seconds: float, num_steps: int, step_seconds: float, quicker: str) -> str:
    """A line with the time that a run will take and, for a long run, advice on how to take less."""
    line = f"about {in_words(seconds)} on this machine: {num_steps:,} steps of {step_seconds:.3g} s"
    return f"{line}. Quicker: {quicker}" if seconds >= LONG_RUN and quicker else line
