"""The search for the largest batch that a contender can decode: what is tried in which order, and what comes of a child's end."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transxssm_lab.benchmarking.benchmark_run import BenchmarkRun
from transxssm_lab.benchmarking.comparison import MIN_REPEATS, SETTLED, Notify, Status, spread, status_of
from transxssm_lab.benchmarking.processes import ChildFailed, OutOfMemory, OutOfTime, run_in_child
from transxssm_lab.benchmarking.steps import DECODE_TOKENS, Prompt
from transxssm_lab.benchmarking.workers import DecodeRun, decode_batches


@dataclass
class BatchCell:
    """One contender at one batch: what was measured, or why not."""

    contender: str
    batch: int
    status: Status = "out of time"
    detail: str = ""
    runs: list[DecodeRun] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it; figures only of what was measured to the end."""
        measured = self.runs if self.status == "ok" else []
        seconds = spread([run.seconds for run in measured])
        num_tokens = self.batch * DECODE_TOKENS
        return {
            "contender": self.contender,
            "batch": self.batch,
            "status": self.status,
            "detail": self.detail,
            "repeat_seconds": [run.seconds for run in self.runs],
            "seconds": seconds,
            "num_tokens": num_tokens,
            "tokens_per_second": seconds and num_tokens / seconds["median"],
            "milliseconds_per_step": seconds and {k: 1e3 * v / DECODE_TOKENS for k, v in seconds.items()},
            "cache_bytes_per_sequence": measured[-1].cache_bytes / self.batch if measured else None,
            "peak_bytes": max(run.peak_bytes for run in measured) if measured else None,
        }


class BatchSearch:
    """One contender's batches from the smallest on, until one does not fit, and one between that and the last that did.

    Args:
        run: holds the results, those of an earlier call included.
        name: of the contender.
        batches: growing.
        build: makes the prompt in a child, given `device`.
        notify: told of the progress.
        num_done: parts of the benchmark that are done before.
    """

    def __init__(
        self,
        run: BenchmarkRun,
        name: str,
        batches: Sequence[int],
        build: Callable[..., Prompt],
        notify: Notify,
        num_done: int,
    ) -> None:
        self._run, self._name, self._batches, self._build = run, name, batches, build
        self._notify, self._num_done = notify, num_done

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to be measured."""
        return not pending_batches(self._batches, self._outcomes())

    def run(self, share: float) -> None:
        """Measures until nothing is left to be, or this contender's share of the time left is over."""
        limits = self._run.limits
        deadline = time.monotonic() + share * max(limits.seconds_left, 0)
        while batches := pending_batches(self._batches, self._outcomes()):
            cells = [BatchCell(self._name, batch) for batch in batches]
            try:
                self._attempt(cells, deadline)
            finally:
                self._record(cells)
            if any(cell.status == "out of time" for cell in cells):
                return

    def _attempt(self, cells: list[BatchCell], deadline: float) -> None:
        """Measures batches in one child, up to the first that does not fit or work; cells that it does not reach leave the list."""
        repeats, least = self._run.limits.repeats, min(MIN_REPEATS, self._run.limits.repeats)
        cell_of = {cell.batch: cell for cell in cells}

        def receive(decode_run: DecodeRun) -> None:
            cell = cell_of[decode_run.batch]
            cell.runs.append(decode_run)
            if len(cell.runs) == repeats:
                cell.status, cell.detail = "ok", ""
                self._record([cell])
                self._announce(cells)

        status: Status = "out of time"
        detail = "its share of the time budget was over"
        self._announce(cells)
        try:
            if deadline > time.monotonic():
                run_in_child(
                    decode_batches,
                    self._run.setup,
                    self._build,
                    [cell.batch for cell in cells],
                    least,
                    repeats,
                    deadline - time.monotonic(),
                    memory_limit=self._run.limits.memory_bytes,
                    deadline=deadline,
                    on_message=receive,
                )
        except (OutOfMemory, OutOfTime, ChildFailed) as error:
            status, detail = status_of(error), str(error)
        except KeyboardInterrupt:
            status, detail = "interrupted", "by the user"
            raise
        finally:
            _settle(cells, status, detail, least)

    def _announce(self, cells: Iterable[BatchCell]) -> None:
        todo = [cell.batch for cell in cells if cell.status != "ok"]
        num_measured = sum(status in SETTLED for status in self._outcomes().values())
        batch = f", batch {todo[0]}" if todo else ""
        self._notify(f"{self._name}{batch}", self._num_done + num_measured)

    def _outcomes(self) -> dict[int, Status]:
        return {cell["batch"]: cell["status"] for cell in self._run.results["cells"] if cell["contender"] == self._name}

    def _record(self, cells: Iterable[BatchCell]) -> None:
        """Adds cells in the place of whatever an earlier attempt did not come to the end of, and saves."""
        told = {cell.batch: cell.to_dict() for cell in cells}
        order = list(self._run.results["contenders"])
        kept = [
            cell
            for cell in self._run.results["cells"]
            if cell["contender"] != self._name or (cell["status"] in SETTLED and cell["batch"] not in told)
        ]
        self._run.results["cells"] = sorted(
            [*kept, *told.values()], key=lambda cell: (order.index(cell["contender"]), cell["batch"])
        )
        self._run.save()


def pending_batches(planned: Sequence[int], outcomes: Mapping[int, Status]) -> list[int]:
    """Batches still to be measured, growing: the planned ones below the first that did not fit or work, then one more.

    That one lies midway between the largest batch that fits (0 where none does) and the smallest that does not, and is tried once.

    Args:
        planned: growing.
        outcomes: of the batches that have been tried, those between two planned ones included.
    """
    settled = {batch: status for batch, status in outcomes.items() if status in SETTLED}
    ends = min((batch for batch, status in settled.items() if status != "ok"), default=None)
    todo = [batch for batch in planned if batch not in settled and (ends is None or batch < ends)]
    if todo or ends is None or settled[ends] != "out of memory" or not set(settled) <= set(planned):
        return todo
    fits = max((batch for batch in settled if batch < ends), default=0)
    middle = (fits + ends) // 2
    return [middle] if middle > fits else []


def _settle(cells: list[BatchCell], status: Status, detail: str, least: int) -> None:
    """Says of the first cell that a child was not done with how it ended, and drops those after it; if time was over, says so of all."""
    for index, cell in enumerate(cells):
        if cell.status == "ok":
            continue
        if status == "out of time" and len(cell.runs) >= least:
            cell.status, cell.detail = "ok", ""
            continue
        cell.status, cell.detail = status, detail
        if status != "out of time":
            del cells[index + 1 :]
            return
