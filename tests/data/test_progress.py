import sys

import datasets
import pytest

from transxssm.data import progress as progress_module
from transxssm.data.progress import progress


@pytest.fixture
def bars():
    """Turns the bars of `datasets` on or off, and back in the end."""
    before = datasets.is_progress_bar_enabled()

    def turn(on: bool) -> None:
        datasets.enable_progress_bars() if on else datasets.disable_progress_bars()

    yield turn
    turn(before)


def test_without_bars_there_is_a_line_now_and_then(bars, monkeypatch, caplog):
    bars(False)
    now = [0.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    with progress("Reading texts", 500_000_000, "B") as advance:
        for _ in range(10):
            now[0] += 4.0
            advance(10_000_000)
    assert caplog.messages == [f"Reading texts: {done} of 500.0 MB" for done in ("30.0 MB", "60.0 MB", "90.0 MB")]


def test_what_takes_no_time_is_not_told_of(bars, caplog, capsys):
    bars(False)
    with progress("Packing", 3, "documents") as advance:
        advance(3)
    assert caplog.messages == []
    bars(True)
    with progress("Packing", 3, "documents"):
        assert not datasets.is_progress_bar_enabled()
    assert datasets.is_progress_bar_enabled()
    assert capsys.readouterr().err == ""


def test_on_a_terminal_there_is_a_bar_with_its_end(bars, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    bars(True)
    with progress("Packing [it]", 3, "documents") as advance:
        advance(1)
        advance(2)
    error = capsys.readouterr().err
    assert "Packing [it]" in error
    assert "3 of 3 documents" in error


def test_with_bars_but_no_terminal_there_are_lines(bars, monkeypatch, caplog):
    bars(True)
    now = [0.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    with progress("Packing", 3, "documents") as advance:
        now[0] = 20.0
        advance(2)
    assert caplog.messages == ["Packing: 2 of 3 documents"]
