#!/usr/bin/env python3
"""Runs of studies beside each other, a process each, spread over the GPUs: small models leave a GPU idle between launches.

    studies.py FOLDER STUDY:CELL[,CELL…] … [SECTION.KEY=VALUE …] [--jobs N]

Every STUDY:CELL is a process (cells that borrow weights go with the one that lends them: length-gpu:rope,yarn), and goes on in
FOLDER/STUDY where an earlier call stopped. They start in the order given, up to N a GPU at a time; the first one alone until it
trains, then the first of every study, so that data is prepared once. What each says is in FOLDER/logs. Ctrl-C reaches all of
them: they save and stop. As they share the hardware, times in the reports say nothing; with seven on a GPU steps took five times
as long as with two or three.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Job:
    """A study's process, before it starts, while it runs and after."""

    study: str
    cells: list[str]
    gpu: str = ""
    process: subprocess.Popen | None = None

    @property
    def folder_name(self) -> str:
        return Path(self.study).stem  # a study may be a file

    @property
    def name(self) -> str:
        return f"{self.folder_name}-{'-'.join(self.cells)}"

    @property
    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("arguments", nargs="+", metavar="STUDY:CELL or SECTION.KEY=VALUE")
    parser.add_argument("--jobs", type=int, default=3, help="processes on a GPU at a time (3)")
    options = parser.parse_intermixed_args(arguments)
    settings = [argument for argument in options.arguments if "=" in argument]
    jobs = []
    for argument in options.arguments:
        if argument in settings:
            continue
        study, colon, cells = argument.partition(":")
        if not (study and colon and cells):
            parser.error(f"got {argument!r}, expected STUDY:CELL, for example table2-gpu:hybrid-rope")
        jobs.append(Job(study, cells.split(",")))
    if not jobs or options.jobs < 1:
        parser.error(f"got {len(jobs)} cells and --jobs {options.jobs}, expected at least one of either")
    (options.folder / "logs").mkdir(parents=True, exist_ok=True)
    for asked_to_stop in (signal.SIGINT, signal.SIGTERM):  # a shell's background job would ignore the former
        signal.signal(asked_to_stop, signal.default_int_handler)
    try:
        run_all(jobs, options.folder, settings, options.jobs)
    except KeyboardInterrupt:
        stop(jobs)
        return 130
    status = report_failures(jobs, options.folder)
    if not status:
        write_reports(jobs, options.folder, settings)
    return status


def run_all(jobs: list[Job], folder: Path, settings: list[str], jobs_per_gpu: int) -> None:
    """Starts every job when there is room for it and its data is there; returns when all have ended."""
    gpus, started, waiting = gpus_here(), time.time(), list(jobs)
    while waiting or any(job.is_running for job in jobs):
        for job in list(waiting):
            running = [other for other in jobs if other.is_running]
            load = [sum(other.gpu == gpu for other in running) for gpu in gpus]
            if min(load) >= jobs_per_gpu:
                break
            prepares_data = not has_trained(folder / job.folder_name, started)
            siblings = [other for other in running if other.study == job.study or not has_trained(folder, started)]
            if prepares_data and siblings:
                continue
            job.gpu = gpus[load.index(min(load))]
            start(job, folder, settings)
            waiting.remove(job)
        time.sleep(0.5)


def start(job: Job, folder: Path, settings: list[str]) -> None:
    command = [*study_command(job, folder, settings), *(word for cell in job.cells for word in ("--only", cell))]
    with (folder / "logs" / f"{job.name}.txt").open("w") as log:
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": job.gpu}
        # In a group of its own: Ctrl-C comes from here alone, once.
        job.process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )


def write_reports(jobs: list[Job], folder: Path, settings: list[str]) -> None:
    """Of every study once more: processes that ended together may each have written theirs without the other's."""
    for job in {job.study: job for job in jobs}.values():
        subprocess.run([*study_command(job, folder, settings), "--report"], stdout=subprocess.DEVNULL, check=True)


def study_command(job: Job, folder: Path, settings: list[str]) -> list[str]:
    output_dir = f"grid.output_dir={folder / job.folder_name}"
    return [sys.executable, "-m", "transxssm", "study", job.study, output_dir, *settings]


def has_trained(folder: Path, since: float) -> bool:
    """Whether a run in the folder has made a step on this machine, and so has its data; an archive keeps its files' times."""
    found = (path.stat() for path in folder.rglob("metrics.jsonl"))
    return any(stat.st_size and stat.st_mtime >= since for stat in found)


def gpus_here() -> list[str]:
    """The GPUs that may be used, by number or name; one unnamed place where there are none."""
    if chosen := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return chosen.split(",")
    try:
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False).stdout
    except FileNotFoundError:
        return [""]
    return [str(number) for number in range(sum(line.startswith("GPU ") for line in listed.splitlines()))] or [""]


def stop(jobs: list[Job]) -> None:
    for impatient in (signal.SIGINT, signal.SIGTERM):
        signal.signal(impatient, signal.SIG_IGN)
    for job in jobs:
        if job.is_running:
            job.process.send_signal(signal.SIGINT)
    for job in jobs:
        if job.process is not None:
            job.process.wait()


def report_failures(jobs: list[Job], folder: Path) -> int:
    """Says which jobs failed, in a line each; returns the last one's status."""
    status = 0
    for job in jobs:
        if job.process.returncode:
            status = job.process.returncode
            log = folder / "logs" / f"{job.name}.txt"
            last = (log.read_text().strip().splitlines() or [f"exit code {status}"])[-1]
            sys.stderr.write(f"error: {job.study}:{','.join(job.cells)}: {last} (all of it: {log})\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
