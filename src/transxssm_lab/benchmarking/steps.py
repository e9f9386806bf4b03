"""One measurable step of a contender: what is timed, and what must happen between two timings."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Step:
    """What a benchmark repeats.

    Args:
        run: the timed part.
        clean: brings things back to where `run` can be called again; not timed.
    """

    run: Callable[[], object]
    clean: Callable[[], object] = lambda: None


@dataclass(frozen=True)
class Entry:
    """One contender's part in a group: how a child process builds its step, and what a run of it amounts to.

    Args:
        name: of the contender.
        build: a function of a module, called in the child as `build(*arguments, device=…)`; returns a `Step`.
        arguments: picklable.
        num_tokens: tokens that one run processes, or None where it processes no tokens.
        flops: of one run, counted as `transxssm_lab.benchmarking.flops` does, or None where it has no matrix products.
        compiles: in its first run, which says nothing about the next.
    """

    name: str
    build: Callable[..., Step]
    arguments: tuple[Any, ...]
    num_tokens: int | None
    flops: float | None
    compiles: bool = False


def synchronize(device: torch.device) -> None:
    """Waits until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(step: Step, device: torch.device) -> float:
    """Wall time of one run, the device's work included; cleans up after it."""
    synchronize(device)
    started = time.perf_counter()
    result = step.run()
    synchronize(device)
    seconds = time.perf_counter() - started
    del result
    step.clean()
    return seconds
