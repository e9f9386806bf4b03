"""Compares contenders in groups: each first runs alone in a process of its own; those that succeed then take turns in one process."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from transxssm_lab.benchmarking.processes import ChildFailed, OutOfMemory, OutOfTime, run_in_child
from transxssm_lab.benchmarking.steps import Entry
from transxssm_lab.benchmarking.workers import FirstRun, Setup, first_run, race

Status = Literal["ok", "out of memory", "out of time", "failed", "interrupted"]
MIN_REPEATS = 3  # fewer say nothing about the spread
# Final statuses: another run of the same command would end in the same way.
SETTLED: tuple[Status, ...] = ("ok", "out of memory", "failed")

Notify = Callable[[str, int], None]
"""Called with what is being done and the number of finished parts."""


@dataclass(frozen=True)
class Group:
    """Contenders that are measured against each other: one mode at one length.

    Args:
        mode: what is measured.
        length: tokens in a sequence.
        entries: the contenders.
        reference: the contender by whose time the others' times are divided, turn by turn. Without it there are no ratios.
    """

    mode: str
    length: int
    entries: tuple[Entry, ...]
    reference: str

    @property
    def num_parts(self) -> int:
        """Number of steps of progress: a first run for each contender, and the race."""
        return len(self.entries) + 1


@dataclass(frozen=True)
class Limits:
    """The limits of a benchmark.

    Args:
        repeats: timed runs of each contender.
        deadline: the value of `time.monotonic()` at which measuring stops.
        memory_bytes: largest resident memory of a child.
    """

    repeats: int
    deadline: float
    memory_bytes: int

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()


@dataclass
class Cell:
    """One contender in one mode at one length: what was measured, or why nothing was."""

    contender: str
    mode: str
    length: int
    reference: str
    num_tokens: int | None
    flops: float | None
    status: Status = "out of time"
    detail: str = ""
    first: FirstRun | None = None
    repeat_seconds: list[float] = field(default_factory=list)
    repeat_ratios: list[float] = field(default_factory=list)

    def to_dict(self, peak_flops_per_second: float | None) -> dict[str, Any]:
        """The cell as JSON: what was measured, and what follows from it given the machine's peak."""
        seconds = spread(self.repeat_seconds)
        median = seconds and seconds["median"]
        floor = self.flops and peak_flops_per_second and self.flops / peak_flops_per_second
        first = asdict(self.first) if self.first else dict.fromkeys(FirstRun.__dataclass_fields__)
        return {
            "contender": self.contender,
            "mode": self.mode,
            "length": self.length,
            "reference": self.reference,
            "status": self.status,
            "detail": self.detail,
            "repeat_seconds": self.repeat_seconds,
            "seconds": seconds,
            "repeat_ratios": self.repeat_ratios,
            "ratio_to_reference": spread(self.repeat_ratios),
            "num_tokens": self.num_tokens,
            "tokens_per_second": median and self.num_tokens and self.num_tokens / median,
            "milliseconds_per_token": median and self.num_tokens and 1e3 * median / self.num_tokens,
            "peak_bytes": first["peak_bytes"],
            "step_bytes": first["step_bytes"],
            "first_seconds": first["seconds"],
            "build_seconds": first["build_seconds"],
            "flops": self.flops,
            "flops_per_second": median and self.flops and self.flops / median,
            "floor_seconds": floor,
            "times_floor": median and floor and median / floor,
        }


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """Minimum, median and maximum, or None if there are no values."""
    if not values:
        return None
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


class Comparison:
    """Measures groups one after another within limits.

    Args:
        setup: settings of every child process.
        limits: limits of all groups together.
        notify: called with the progress.
    """

    def __init__(self, setup: Setup, limits: Limits, notify: Notify = lambda what, done: None) -> None:
        self.setup, self.limits, self.notify = setup, limits, notify
        self.num_done = 0
        self._too_much: dict[tuple[str, str], Cell] = {}  # by mode and contender, the first length that did not fit

    def measure(self, group: Group, record: Callable[[list[Cell]], None]) -> None:
        """Measures a group and passes its cells to `record`. After an interruption it passes those that are complete."""
        cells = [Cell(e.name, group.mode, group.length, group.reference, e.num_tokens, e.flops) for e in group.entries]
        try:
            for cell, entry in zip(cells, group.entries, strict=True):
                self._run_first(cell, entry)
            self._race(cells, group.entries)
        except KeyboardInterrupt:
            for cell in cells:
                if cell.status not in ("out of memory", "failed"):
                    cell.status, cell.detail = "interrupted", "by the user"
            raise
        finally:
            record(cells)

    def _run_first(self, cell: Cell, entry: Entry) -> None:
        self.notify(f"{cell.mode} {cell.length}: {cell.contender}, first run", self.num_done)
        known = self._too_much.get((cell.mode, cell.contender))
        if known is not None:
            cell.status, cell.detail = known.status, f"at {known.length} tokens already"
        elif self.limits.seconds_left <= 0:
            cell.status, cell.detail = "out of time", "the time budget ended before"
        else:
            try:
                cell.first = run_in_child(
                    first_run,
                    self.setup,
                    entry,
                    memory_limit=self.limits.memory_bytes,
                    deadline=self.limits.deadline,
                )
                cell.status = "ok"
            except (OutOfMemory, OutOfTime, ChildFailed) as error:
                cell.status, cell.detail = status_of(error), str(error)
                if cell.status == "out of memory":
                    self._too_much[cell.mode, cell.contender] = cell
        self.num_done += 1

    def _race(self, cells: list[Cell], entries: Sequence[Entry]) -> None:
        runners = [(cell, entry) for cell, entry in zip(cells, entries, strict=True) if cell.status == "ok"]
        self.num_done += 1
        if not runners:
            return
        repeats = self.limits.repeats
        least = min(MIN_REPEATS, repeats)
        firsts = [cell.first for cell, _ in runners if cell.first is not None]
        estimate = sum(first.build_seconds + first.seconds + least * first.steady_seconds for first in firsts)
        if estimate > self.limits.seconds_left:
            for cell, _ in runners:
                cell.status = "out of time"
                cell.detail = (
                    f"{least} repeats need about {estimate:.0f} s, {max(self.limits.seconds_left, 0):.0f} s were left"
                )
            return
        self.notify(f"{cells[0].mode} {cells[0].length}: {len(runners)} in turn", self.num_done - 1)
        error = None
        try:
            run_in_child(
                race,
                self.setup,
                [entry for _, entry in runners],
                repeats,
                self.limits.seconds_left,
                memory_limit=self.limits.memory_bytes,
                deadline=self.limits.deadline,
                on_message=lambda seconds: self._record([cell for cell, _ in runners], seconds),
            )
        except (OutOfMemory, OutOfTime, ChildFailed) as caught:
            error = caught
        for cell, _ in runners:
            if len(cell.repeat_seconds) >= least:
                continue
            reason = error or OutOfTime("the time budget ended")
            cell.status, cell.detail = status_of(reason), f"in turn with the others: {reason}"

    def _record(self, cells: list[Cell], seconds: dict[str, float]) -> None:
        for cell in cells:
            cell.repeat_seconds.append(seconds[cell.contender])
            if cell.reference in seconds:
                cell.repeat_ratios.append(seconds[cell.contender] / seconds[cell.reference])


def status_of(error: Exception) -> Status:
    """The status of the cell that a child was measuring when it ended with this error."""
    statuses: dict[type[Exception], Status] = {OutOfMemory: "out of memory", OutOfTime: "out of time"}
    return statuses.get(type(error), "failed")
