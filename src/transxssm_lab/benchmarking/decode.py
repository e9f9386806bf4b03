"""Decoding over the batch size: tokens per second of whole models, up to the largest batch that fits, in tables and a plot.

The search for the largest batch tries the planned batches from the smallest on, then one between the last that fits and the first that
does not.
"""

import functools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from transxssm.models import TransXSSMConfig
from transxssm.plotting import picture
from transxssm_lab.benchmarking.benchmark_run import BenchmarkRun, Budget
from transxssm_lab.benchmarking.comparison import MIN_REPEATS, SETTLED, Notify, Status, spread, status_of
from transxssm_lab.benchmarking.contenders import (
    CONTENDERS,
    REFERENCE,
    build_prompt,
    check_contenders,
    describe_contenders,
)
from transxssm_lab.benchmarking.processes import ChildFailed, OutOfMemory, OutOfTime, run_in_child
from transxssm_lab.benchmarking.report import Report, Table, draw_rates, megabytes
from transxssm_lab.benchmarking.steps import DECODE_TOKENS, Prompt
from transxssm_lab.benchmarking.workers import DecodeRun, Setup, decode_batches

NAME = "decode"
MODE = "decode"  # the mode in which a contender must be measurable
DEFAULT_CONTENDERS = ("transxssm", "llama", "llama-static", "mamba2", "jamba")

HEADERS = ("contender", "batch", "ms a step", "min–max", "tokens/s", "cache MB a sequence", "peak MB")


@dataclass
class BatchCell:
    """One contender at one batch: what was measured, or why nothing was."""

    contender: str
    batch: int
    status: Status = "out of time"
    detail: str = ""
    runs: list[DecodeRun] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The cell as JSON. It has figures only if the measurement was completed."""
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
    """Measures a contender's batches from the smallest on until one does not fit, then one between that batch and the last that did.

    Args:
        run: holds the results, including those of an earlier call.
        name: name of the contender.
        batches: batch sizes in ascending order.
        build: makes the prompt in a child, given `device`.
        notify: called with the progress.
        num_done: number of parts of the benchmark that are done before.
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
        """Whether everything has been measured."""
        return not pending_batches(self._batches, self._outcomes())

    def run(self, share: float) -> None:
        """Measures until everything has been measured or this contender's share of the remaining time is used up."""
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
        """Measures batches in one child, up to the first that does not fit or fails. It removes cells that it does not reach."""
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
            _settle_batches(cells, status, detail, least)

    def _announce(self, cells: Iterable[BatchCell]) -> None:
        todo = [cell.batch for cell in cells if cell.status != "ok"]
        num_measured = sum(status in SETTLED for status in self._outcomes().values())
        batch = f", batch {todo[0]}" if todo else ""
        self._notify(f"{self._name}{batch}", self._num_done + num_measured)

    def _outcomes(self) -> dict[int, Status]:
        return {cell["batch"]: cell["status"] for cell in self._run.results["cells"] if cell["contender"] == self._name}

    def _record(self, cells: Iterable[BatchCell]) -> None:
        """Replaces cells that an earlier attempt did not complete by these, and saves."""
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
    """Batches still to be measured, in ascending order: the planned ones below the first that did not fit or failed, then one more.

    The last one lies midway between the largest batch that fits (0 if none does) and the smallest that does not. It is tried once.

    Args:
        planned: batch sizes in ascending order.
        outcomes: status of each batch that has been tried, including those between two planned ones.
    """
    settled = {batch: status for batch, status in outcomes.items() if status in SETTLED}
    ends = min((batch for batch, status in settled.items() if status != "ok"), default=None)
    todo = [batch for batch in planned if batch not in settled and (ends is None or batch < ends)]
    if todo or ends is None or settled[ends] != "out of memory" or not set(settled) <= set(planned):
        return todo
    fits = max((batch for batch in settled if batch < ends), default=0)
    middle = (fits + ends) // 2
    return [middle] if middle > fits else []


def _settle_batches(cells: list[BatchCell], status: Status, detail: str, least: int) -> None:
    """Marks the first cell that a child did not complete with how the child ended, and drops those after it. Out of time marks all."""
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


@dataclass(frozen=True)
class DecodeSettings:
    """The settings of the benchmark.

    Args:
        preset: a preset of `TransXSSMConfig`, to which every contender is matched.
        contenders: names in `CONTENDERS`.
        length: tokens in the prompt.
        batches: numbers of sequences in a batch; they are sorted and made unique.
        dtype: dtype of the weights: "float32", "bfloat16" or "float16".

    Raises:
        ValueError: a name or value is unknown, or there is nothing to measure.
    """

    preset: str = "small"
    contenders: tuple[str, ...] = DEFAULT_CONTENDERS
    length: int = 1024
    batches: tuple[int, ...] = (1, 2, 4, 8)
    dtype: str = "float32"

    def __post_init__(self) -> None:
        check_contenders(self.contenders, (MODE,))
        if self.length < 1:
            raise ValueError(f"length must be 1 token or more: got {self.length}")
        if not self.batches or min(self.batches) < 1:
            raise ValueError(f"batches must be 1 sequence or more: got {list(self.batches)}")
        object.__setattr__(self, "batches", tuple(sorted(set(self.batches))))

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def model_config(self) -> TransXSSMConfig:
        """The configuration to which all contenders are matched."""
        return TransXSSMConfig.from_preset(self.preset)


def parse_batch(text: str) -> int:
    """Reads a number of sequences such as "64".

    Raises:
        ValueError: the text is not a whole number, or the number is below one.
    """
    if not text.strip().isdecimal() or int(text) < 1:
        raise ValueError(f"a batch is a number of sequences ≥ 1, such as 64: got {text!r}")
    return int(text)


