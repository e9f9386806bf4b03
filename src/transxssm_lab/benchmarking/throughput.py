"""Compares whole models over the sequence length: the paper's Figure 4, measured on this machine.

It also measures which share of a training step the SSD operator takes, forward and backward, without the projections around it.
"""

import contextlib
import copy
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedConfig

from transxssm.inspection.costs import step_flops
from transxssm.models import TransXSSMConfig
from transxssm.ops.ssd import DEFAULT_CHUNK_SIZE
from transxssm_lab.benchmarking.benchmark_run import BenchmarkRun, Budget
from transxssm_lab.benchmarking.comparison import Cell, Group, Notify
from transxssm_lab.benchmarking.contenders import (
    CONTENDERS,
    DEFAULT_CONTENDERS,
    DEFAULT_MODES,
    MODES,
    REFERENCE,
    build_step,
    check_contenders,
    check_names,
    describe_contenders,
)
from transxssm_lab.benchmarking.processes import Send
from transxssm_lab.benchmarking.steps import DECODE_TOKENS, Entry, seconds_of
from transxssm_lab.benchmarking.workers import Setup

NAME = "throughput"
HALF_DTYPES = (torch.bfloat16, torch.float16)
MIN_POINTS = 3  # fewest lengths to which an exponent is fitted

OPERATORS = "transxssm::ssd_"  # prefix of the names of the scan's custom operators
STDERR = 2  # file descriptor of the process, whatever sys.stderr is
BACKWARD = "_backward"  # suffix of the names of their backward passes


@dataclass(frozen=True)
class ThroughputSettings:
    """The settings of the benchmark.

    Args:
        preset: a preset of `TransXSSMConfig`, to which every contender is matched.
        contenders: names in `CONTENDERS`.
        modes: modes in `MODES`.
        lengths: tokens in a sequence, each ≥ 1, or ≥ 2 for training.
        batch: number of sequences.
        dtype: dtype of the weights: "float32", "bfloat16" or "float16". For train-autocast, the dtype of autocast.
        chunk_size: chunk size of TransXSSM's scan, tokens. Defaults to the preset's.

    Raises:
        ValueError: a name or value is unknown, or there is nothing to measure.
    """

    preset: str = "small"
    contenders: tuple[str, ...] = DEFAULT_CONTENDERS
    modes: tuple[str, ...] = DEFAULT_MODES
    lengths: tuple[int, ...] = (1024, 4096, 16384)
    batch: int = 1
    dtype: str = "float32"
    chunk_size: int | None = None

    def __post_init__(self) -> None:
        check_names("mode", self.modes, MODES)
        check_contenders(self.contenders, self.modes)
        if self.batch < 1:
            raise ValueError(f"batch must be at least 1 sequence: got {self.batch}")
        if self.chunk_size is not None and self.chunk_size < 1:
            raise ValueError(f"chunk-size must be at least 1 token: got {self.chunk_size}")
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError(f"lengths must be 1 token or more: got {list(self.lengths)}")
        training = [mode for mode in self.modes if mode.startswith("train")]
        if training and min(self.lengths) < 2:
            raise ValueError(f"{training[0]} needs 2 tokens, the first to predict the second: got a length of 1")
        if "train-autocast" in self.modes and self.torch_dtype not in HALF_DTYPES:
            raise ValueError(
                f"train-autocast casts to a half precision: got dtype {self.dtype}, expected bfloat16 or float16"
            )

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def model_config(self) -> TransXSSMConfig:
        """The configuration to which all contenders are matched."""
        options = {} if self.chunk_size is None else {"ssd_chunk_size": self.chunk_size}
        return TransXSSMConfig.from_preset(self.preset, **options)


