"""Progress of data preparation: a bar on a terminal, where `datasets` would show one, and elsewhere occasional lines."""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from datasets import disable_progress_bars, enable_progress_bars, is_progress_bar_enabled
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 10.0


@contextmanager
def progress(what: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """Shows the progress of a stage. A stage that takes no time shows nothing.

    Args:
        what: description of the stage, such as "Reading my_texts".
        total: number of units, or 0 if it is unknown.
        unit: "B" for bytes, or the plural of the unit.

    Yields:
        A function to be called with numbers of units done. The first call begins the display.
    """
    shows_bars = is_progress_bar_enabled()
    disable_progress_bars()  # the bars of `datasets` would show the same work again, without a total
    try:
        with _bar(what, total, unit) if shows_bars and sys.stderr.isatty() else _lines(what, total, unit) as advance:
            yield advance
    finally:
        if shows_bars:
            enable_progress_bars()


@contextmanager
def _bar(what: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[done]}"),
        TimeRemainingColumn(),
    )
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    task = bar.add_task(what, total=total or None, done="")
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        bar.start()
        bar.update(task, completed=done, done=_of(done, total, unit))

    try:
        yield advance
    finally:
        bar.stop()


@contextmanager
def _lines(what: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """Logs a line at regular intervals."""
    done, last = 0, time.monotonic()

    def advance(count: int) -> None:
        nonlocal done, last
        done += count
        now = time.monotonic()
        if now - last >= SECONDS_BETWEEN_LINES:
            last = now
            logger.warning("%s: %s", what, _of(done, total, unit))

    yield advance


def _of(done: int, total: int, unit: str) -> str:
    if not total:
        return amount(done, unit)
    return f"{amount(done, unit) if unit == 'B' else f'{done:,}'} of {amount(total, unit)}"


def amount(count: int, unit: str) -> str:
    """Formats a number of bytes or of other units."""
    return f"{count / 1e6:,.1f} MB" if unit == "B" else f"{count:,} {unit}"