def num_parts(settings: DecodeSettings) -> int:
    """Number of steps of progress of a whole benchmark: the batches of each contender, and one between two of them."""
    return len(settings.contenders) * (len(settings.batches) + 1)


def run_decode(
    settings: DecodeSettings,
    folder: Path,
    *,
    setup: Setup,
    budget: Budget,
    notify: Notify = lambda what, done: None,
) -> dict[str, Any]:
    """Measures, writes decode.json (after every batch), .md and .png into the folder, and returns the results.

    A cell that runs out of memory or time is recorded and raises nothing. The same call resumes where an earlier one was stopped.

    Raises:
        ValueError: the folder holds other results; a contender cannot be matched.
        KeyboardInterrupt: after what was measured has been written.
    """
    config = settings.model_config()
    configs = {name: CONTENDERS[name].config(config) for name in settings.contenders}
    run = BenchmarkRun(NAME, folder, asdict(settings), setup=setup, budget=budget, notify=notify, report=OVER_BATCH)
    run.results["contenders"] = describe_contenders(configs, config)
    run.results["reference"] = REFERENCE if REFERENCE in configs else settings.contenders[0]
    num_new_tokens = (1 + budget.repeats) * DECODE_TOKENS  # a static cache has room for the warm-up and the runs
    searches = []
    for index, (name, model_config) in enumerate(configs.items()):
        build = functools.partial(
            build_prompt, name, model_config, settings.length, 1, settings.torch_dtype, num_new_tokens
        )
        num_before = index * (len(settings.batches) + 1)
        searches.append(BatchSearch(run, name, settings.batches, build, notify, num_before))
    status = "interrupted"
    try:
        for index, search in enumerate(searches):
            num_left = sum(not other.is_done for other in searches[index:])
            search.run(share=1 / max(num_left, 1))
        status = "complete"
    finally:
        run.results["summary"] = summarize(run.results)
        run.finish(status)
    return run.results


def summarize(results: dict[str, Any]) -> dict[str, Any]:
    """For each contender with a measured batch: the largest and the fastest batch, the first that did not fit, and the reference's ratio.

    `reference_over_this` is the reference's highest rate in tokens per second, at any batch, divided by the contender's highest rate.
    """
    best_of = {}
    for name in results["contenders"]:
        fits = _cells(results, name, "ok")
        if fits:
            best_of[name] = max(fits, key=lambda cell: cell["tokens_per_second"])
    reference = best_of.get(results["reference"])
    summary = {}
    for name, best in best_of.items():
        largest = max(_cells(results, name, "ok"), key=lambda cell: cell["batch"])
        too_large = [cell["batch"] for cell in _cells(results, name, "out of memory")]
        summary[name] = {
            "largest_batch": largest["batch"],
            "out_of_memory_batch": min(too_large, default=None),
            "largest_batch_tokens_per_second": largest["tokens_per_second"],
            "best_batch": best["batch"],
            "best_tokens_per_second": best["tokens_per_second"],
            "reference_over_this": reference and reference["tokens_per_second"] / best["tokens_per_second"],
        }
    return summary


def tables(results: dict[str, Any]) -> list[Table]:
    """The table of all batches, and the summary."""
    ratio = f"{results['reference']} ÷ this"
    headers = ("contender", "largest batch", "does not fit", "tokens/s there", "most tokens/s", "at batch", ratio)
    summary_rows = [
        {
            "contender": name,
            "largest batch": str(of["largest_batch"]),
            "does not fit": str(of["out_of_memory_batch"] or "–"),
            "tokens/s there": f"{of['largest_batch_tokens_per_second']:,.0f}",
            "most tokens/s": f"{of['best_tokens_per_second']:,.0f}",
            "at batch": str(of["best_batch"]),
            ratio: f"{of['reference_over_this']:.2f}" if of["reference_over_this"] else "–",
        }
        for name, of in results["summary"].items()
    ]
    return [
        Table("decode", HEADERS, list(rows(results))),
        Table("largest batch", headers, summary_rows),
    ]


def rows(results: dict[str, Any]) -> Iterator[dict[str, str]]:
    """The row of each cell, by header (`HEADERS`). If nothing was timed, the row says why."""
    for cell in results["cells"]:
        row = dict.fromkeys(HEADERS, "–") | {"contender": cell["contender"], "batch": str(cell["batch"])}
        if cell["status"] != "ok":
            yield row | {"ms a step": cell["status"], "min–max": cell["detail"]}
            continue
        ms = {name: f"{value:,.1f}" for name, value in cell["milliseconds_per_step"].items()}
        yield row | {
            "ms a step": ms["median"],
            "min–max": f"{ms['min']}–{ms['max']}",
            "tokens/s": f"{cell['tokens_per_second']:,.0f}",
            "cache MB a sequence": f"{cell['cache_bytes_per_sequence'] / 1e6:,.2f}",
            "peak MB": megabytes(cell["peak_bytes"]),
        }


def plot(path: Path, results: dict[str, Any]) -> None:
    """Tokens per second over the batch on a logarithmic plane, a line for each contender."""
    with picture(path) as panel:
        draw_rates(panel, [cell for cell in results["cells"] if cell["tokens_per_second"]], "batch")
        panel.set_title(f"Decoding after {results['settings']['length']:,} tokens")
        panel.set_xlabel("batch (sequences)")


OVER_BATCH = Report(tables, plot)


def _cells(results: dict[str, Any], contender: str, status: str) -> list[dict[str, Any]]:
    return [cell for cell in results["cells"] if (cell["contender"], cell["status"]) == (contender, status)]
