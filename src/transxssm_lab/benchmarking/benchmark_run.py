"""The parts that all benchmarks share: limits, the machine's peak, and a results file that is saved after each group, to resume.

The peak is the fastest matrix product that torch does here in a dtype, which every FLOP floor is measured against.
"""

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from transxssm.inspection import available_bytes
from transxssm.machine import run_metadata
from transxssm.models.baselines import language_model_on_meta
from transxssm_lab.benchmarking.comparison import SETTLED, Cell, Comparison, Group, Limits, Notify
from transxssm_lab.benchmarking.processes import ChildFailed, OutOfMemory, OutOfTime, Send, run_in_child
from transxssm_lab.benchmarking.report import OVER_LENGTH, Report, write_json, write_report
from transxssm_lab.benchmarking.steps import Step, seconds_of
from transxssm_lab.benchmarking.workers import Setup

logger = logging.getLogger(__name__)

# A run resumes from results only if none of these has changed.
_SAME_RUN = ("version", "commit", "dirty", "device", "gpu", "cpu", "threads", "torch", "transformers")
MEMORY_MARGIN = (
    0.1  # share of the available memory that stays free for the parent, the system and growth between two checks
)
PEAK_TOKENS = 4096  # rows of the products whose rate is the peak

Shape = tuple[int, int, int]  # rows, inner width, columns
SQUARE = {"cpu": 2048, "cuda": 8192}
SECONDS_PER_SHAPE = 0.5
_LEAST_PRODUCTS, _MOST_PRODUCTS = 3, 50  # products of each shape, however long they take


@dataclass(frozen=True)
class Budget:
    """The time and memory that a whole benchmark may take.

    Args:
        repeats: timed runs of each contender in each group; at least 3 are made, or none.
        minutes: wall time.
        memory_bytes: largest resident memory of a child. Defaults to nine tenths of the available memory.

    Raises:
        ValueError: less than one repeat, no time, no memory.
    """

    repeats: int = 5
    minutes: float = 20.0
    memory_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise ValueError(f"repeats must be at least 1: got {self.repeats}")
        if self.minutes <= 0:
            raise ValueError(f"budget-minutes must be more than 0: got {self.minutes:g}")
        if self.memory_bytes is not None and self.memory_bytes <= 0:
            raise ValueError(f"the memory limit must be more than 0 bytes: got {self.memory_bytes}")

    def limits(self) -> Limits:
        """The limits of a benchmark that begins now."""
        host = available_bytes(torch.device("cpu"))
        memory = int((1 - MEMORY_MARGIN) * host) if self.memory_bytes is None else self.memory_bytes
        return Limits(self.repeats, time.monotonic() + 60 * self.minutes, memory)


