"""Runs the cells of a study in parallel, one process each, spread over the GPUs. Small models leave a GPU idle between launches.

Each process resumes where an earlier call stopped, since finished runs have a summary. The first process starts alone and the others
when it trains, so that data is prepared once. Since the processes share the hardware, their times are not comparable.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from transxssm_lab.studies.definition import Study
from transxssm_lab.studies.schedule import contenders_of

_SECONDS_BETWEEN_LOOKS = 0.5


@dataclass
class Job:
    """A process that runs one or more cells, before it starts, while it runs and afterwards."""

    cells: tuple[str, ...]
    gpu: str = ""
    process: subprocess.Popen[bytes] | None = None

    @property
    def name(self) -> str:
        return "-".join(self.cells)

    @property
    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None


def jobs_of(study: Study, only: Sequence[str]) -> list[Job]:
    """The jobs of a study: one for each cell that is trained, with the cells that use its weights.

    Args:
        only: names of cells or contenders. Empty for all.

    Raises:
        ValueError: see `contenders_of`.
    """
    together: dict[str, list[str]] = {}
    for contender in contenders_of(study, only):
        lender = study.cells[contender.cell].weights_of or contender.cell
        cells = together.setdefault(lender, [])
        if contender.cell not in cells:
            cells.append(contender.cell)
    return [Job(tuple(cells)) for cells in together.values()]


def logs_of(study: Study) -> Path:
    """The folder of the processes' output. It lies beside the study's folder, which must be empty when a study begins."""
    return study.output_dir.with_name(f"{study.output_dir.name}-logs")


def spread(study: Study, arguments: Sequence[str], jobs: list[Job], *, gpus: Sequence[str], jobs_per_gpu: int) -> None:
    """Runs all jobs, and returns when they have succeeded.

    Args:
        arguments: arguments of `transxssm study` that name the study to each process.
        gpus: values of CUDA_VISIBLE_DEVICES, one for each GPU. An empty string stands for the CPU.
        jobs_per_gpu: number of processes on a GPU at a time.

    Raises:
        ValueError: a job failed. The message names the first one, and its log.
        KeyboardInterrupt: after Ctrl-C, which is passed on to all processes; they have saved their progress.
    """
    logs = logs_of(study)
    logs.mkdir(parents=True, exist_ok=True)
    started, waiting = time.time(), list(jobs)
    with _stopped_by_ctrl_c(jobs):
        while waiting or any(job.is_running for job in jobs):
            is_prepared = _has_trained(study.output_dir, started)
            for job in list(waiting):
                running = [other for other in jobs if other.is_running]
                load = [sum(other.gpu == gpu for other in running) for gpu in gpus]
                if min(load) >= jobs_per_gpu or (running and not is_prepared):
                    break
                job.gpu = gpus[load.index(min(load))]
                _start(job, arguments, logs)
                waiting.remove(job)
            time.sleep(_SECONDS_BETWEEN_LOOKS)
    failed = [job for job in jobs if job.process is not None and job.process.returncode]
    if failed:
        log = logs / f"{failed[0].name}.txt"
        said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["it ended without a word"]
        why = said[-1].removeprefix("error: ")
        raise ValueError(
            f"{len(failed)} of {len(jobs)} processes failed; {', '.join(failed[0].cells)}: {why} (all of it: {log})"
        )


def _start(job: Job, arguments: Sequence[str], logs: Path) -> None:
    only = [word for cell in job.cells for word in ("--only", cell)]
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": job.gpu} if job.gpu else {})
    with (logs / f"{job.name}.txt").open("wb") as log:
        # The process has a group of its own, so that it gets Ctrl-C from this process only, and once.
        job.process = subprocess.Popen(
            [sys.executable, "-m", "transxssm", "study", *arguments, *only],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _has_trained(folder: Path, since: float) -> bool:
    """Whether a run in the folder has made a step since then, so that its data is prepared, or all runs are done."""
    found = (path.stat() for path in folder.rglob("metrics.jsonl"))
    return any(stat.st_size and stat.st_mtime >= since for stat in found)


@contextmanager
def _stopped_by_ctrl_c(jobs: Sequence[Job]) -> Iterator[None]:
    """Passes an interruption on to all jobs, and waits until they have saved their progress."""
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    for each in before:  # a background job of a shell would ignore the former
        signal.signal(each, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        for each in before:
            signal.signal(each, signal.SIG_IGN)
        for job in jobs:
            if job.process is not None and job.is_running:
                job.process.send_signal(signal.SIGINT)
        for job in jobs:
            if job.process is not None:
                job.process.wait()
        raise
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
