"""The work of a benchmark's child processes: a contender's first run, the race of several, and decoding in growing batches."""

import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import psutil  # type: ignore[import-untyped]
import torch

from transxssm_lab.benchmarking.processes import Send
from transxssm_lab.benchmarking.steps import Entry, Prompt, seconds_of


@dataclass(frozen=True)
class Setup:
    """The settings with which every child begins.

    Args:
        device: the device that computes.
        num_threads: number of torch's threads on the CPU. Defaults to torch's own choice.
    """

    device: torch.device
    num_threads: int | None = None

    def apply(self) -> None:
        """Applies the settings to this process."""
        if self.num_threads is not None:
            torch.set_num_threads(self.num_threads)


@dataclass(frozen=True)
class FirstRun:
    """A contender's first run, alone in its process.

    Args:
        build_seconds: time to build the model and, for decoding, to read the prompt.
        seconds: time of the run itself, including work that only a first run does.
        steady_seconds: time of a second run if the first one may compile, else `seconds`.
        peak_bytes: peak memory of weights, the prompt's cache and the run together, above that of the empty process.
        step_bytes: peak memory of the run above what was held just before it.
    """

    build_seconds: float
    seconds: float
    steady_seconds: float
    peak_bytes: int
    step_bytes: int


def first_run(send: Send, setup: Setup, entry: Entry) -> FirstRun:
    """Builds a contender's step and runs it once."""
    setup.apply()
    device = setup.device
    empty = _bytes_now(device)
    started = time.perf_counter()
    step = entry.build(*entry.arguments, device=device)
    build_seconds = time.perf_counter() - started
    before = _bytes_now(device)
    seconds = seconds_of(step, device)
    peak = _peak_bytes(device)
    steady_seconds = seconds_of(step, device) if first_run_may_compile(entry, device) else seconds
    # A run may fit into pages that were freed after building.
    return FirstRun(build_seconds, seconds, steady_seconds, peak - empty, max(0, peak - before))


def first_run_may_compile(entry: Entry, device: torch.device) -> bool:
    """Whether a contender's first run may take far longer than others: on a GPU it compiles and tunes Triton's kernels."""
    return entry.compiles or device.type == "cuda"


def race(send: Send, setup: Setup, entries: Sequence[Entry], repeats: int, seconds_left: float) -> None:
    """Runs contenders in turn, once as a warm-up and `repeats` times each, and sends {name: seconds} after every turn.

    Each turn starts with another contender, so that none always runs after the same one. A turn that would take longer than the
    seconds left is not begun.
    """
    setup.apply()
    ends = time.monotonic() + seconds_left
    steps = {entry.name: entry.build(*entry.arguments, device=setup.device) for entry in entries}
    for step in steps.values():
        seconds_of(step, setup.device)
    names = list(steps)
    last_turn = 0.0
    for turn in range(repeats):
        if time.monotonic() + last_turn > ends:
            return
        order = names[turn % len(names) :] + names[: turn % len(names)]
        seconds = {name: seconds_of(steps[name], setup.device) for name in order}
        last_turn = sum(seconds.values())
        send(seconds)


@dataclass(frozen=True)
class DecodeRun:
    """One timed run of decoding.

    Args:
        batch: number of rows.
        seconds: time for `DECODE_TOKENS` tokens in each row.
        cache_bytes: memory of the cache of all rows.
        peak_bytes: peak memory above that of the empty process: on a CPU since the process began, on a GPU with this batch.
    """

    batch: int
    seconds: float
    cache_bytes: int
    peak_bytes: int


def decode_batches(
    send: Send,
    setup: Setup,
    build: Callable[..., Prompt],
    batches: Sequence[int],
    least: int,
    repeats: int,
    seconds_left: float,
) -> None:
    """Prefills one row once, then decodes it at each batch size, once as a warm-up and `repeats` times. Sends a `DecodeRun` for each.

    Args:
        send: sends a message to the parent.
        setup: settings of this process.
        build: called as `build(device=…)`.
        batches: batch sizes in ascending order. A batch size is skipped, and the measurement ends, if `least` runs as long as the last one
            would exceed the time left. A single run is skipped for the same reason.
        least: fewest runs of a batch.
        repeats: number of runs of a batch.
        seconds_left: time for all batches.
    """
    setup.apply()
    device = setup.device
    ends = time.monotonic() + seconds_left
    empty = _bytes_now(device)
    prompt = build(device=device)
    seconds = 0.0
    for batch in batches:
        if time.monotonic() + (1 + least) * seconds > ends:
            return
        _bytes_now(device)  # resets the GPU's peak, so that each batch has its own
        repeated = prompt.repeated(batch)
        step = repeated.step()
        seconds = seconds_of(step, device)
        for _ in range(repeats):
            if time.monotonic() + seconds > ends:
                return
            seconds = seconds_of(step, device)
            send(DecodeRun(batch, seconds, repeated.cache_bytes(), _peak_bytes(device) - empty))
        del repeated, step
        if device.type == "cuda":
            torch.cuda.empty_cache()  # else cached blocks of this batch's sizes would take the next one's memory


def _bytes_now(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    return psutil.Process().memory_info().rss


def _peak_bytes(device: torch.device) -> int:
    """Peak memory: on a CPU since the process began, on a GPU since the last call of `_bytes_now`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else 1024 * largest