class BenchmarkRun:
    """One benchmark, which writes into one folder.

    Args:
        name: name of the benchmark and its files.
        folder: holds `name`.json, which grows after every group, `name`.md and `name`.png.
        settings: plain values that say what is measured. A run does not resume from results with other settings.
        setup: settings of the child processes.
        budget: see `Budget`.
        notify: called with the progress.
        report: how the results are shown.

    Raises:
        ValueError: the folder holds results of another command, machine or version of the code.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        settings: dict[str, Any],
        *,
        setup: Setup,
        budget: Budget,
        notify: Notify,
        report: Report = OVER_LENGTH,
    ) -> None:
        self.name, self.folder, self.setup, self.report = name, folder, setup, report
        metadata = run_metadata(setup.device, setup.num_threads)
        self.results: dict[str, Any] = {
            "benchmark": name,
            "status": "interrupted",
            "metadata": metadata,
            "settings": {**settings, "repeats": budget.repeats},
            "peak": None,
            "cells": [],
        }
        self._continue_from(folder / f"{name}.json")
        self.limits = budget.limits()
        self.comparison = Comparison(setup, self.limits, notify)

    def measure_peak(self, config: PreTrainedConfig, num_tokens: int, dtype: torch.dtype) -> None:
        """Finds the fastest matrix product among a model's, unless an earlier run has. Without it, results have no FLOP floors."""
        self.comparison.notify("peak of a matrix product", self.comparison.num_done)
        if self.results["peak"] is None:
            shapes = product_shapes(config, min(num_tokens, PEAK_TOKENS), self.setup.device)
            self.results["peak"] = self.in_child(measure_peak, shapes, dtype)
        self.comparison.num_done += 1

    def measure(self, groups: Sequence[Group], after: Callable[[Group, list[Cell]], None] | None = None) -> None:
        """Measures the groups that are not done yet, and calls `after` with each group and its cells."""
        for group in groups:
            if self._is_settled(group):
                self.comparison.num_done += group.num_parts
                continue
            self._forget(group)
            measured: list[Cell] = []
            try:
                self.comparison.measure(group, measured.extend)
            finally:
                self.results["cells"] += [cell.to_dict(self._peak) for cell in measured]
                self.save()
            if after is not None:
                after(group, measured)

    def in_child(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Returns the result of other work in a child process, or None if it ran out of memory or time."""
        try:
            return run_in_child(
                function,
                self.setup,
                *arguments,
                memory_limit=self.limits.memory_bytes,
                deadline=self.limits.deadline,
            )
        except (OutOfMemory, OutOfTime):
            return None
        except ChildFailed as error:
            raise RuntimeError(f"{function.__name__}: {error}") from error

    def save(self) -> None:
        """Writes the results so far."""
        write_json(self.folder / f"{self.name}.json", self.results)

    def finish(self, status: str) -> dict[str, Any]:
        """Writes all three files and returns the results."""
        unfinished = any(cell["status"] == "out of time" for cell in self.results["cells"])
        self.results["status"] = "out of time" if status == "complete" and unfinished else status
        write_report(self.folder, self.name, self.results, self.report)
        return self.results

    @property
    def _peak(self) -> float | None:
        return self.results["peak"] and self.results["peak"]["flops_per_second"]

    def _cells(self, group: Group) -> list[dict[str, Any]]:
        return [c for c in self.results["cells"] if (c["mode"], c["length"]) == (group.mode, group.length)]

    def _is_settled(self, group: Group) -> bool:
        status_of = {cell["contender"]: cell["status"] for cell in self._cells(group)}
        return all(status_of.get(entry.name) in SETTLED for entry in group.entries)

    def _forget(self, group: Group) -> None:
        """Drops a group's cells, so that the whole group is measured again: its contenders are compared only within one run."""
        old = self._cells(group)
        self.results["cells"] = [cell for cell in self.results["cells"] if cell not in old]

    def _continue_from(self, path: Path) -> None:
        try:
            earlier = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return
        except ValueError:
            raise ValueError(f"{path} is damaged, not JSON: delete it, or choose another folder") from None
        for part, names in (("settings", self.results["settings"]), ("metadata", _SAME_RUN)):
            for name in names:
                got, expected = earlier.get(part, {}).get(name), json.loads(json.dumps(self.results[part][name]))
                if got != expected:
                    raise ValueError(
                        f"{path} holds results of another run, {name} was {got} and is {expected} now: "
                        "choose another folder, or delete it"
                    )
        self.results = {**earlier, "status": "interrupted"}
        if earlier["status"] == "complete":
            logger.warning("%s is complete: nothing is measured again; to do so, delete %s first", path, self.folder)
        else:
            logger.warning("going on with %s", path)


def product_shapes(config: PreTrainedConfig, num_tokens: int, device: torch.device) -> list[Shape]:
    """The shapes of the products of a model's linear layers over `num_tokens` tokens, each once, and that of a large square product."""
    model = language_model_on_meta(config)
    layers = {(m.in_features, m.out_features) for m in model.modules() if isinstance(m, nn.Linear)}
    side = SQUARE.get(device.type, SQUARE["cuda"])
    return [(side, side, side), *((num_tokens, *sizes) for sizes in sorted(layers))]


def measure_peak(send: Send, setup: Setup, shapes: Sequence[Shape], dtype: torch.dtype) -> dict[str, Any]:
    """Measures, in a child process, the FLOPs per second of the fastest repetition of each product, and the best of them."""
    setup.apply()
    rates, products = [], []
    for rows, inner, columns in shapes:
        left = torch.randn(rows, inner, device=setup.device).to(dtype)
        right = torch.randn(columns, inner, device=setup.device).to(dtype).T  # as a linear layer holds its weight
        out = torch.empty(rows, columns, device=setup.device, dtype=dtype)
        step = Step(lambda left=left, right=right, out=out: torch.matmul(left, right, out=out))  # type: ignore[misc]
        seconds_of(step, setup.device)
        best, count, ends = float("inf"), 0, time.monotonic() + SECONDS_PER_SHAPE
        while count < _LEAST_PRODUCTS or (count < _MOST_PRODUCTS and time.monotonic() < ends):
            best, count = min(best, seconds_of(step, setup.device)), count + 1
        rates.append(2 * rows * inner * columns / best)
        products.append({"shape": [rows, inner, columns], "flops_per_second": rates[-1]})
    return {"flops_per_second": max(rates), "products": products}