def run_throughput(
    settings: ThroughputSettings,
    folder: Path,
    *,
    setup: Setup,
    budget: Budget,
    notify: Notify = lambda what, done: None,
) -> dict[str, Any]:
    """Measures, writes throughput.json (after every group), .md and .png into the folder, and returns the results.

    A cell that runs out of memory or time is recorded and raises nothing. The same call resumes where an earlier one was stopped.

    Raises:
        ValueError: the folder holds other results; a contender cannot be matched.
        KeyboardInterrupt: after what was measured has been written.
    """
    config = settings.model_config()
    configs = {name: CONTENDERS[name].config(config) for name in settings.contenders}
    run = BenchmarkRun(NAME, folder, asdict(settings), setup=setup, budget=budget, notify=notify)
    results = run.results
    results["contenders"] = describe_contenders(configs, config)
    results.setdefault("ssd_share", [])
    groups = plan(settings, configs, setup.device)

    def profile_reference(group: Group, cells: list[Cell]) -> None:
        entries = {entry.name: entry for entry in group.entries}
        measured = [cell.contender for cell in cells if cell.status == "ok"]
        if group.mode == "train" and REFERENCE in measured and run.limits.seconds_left > 0:
            share = run.in_child(ssd_share, entries[REFERENCE])
            if share is not None:
                results["ssd_share"] = [s for s in results["ssd_share"] if s["length"] != group.length]
                results["ssd_share"].append({"length": group.length, **share})

    status = "interrupted"
    try:
        run.measure_peak(config, settings.batch * max(settings.lengths), settings.torch_dtype)
        run.measure(groups, profile_reference)
        status = "complete"
    finally:
        results["prefill_exponents"] = prefill_exponents(results["cells"])
        run.finish(status)
    return results


def num_parts(settings: ThroughputSettings) -> int:
    """Number of steps of progress of a whole benchmark."""
    lengths = len(set(settings.lengths))
    groups = [(mode, 1 if mode == "optimizer" else lengths) for mode in settings.modes]
    counts = [(sum(mode in CONTENDERS[name].modes for name in settings.contenders), times) for mode, times in groups]
    return 1 + sum((contenders + 1) * times for contenders, times in counts if contenders)


def plan(settings: ThroughputSettings, configs: dict[str, PreTrainedConfig], device: torch.device) -> list[Group]:
    """The groups, from the shortest length on. The optimizer's step, which has no length, is measured with the shortest."""
    lengths = sorted(set(settings.lengths))
    reference = REFERENCE if REFERENCE in configs else settings.contenders[0]
    groups = []
    for length in lengths:
        for mode in settings.modes:
            if mode == "optimizer" and length != lengths[0]:
                continue
            entries = tuple(
                _entry(name, config, mode, length, settings, device)
                for name, config in configs.items()
                if mode in CONTENDERS[name].modes
            )
            if entries:
                groups.append(Group(mode, length, entries, reference))
    return groups


def _entry(
    name: str, config: PreTrainedConfig, mode: str, length: int, settings: ThroughputSettings, device: torch.device
) -> Entry:
    arguments = (name, config, mode, length, settings.batch, settings.torch_dtype)
    if mode == "optimizer":
        return Entry(name, build_step, arguments, num_tokens=None, flops=None)
    flops = step_flops(_with_chunk_size(config, device), mode, length, settings.batch).total
    if mode == "decode":
        num_tokens, flops = settings.batch * DECODE_TOKENS, DECODE_TOKENS * flops
    else:
        num_tokens = settings.batch * length
    return Entry(name, build_step, arguments, num_tokens, flops, CONTENDERS[name].compiled is not None)


def _with_chunk_size(config: PreTrainedConfig, device: torch.device) -> PreTrainedConfig:
    """Sets the chunk size that the scan takes on the device, if the configuration names none."""
    if not isinstance(config, TransXSSMConfig) or config.ssd_chunk_size is not None:
        return config
    config = copy.deepcopy(config)
    config.ssd_chunk_size = DEFAULT_CHUNK_SIZE.get(device.type, DEFAULT_CHUNK_SIZE["cuda"])
    return config


def prefill_exponents(cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """For each contender with at least three lengths, the least-squares slope of log(median prefill time) over log(length)."""
    fits = {}
    for name in dict.fromkeys(cell["contender"] for cell in cells):
        points = [
            (cell["length"], cell["seconds"]["median"])
            for cell in cells
            if (cell["contender"], cell["mode"]) == (name, "prefill") and cell["seconds"]
        ]
        if len(points) >= MIN_POINTS:
            lengths, seconds = zip(*points, strict=True)
            slope = np.polyfit(np.log(lengths), np.log(seconds), 1)[0]
            fits[name] = {"exponent": float(slope), "lengths": list(lengths)}
    return fits


def ssd_share(send: Send, setup: Setup, entry: Entry) -> dict[str, Any]:
    """Runs, in a child process, one training step under torch's profiler, after one without it.

    Returns:
        step_seconds: time of the whole step; forward_seconds, backward_seconds: times of the operator; share: both, divided by the step's.
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
    """Computes the operators' share from a profile's events. An operator inside another counts once, with the outer one."""
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
    """Drops what the profiler's library writes to stderr without Python, which would break a progress bar."""
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
