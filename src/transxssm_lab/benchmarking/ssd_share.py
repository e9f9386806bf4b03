"""How much of a training step the SSD operator takes, forward and backward, without the projections around it."""

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

from transxssm_lab.benchmarking.processes import Send
from transxssm_lab.benchmarking.steps import Entry, seconds_of
from transxssm_lab.benchmarking.workers import Setup

OPERATORS = "transxssm::ssd_"  # what the names of the scan's custom operators begin with
STDERR = 2  # the process's, whatever sys.stderr is
BACKWARD = "_backward"  # what those of their backward passes end with


def ssd_share(send: Send, setup: Setup, entry: Entry) -> dict[str, Any]:
    """In a child process: one training step under torch's profiler, after one without.

    Returns:
        step_seconds: of the whole step; forward_seconds, backward_seconds: of the operator; share: both, of the step.
        On a GPU all three are times of kernels. The profiler slows many small operations down more than few large ones.

    Raises:
        RuntimeError: the profile holds no such operators.
    """
    setup.apply()
    device = setup.device
    step = entry.build(*entry.arguments, device=device)
    seconds_of(step, device)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with _silent_stderr(), profile(activities=activities) as profiler:
        wall_seconds = seconds_of(step, device)
    return share_of(profiler.events(), wall_seconds, on_device=device.type == "cuda")


def share_of(events: Iterable[Any], wall_seconds: float, *, on_device: bool) -> dict[str, Any]:
    """The operators' share, from a profile's events; an operator inside another counts once, with the outer one."""
    events = list(events)
    outermost = [event for event in events if _is_ssd(event) and not any(map(_is_ssd, _ancestors(event)))]
    backward = [event for event in outermost if event.name.endswith(BACKWARD)]
    forward = [event for event in outermost if not event.name.endswith(BACKWARD)]
    if not forward or not backward:
        names = sorted({event.name for event in events if event.name.startswith("transxssm::")})
        raise RuntimeError(
            f"expected operators {OPERATORS}* and {OPERATORS}*{BACKWARD} in the profile of a training step: got {names}"
        )
    time_of = "device_time_total" if on_device else "cpu_time_total"  # microseconds
    seconds = [sum(getattr(event, time_of) for event in part) / 1e6 for part in (forward, backward)]
    step_seconds = sum(event.self_device_time_total for event in events) / 1e6 if on_device else wall_seconds
    return {
        "step_seconds": step_seconds,
        "forward_seconds": seconds[0],
        "backward_seconds": seconds[1],
        "share": sum(seconds) / step_seconds,
    }


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """Drops what the profiler's library writes past Python, across a progress bar."""
    kept = os.dup(STDERR)
    try:
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), STDERR)
        yield
    finally:
        os.dup2(kept, STDERR)
        os.close(kept)


def _is_ssd(event: Any) -> bool:
    return event.name.startswith(OPERATORS)


def _ancestors(event: Any) -> Iterable[Any]:
    while (event := event.cpu_parent) is not None:
        yield event
