"""Implements `transxssm benchmark`: reads the options, shows progress, and prints the tables."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from transxssm.models import read_device
from transxssm.models.checkpoint import read_dtype
from transxssm.serving.vllm import require_supported_vllm
from transxssm.wording import parse_length
from transxssm_cli.tables import show, table_of
from transxssm_lab.benchmarking import (
    Budget,
    DecodeSettings,
    Notify,
    OpsSettings,
    Setup,
    ThroughputSettings,
    run_decode,
    run_ops,
    run_throughput,
)
from transxssm_lab.benchmarking import decode as decode_benchmark
from transxssm_lab.benchmarking import ops as ops_benchmark
from transxssm_lab.benchmarking import serving as serving_benchmark
from transxssm_lab.benchmarking import throughput as throughput_benchmark
from transxssm_lab.benchmarking.decode import OVER_BATCH
from transxssm_lab.benchmarking.report import CONTENDER_HEADERS, OVER_LENGTH, Report, contender_rows, notes
from transxssm_lab.benchmarking.serving import ServingSettings, run_serving

DEFAULT_FOLDER = Path("runs/benchmarks")
GIGABYTE = 1e9
# Columns that are too wide for a terminal. The files have them.
ONLY_IN_FILES = ("min–max", "GFLOP/s", "step MB")


def names_in(text: str) -> tuple[str, ...]:
    """Splits "a, b" into the names a and b."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def run_throughput_command(
    *,
    preset: str,
    contenders: tuple[str, ...],
    modes: tuple[str, ...],
    lengths: tuple[str, ...],
    batch: int,
    dtype: str,
    device: str,
    chunk_size: int | None,
    repeats: int,
    budget_minutes: float,
    memory_limit_gb: float | None,
    threads: int | None,
    output: Path | None,
) -> None:
    """Measures whole models.

    Raises:
        ValueError: an option that is unknown or impossible.
    """
    read_dtype(dtype)
    settings = ThroughputSettings(
        preset, contenders, modes, tuple(map(parse_length, lengths)), batch, dtype, chunk_size
    )
    settings.model_config()
    setup, budget = _setup(device, threads), _budget(repeats, budget_minutes, memory_limit_gb)
    folder = output or _default_folder(throughput_benchmark.NAME, preset, dtype, setup)
    with _progress(throughput_benchmark.num_parts(settings), folder) as notify:
        results = run_throughput(settings, folder, setup=setup, budget=budget, notify=notify)
    _show(results, folder)


def run_decode_command(
    *,
    preset: str,
    contenders: tuple[str, ...],
    length: str,
    batches: tuple[str, ...],
    dtype: str,
    device: str,
    repeats: int,
    budget_minutes: float,
    memory_limit_gb: float | None,
    threads: int | None,
    output: Path | None,
) -> None:
    """Measures how whole models decode batches of several sizes.

    Raises:
        ValueError: an option that is unknown or impossible.
    """
    read_dtype(dtype)
    sizes = tuple(map(decode_benchmark.parse_batch, batches))
    settings = DecodeSettings(preset, contenders, parse_length(length), sizes, dtype)
    settings.model_config()
    setup, budget = _setup(device, threads), _budget(repeats, budget_minutes, memory_limit_gb)
    folder = output or _default_folder(decode_benchmark.NAME, preset, dtype, setup)
    with _progress(decode_benchmark.num_parts(settings), folder) as notify:
        results = run_decode(settings, folder, setup=setup, budget=budget, notify=notify)
    _show(results, folder, OVER_BATCH)


def run_ops_command(
    *,
    preset: str,
    lengths: tuple[str, ...],
    batch: int,
    dtype: str,
    device: str,
    repeats: int,
    budget_minutes: float,
    memory_limit_gb: float | None,
    threads: int | None,
    output: Path | None,
) -> None:
    """Measures single operators.

    Raises:
        ValueError: an option that is unknown or impossible.
    """
    read_dtype(dtype)
    settings = OpsSettings(preset, tuple(map(parse_length, lengths)), batch, dtype)
    settings.model_config()
    setup, budget = _setup(device, threads), _budget(repeats, budget_minutes, memory_limit_gb)
    folder = output or _default_folder(ops_benchmark.NAME, preset, dtype, setup)
    with _progress(ops_benchmark.num_parts(settings, setup.device), folder) as notify:
        results = run_ops(settings, folder, setup=setup, budget=budget, notify=notify)
    _show(results, folder)


def run_serving_command(
    *,
    preset: str,
    dtype: str,
    clients: tuple[str, ...],
    prompt: int,
    new: int,
    long_prompt: str,
    long_clients: int,
    long_new: int,
    repeats: int,
    cache_gb: float,
    budget_minutes: float,
    output: Path | None,
) -> None:
    """Both models in vLLM.

    Raises:
        ValueError: vLLM is missing; an option that is unknown or impossible.
    """
    require_supported_vllm()
    settings = ServingSettings(
        preset=preset,
        dtype=dtype,
        clients=tuple(map(parse_length, clients)),
        prompt=prompt,
        new=new,
        long_prompt=parse_length(long_prompt),
        long_clients=long_clients,
        long_new=long_new,
        repeats=repeats,
        cache_gigabytes=cache_gb,
    )
    folder = output or DEFAULT_FOLDER / f"{serving_benchmark.NAME}-{preset}-{dtype}"
    results = run_serving(settings, folder, minutes=budget_minutes, say=lambda line: typer.echo(line, err=True))
    _show(results, folder, serving_benchmark.REPORT)


def _setup(device: str, threads: int | None) -> Setup:
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be at least 1: got {threads}")
    return Setup(read_device(device), threads)


def _budget(repeats: int, minutes: float, memory_limit_gb: float | None) -> Budget:
    memory = None if memory_limit_gb is None else int(memory_limit_gb * GIGABYTE)
    return Budget(repeats=repeats, minutes=minutes, memory_bytes=memory)


def _default_folder(name: str, preset: str, dtype: str, setup: Setup) -> Path:
    return DEFAULT_FOLDER / f"{name}-{preset}-{dtype}-{setup.device.type}"


@contextmanager
def _progress(num_parts: int, folder: Path) -> Iterator[Notify]:
    """Shows a bar on a terminal and nothing elsewhere. After an interruption it prints where the results are."""
    console = Console(stderr=True, highlight=False)
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    try:
        with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
            task = bar.add_task("", total=num_parts)
            yield lambda what, done: bar.update(task, description=escape(what), completed=done)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"what was measured is in {folder}; the same command goes on from there") from None


def _show(results: dict[str, Any], folder: Path, report: Report = OVER_LENGTH) -> None:
    parts: list[RenderableType] = []
    if results.get("contenders"):
        parts.append(table_of(CONTENDER_HEADERS, contender_rows(results), num_names=2))
    for title, headers, rows in report.tables(results):
        columns = [name for name in headers if name not in ONLY_IN_FILES]
        parts += [
            f"[bold]{escape(title)}[/]",
            table_of(columns, ([row[name] for name in columns] for row in rows), num_names=2),
        ]
    show(*parts)
    for note in notes(results):
        typer.echo(note)
    typer.echo(f"Written to {folder}")
