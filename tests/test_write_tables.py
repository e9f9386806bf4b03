"""The tables of docs/results.md are what results/ says, to the digit."""

import json

import pytest

from scripts.write_tables import PAGE, filled, main

STUDY_TABLE = "<!-- table: studies/table2-cpu, Two ways -->\n{}<!-- end of table -->"


def test_the_page_is_up_to_date():
    page = PAGE.read_text()
    assert page.count("<!-- table: ") > 0
    assert filled(page) == page, "run: python scripts/write_tables.py"


def test_an_outdated_figure_is_replaced_and_the_prose_is_kept():
    page = "Before.\n\n" + STUDY_TABLE.format("| old |\n") + "\n\nAfter.\n"
    written = filled(page)
    assert "old" not in written
    assert "| SSD | " in written
    assert written.startswith("Before.\n\n<!-- table: ")
    assert written.endswith("<!-- end of table -->\n\nAfter.\n")
    assert filled(written) == written


def test_ratios_are_those_of_the_benchmark(tmp_path):
    ratio = {"min": 1.1, "median": 1.25, "max": 1.5}
    cells = [
        {"mode": "train", "contender": "ours", "length": 1024, "reference": "ours", "ratio_to_reference": None},
        {"mode": "train", "contender": "llama", "length": 1024, "reference": "ours", "ratio_to_reference": ratio},
        {"mode": "train", "contender": "llama", "length": 4096, "reference": "ours", "ratio_to_reference": None},
    ]
    (tmp_path / "speed").mkdir()
    (tmp_path / "speed" / "throughput.json").write_text(json.dumps({"cells": cells}))
    written = filled("<!-- table: speed, Ratios -->\n<!-- end of table -->", tmp_path)
    assert "| train, llama | 1.25 (1.10–1.50) | – |" in written
    assert "| 1K | 4K |" in written


@pytest.mark.parametrize(
    ("page", "message"),
    [
        (STUDY_TABLE.format("").replace("Two ways", "Three ways"), "no table 'Three ways' in "),
        (STUDY_TABLE.format("").replace("table2-cpu", "table9"), "no results in "),
        ("<!-- table: studies/table2-cpu, Two ways -->\n", "a table without its end"),
    ],
)
def test_a_wrong_marker_is_one_line_and_the_page_is_left_alone(page, message, tmp_path, capsys):
    path = tmp_path / "page.md"
    path.write_text(page)
    assert main(path) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"write_tables: {message}")
    assert error.count("\n") == 1
    assert path.read_text() == page
