"""The output of a run while it trains: the progress on the terminal, and metrics.jsonl."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from transxssm.training.estimate import LONG_RUN, StepClock, estimate_line
from transxssm.whole_files import write_text_whole

# Keys of Trainer's log that a row of metrics.jsonl takes over.
ROW_KEYS = (
    "epoch",
    "loss",
    "grad_norm",
    "learning_rate",
    "tokens_per_second",
    "train_seconds",
    "rows_per_step",
    "eval_loss",
    "eval_perplexity",
    "eval_bits_per_byte",
    "eval_runtime",
)


def rows_of(log_history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each step that was logged or evaluated, in order: `step`, `tokens`, and the `ROW_KEYS` that it has."""
    rows: dict[int, dict[str, Any]] = {}
    for entry in log_history:
        if "loss" in entry or "eval_loss" in entry:
            row = rows.setdefault(entry["step"], {"step": entry["step"], "tokens": entry["num_input_tokens_seen"]})
            row |= {key: entry[key] for key in ROW_KEYS if key in entry}
    return list(rows.values())


class MetricsFile(TrainerCallback):
    """Appends a row per logged step to metrics.jsonl.

    A resumed run rewrites the file from its checkpoint's log, which removes rows of steps that will be repeated.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.written = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            rows = rows_of(state.log_history)
            write_text_whole(self.path, "".join(map(_line, rows)))
            self.written = len(rows)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # A checkpoint ends an interval of the log, so that an interrupted run and an uninterrupted one average over the same steps.
        control.should_log = control.should_log or control.should_save

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._append(state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._append(state)

    def _append(self, state: TrainerState) -> None:
        # Written between two steps, when the loss and the evaluation of the last one are known and share a row.
        if not state.is_world_process_zero:
            return
        rows = rows_of(state.log_history)
        if len(rows) > self.written:
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(map(_line, rows[self.written :]))
            self.written = len(rows)


class ProgressDisplay(TrainerCallback):
    """Shows a bar with loss, tokens per second and time left on a terminal, and elsewhere a line for each logged step.

    The time left is shown after the first steps, which take longer than the others.

    Args:
        console: the console to which it writes. Defaults to standard error.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, highlight=False, soft_wrap=True, markup=False)
        self.bar: Progress | None = None
        self.clock = StepClock()
        self._introduction: list[str] = []
        self._quicker: Callable[[float], str] | None = None

    def introduce(
        self, lines: Sequence[str], *, evaluation_in_steps: float, quicker: Callable[[float], str], is_estimated: bool
    ) -> None:
        """Receives what is known before the first step.

        Args:
            lines: lines to show before the first step.
            evaluation_in_steps: see `StepClock`.
            quicker: returns advice on how to take less time, given the seconds of a step.
            is_estimated: whether the lines say how long the run will take. Otherwise the display says so if the run turns out to be long.
        """
        self._introduction = list(lines)
        self.clock.evaluation_in_steps = evaluation_in_steps
        self._quicker = None if is_estimated else quicker

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.clock.start()
        if not state.is_world_process_zero:
            return
        for line in self._introduction:
            self.console.print(line)
        if not self.console.is_terminal:
            return
        self.bar = Progress(
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps · loss {task.fields[loss]} · {task.fields[speed]} tokens/s · {task.fields[left]} left"),
            console=self.console,
        )
        self.bar.add_task("", total=state.max_steps, completed=state.global_step, loss="–", speed="–", left="–")
        self.bar.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.clock.step_ended()
        if not state.is_world_process_zero:
            return
        left, step = self.clock.left(args, state), self.clock.step_seconds()
        if self._quicker is not None and left is not None and step is not None:
            if left >= LONG_RUN:
                num_steps = state.max_steps - state.global_step
                self.console.print(estimate_line(left, num_steps, step, self._quicker(step)))
            self._quicker = None
        if self.bar is not None:
            shown = "–" if left is None else _clock_time(left)
            self.bar.update(self.bar.task_ids[0], completed=state.global_step, left=shown)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.clock.evaluated()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.clock.saved()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or not logs:
            return
        where = f"step {state.global_step}/{state.max_steps}"
        if "eval_loss" in logs:
            self.console.print(
                f"{where}  held-out loss {logs['eval_loss']:.4f}  perplexity {logs['eval_perplexity']:.2f}"
                + (f"  bits per byte {logs['eval_bits_per_byte']:.4f}" if "eval_bits_per_byte" in logs else "")
            )
        elif "loss" in logs and self.bar is not None:
            self.bar.update(self.bar.task_ids[0], loss=f"{logs['loss']:.4f}", speed=f"{logs['tokens_per_second']:,.0f}")
        elif "loss" in logs:
            left = self.clock.left(args, state, evaluates_now=control.should_evaluate)
            self.console.print(
                f"{where}  loss {logs['loss']:.4f}  {logs['tokens_per_second']:,.0f} tokens/s"
                + ("" if left is None else f"  {_clock_time(left)} left")
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()

    def close(self) -> None:
        """Restores the terminal, also after an exception, when Trainer does not call `on_train_end`."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


class LastStep(TrainerCallback):
    """Logs and evaluates after the last step, whatever the strategies are, since the summary needs both."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_log = control.should_evaluate = True


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row) + "\n"


def _clock_time(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
