"""Runs a command in several processes, one for each GPU, by torch's elastic launcher. Only the first one prints."""

import logging
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
import typer
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, ProcessFailure, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from transxssm_cli.one_line_errors import (
    EXIT_INTERRUPTED,
    EXIT_PROCESS_LOST,
    EXIT_USER_ERROR,
    LAUNCHER_VARIABLE,
)

EVERY_GPU = "all"
# Ctrl-C is not among them, since it is passed on to the processes, which save their progress.
_SIGNALS = "SIGTERM,SIGHUP,SIGQUIT"
_OWN_EXIT_CODES = (1, EXIT_USER_ERROR, EXIT_INTERRUPTED)  # exit codes of a process that has printed why it ends


def is_launched() -> bool:
    """Whether a launcher, this one or torchrun, has started this process as one of several."""
    return "LOCAL_RANK" in os.environ


def number_of_processes(gpus: str, *, on_cpu: bool, cpu_setting: str = "training.use_cpu=true") -> int:
    """The number of processes that `--gpus` requests.

    Args:
        gpus: a number, or "all".
        on_cpu: whether processes run on the CPU, where they communicate through gloo.
        cpu_setting: the setting that makes them do so, for messages.

    Raises:
        ValueError: `gpus` is not a number, or there are fewer GPUs.
    """
    if gpus != EVERY_GPU and not (gpus.isdecimal() and int(gpus) > 0):
        raise ValueError(f"--gpus: got {gpus!r}, expected a number of GPUs from 1 on, or {EVERY_GPU}")
    if is_launched():
        raise ValueError("--gpus launches processes, and so does what started this one: leave out either")
    if on_cpu:
        if gpus == EVERY_GPU:
            raise ValueError(f"--gpus all with {cpu_setting}: expected a number of processes")
        return int(gpus)
    there = torch.cuda.device_count()
    if there == 0:
        raise ValueError(
            f"--gpus {gpus}: torch sees no GPU here; leave it out, or give {cpu_setting} for processes on the CPU"
        )
    if gpus != EVERY_GPU and int(gpus) > there:
        raise ValueError(f"--gpus {gpus}: torch sees {there} here; expected {there} at most, or {EVERY_GPU}")
    return there if gpus == EVERY_GPU else int(gpus)


def launch(arguments: Sequence[str], processes: int, *, go_on: str = "the same command and --resume") -> None:
    """Runs `transxssm` with these arguments in a number of processes, and returns when all have succeeded.

    The first process has the terminal. The output of the others is kept until the end. Ctrl-C reaches all of them.

    Args:
        go_on: what the error line tells the user to do to resume.

    Raises:
        typer.Exit: a process failed, and the others were ended. The reason has been printed in one line.
    """
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = _SIGNALS
    os.environ[LAUNCHER_VARIABLE] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    for name in logging.root.manager.loggerDict:
        if name.startswith("torch.distributed.elastic"):  # their messages about a failure are replaced by one line
            logging.getLogger(name).setLevel(logging.CRITICAL)
    newer: dict[str, Any] = (
        {"signals_to_handle": _SIGNALS} if "signals_to_handle" in LaunchConfig.__dataclass_fields__ else {}
    )
    with tempfile.TemporaryDirectory(prefix="transxssm-") as logs:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=logs, redirects=dict.fromkeys(range(1, processes), Std.ALL)),
            **newer,
        )
        with _interrupts_handed_on() as interrupted:
            try:
                elastic_launch(config, sys.executable)("-m", "transxssm", *arguments)
            except ChildFailedError as error:
                code, line = _why(error.failures, processes, Path(logs), go_on, is_interrupted=bool(interrupted))
                if line:
                    typer.echo(line, err=True)
                raise typer.Exit(code) from error


@contextmanager
def _interrupts_handed_on() -> Iterator[list[int]]:
    """Passes Ctrl-C on to the processes, which have sessions of their own. Yields the list of interrupts so far."""
    interrupts: list[int] = []

    def hand_on(signum: int, frame: FrameType | None) -> None:
        interrupts.append(signum)
        for process in psutil.Process().children():
            try:
                if os.getsid(process.pid) == process.pid:
                    process.send_signal(signum)
            except (psutil.NoSuchProcess, ProcessLookupError):
                continue

    previous = signal.signal(signal.SIGINT, hand_on)
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, previous)


def _why(
    failures: dict[int, ProcessFailure], processes: int, logs: Path, go_on: str, *, is_interrupted: bool
) -> tuple[int, str]:
    """The exit code of a failed launch, and a line with the reason, which is empty if the first process has printed it."""
    speaker = failures.get(0)
    if speaker is not None and speaker.exitcode in _OWN_EXIT_CODES:
        return speaker.exitcode, ""
    if is_interrupted:
        return EXIT_INTERRUPTED, f"interrupted: continue with {go_on}"
    followed = (-signal.SIGTERM, EXIT_PROCESS_LOST)
    ended = {rank: failure for rank, failure in failures.items() if failure.exitcode not in followed}
    rank, failure = min((ended or failures).items(), key=lambda item: item[1].timestamp)
    if failure.exitcode in _OWN_EXIT_CODES:
        return failure.exitcode, _last_line(logs, rank)
    how = failure.signal_name() if failure.exitcode < 0 else f"exit code {failure.exitcode}"
    return 1, f"error: process {rank} of {processes} ended ({how}), and the others with it; continue with {go_on}"


def _last_line(logs: Path, rank: int) -> str:
    written = "".join(log.read_text(encoding="utf-8", errors="replace") for log in logs.glob(f"*/*/{rank}/stderr.log"))
    said = [line for line in written.splitlines() if line.strip()]
    return said[-1] if said else f"error: process {rank} ended without a word"
