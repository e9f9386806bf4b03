"""Tables are whole where they are kept, and fit a terminal where they are looked at."""

import re

import pytest
from rich.console import Console

from transxssm_cli import tables
from transxssm_cli.tables import show, table_of

HEADINGS = ["cell", *(f"measurement{number}" for number in range(12))]
ROWS = [["a [name] in brackets", *(f"{number},000,000" for number in range(12))]]


def test_nothing_is_cut_off_in_a_file(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    show("a line", table_of(HEADINGS, ROWS))
    printed = capsys.readouterr().out
    assert all(text in printed for text in (*HEADINGS, *ROWS[0], "a line"))
    assert "…" not in printed


@pytest.mark.parametrize("width", [80, 300])
def test_a_terminal_keeps_its_width(width, capsys, monkeypatch):
    monkeypatch.setattr(tables, "Console", lambda **options: Console(**options, force_terminal=True, width=width))
    show(table_of(HEADINGS, ROWS))
    printed = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)  # without the codes of its style
    assert max(map(len, printed.splitlines())) <= width
    assert all(text in printed for text in HEADINGS) == (width == 300)


def test_errors_have_a_stream_of_their_own(capsys):
    show("a line", stderr=True)
    assert capsys.readouterr() == ("", "a line\n")
