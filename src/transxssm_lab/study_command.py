"""`transxssm study`: shows the plan, then the progress over its runs, then the tables."""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from transformers.utils import logging

from transxssm.evaluation import ResultTable
from transxssm_cli.launch import number_of_processes
from transxssm_cli.tables import show, table_of
from transxssm_cli.training import quiet_progress_bars
from transxssm_lab.studies import (
    Study,
    bundled_studies,
    contenders_of,
    load_study,
    plan_of,
    report_study,
    run_study,
    tables_of,
)
from transxssm_lab.studies.outcome import read_outcome
from transxssm_lab.studies.runner import Notify
from transxssm_lab.studies.schedule import duration
from transxssm_lab.studies.spread import jobs_of, spread
from transxssm_lab.studies.tables import notes_of

SECONDS_BETWEEN_LINES = 15.0


def list_studies() -> None:
    """Prints the bundled studies and their questions."""
    table = ResultTable(["study", "asks"], [[name, load_study(name).grid.title] for name in bundled_studies()])
    show(table_of(table.headings, table.rows))


def show_plan(recipe: str, overrides: Sequence[str], only: Sequence[str]) -> None:
    """Prints the runs of a study.

    Raises:
        ValueError: see `load_study`, `contenders_of`.
    """
    study = load_study(recipe, overrides)
    _print_plan(study, only)


def run_study_command(
    recipe: str, overrides: Sequence[str], *, only: Sequence[str], budget_minutes: float | None, started: float
) -> None:
    """Runs a study and shows its tables.

    Args:
        recipe, overrides, only, budget_minutes: the values of the command line.
        started: when the command began, in `time.monotonic`'s seconds. The budget includes the time for starting.

    Raises:
        ValueError: see `load_study`, `run_study`.
        KeyboardInterrupt: after Ctrl-C; says how to go on.
    """
    study = load_study(recipe, overrides)
    contenders_of(study, only)
    if budget_minutes is not None and budget_minutes <= 0:
        raise ValueError(f"--budget-minutes must be more than 0: got {budget_minutes:g}")
    _print_plan(study, only, stderr=True)
    quiet_progress_bars()
    logging.disable_progress_bar()  # hides the bar for the loading of weights
    with _progress(study) as notify:
        report = run_study(study, only=only, budget_minutes=budget_minutes, notify=notify, started=started)
    _print_report(study, report)


def spread_study_command(
    recipe: str, overrides: Sequence[str], *, only: Sequence[str], gpus: str, jobs_per_gpu: int
) -> None:
    """Runs a study's cells in parallel and shows its tables.

    Args:
        gpus: a number of GPUs, or "all". Under training.use_cpu=true it is the number of processes on the CPU.

    Raises:
        ValueError: see `load_study`, `jobs_of`, `number_of_processes`, `spread`.
        KeyboardInterrupt: after Ctrl-C; says how to go on.
    """
    study = load_study(recipe, overrides)
    jobs = jobs_of(study, only)
    on_cpu = study.training.get("use_cpu") is True
    number = number_of_processes(gpus, on_cpu=on_cpu)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(number)))
    _print_plan(study, only, stderr=True)
    try:
        places = [""] if on_cpu else visible.split(",")[:number]
        at_once = number * jobs_per_gpu if on_cpu else jobs_per_gpu
        spread(study, [recipe, *overrides], jobs, gpus=places, jobs_per_gpu=at_once)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"what was run is in {study.output_dir}; the same command goes on from there") from None
    _print_report(
        study, report_study(study)
    )  # written again, since processes that end together may each write it without the other's runs


def report_command(recipe: str, overrides: Sequence[str]) -> None:
    """Writes and shows the tables of the runs in a study's folder.

    Raises:
        ValueError: see `load_study`, `report_study`.
    """
    study = load_study(recipe, overrides)
    _print_report(study, report_study(study))


def _print_report(study: Study, report: dict[str, Any]) -> None:
    has_begun = any(one["runs"] or one["tuning"] for one in report["contenders"].values())
    for title, table in tables_of(report).items() if has_begun else ():
        typer.echo(f"\n{title}")
        show(table_of(table.headings, table.rows))
    for note in notes_of(report):
        typer.echo(note)
    typer.echo(f"Written to {study.output_dir}")


def _print_plan(study: Study, only: Sequence[str], *, stderr: bool = False) -> None:
    contenders = contenders_of(study, only)
    schedule = plan_of(study, contenders)
    rows = []
    for contender in contenders:
        tuning = [run for run in schedule.tuning if run.contender.name == contender.name]
        full = [run for run in schedule.full if run.contender.name == contender.name]
        rows.append(
            [
                contender.name,
                f"weights of {contender.weights_of}" if contender.weights_of else f"{len(tuning)} + {len(full)}",
                f"{sum(run.tokens for run in (*tuning, *full)):,}",
                duration(sum(run.seconds for run in (*tuning, *full))),
            ]
        )
    show(table_of(["cell", "runs (tuning + whole)", "tokens", "about"], rows), stderr=stderr)
    done = [run for run in schedule.runs if read_outcome(study.output_dir / run.folder) is not None]
    seconds = schedule.seconds - sum(run.seconds for run in done)
    typer.echo(
        f"{study.name}: {len(schedule.runs)} runs, {len(done)} done, about {duration(seconds)} left at "
        f"{study.grid.flops_per_second:.1e} FLOP/s, evaluation not counted; in {study.output_dir}",
        err=stderr,
    )


@contextmanager
def _progress(study: Study) -> Iterator[Notify]:
    """Shows a bar over the planned time on a terminal, elsewhere a line when a run begins and every fifteen seconds.

    After an interruption it prints how to resume.
    """
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    columns = (BarColumn(), TextColumn("{task.percentage:.1f}%"), TimeElapsedColumn(), TextColumn("{task.description}"))
    last, told_at = "", 0.0

    def on_lines(what: str, done: float) -> None:
        nonlocal last, told_at
        run = what.partition(" · ")[0]
        if run != last or time.monotonic() >= told_at + SECONDS_BETWEEN_LINES:
            console.print(f"{done:6.1%}  {escape(what)}")
            last, told_at = run, time.monotonic()

    try:
        with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
            task = bar.add_task("", total=1.0)

            def on_bar(what: str, done: float) -> None:
                bar.update(task, description=escape(what), completed=done)

            yield on_bar if console.is_terminal else on_lines
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"what was run is in {study.output_dir}; the same command goes on from there") from None
