"""How far the preparation of data is: a bar where `datasets` would show one, elsewhere a line now and then."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from datasets import disable_progress_bars, enable_progress_bars, is_progress_bar_enabled
from tqdm.auto import tqdm

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 10.0


@contextmanager
def progress(what: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """Tells how much of a stage is done; what takes no time is not told of.

    Args:
        what: is done, such as "Reading my_texts".
        total: units of work; 0 where it is unknown.
        unit: "B" for bytes, or what is counted, in the plural.

    Yields:
        A function that is told how many more units are done. The first call begins the display.
    """
    if not is_progress_bar_enabled():
        yield _Lines(what, total, unit).advance
        return
    bar: list[tqdm] = []

    def advance(count: int) -> None:
        if not bar:
            bar.append(
                tqdm(
                    total=total or None,
                    desc=what,
                    unit=unit if unit == "B" else f" {unit}",
                    unit_scale=True,
                    leave=False,
                )
            )
        bar[0].update(count)

    disable_progress_bars()  # of `datasets`, which would show the same work a second time, without its end
    try:
        yield advance
    finally:
        enable_progress_bars()
        for shown in bar:
            shown.close()


class _Lines:
    """A line each time that many seconds have passed."""

    def __init__(self, what: str, total: int, unit: str) -> None:
        self.what, self.total, self.unit = what, total, unit
        self.done = 0
        self.last = time.monotonic()

    def advance(self, count: int) -> None:
        self.done += count
        now = time.monotonic()
        if now - self.last >= SECONDS_BETWEEN_LINES:
            self.last = now
            whole = f" of {amount(self.total, self.unit)}" if self.total else ""
            logger.warning("%s: %s%s", self.what, amount(self.done, self.unit), whole)


def amount(count: int, unit: str) -> str:
    """A number of bytes or things in words."""
    return f"{count / 1e6:,.1f} MB" if unit == "B" else f"{count:,} {unit}"
