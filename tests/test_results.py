"""The tables of the documentation are what results/ says, to the digit, and results/ stays small."""

import json
import re
import subprocess

import pytest

from scripts.results import RESULTS, ROOT, filled, main, pack, pages
from transxssm_lab.studies.archive import rewrite_report

STUDY_TABLE = "<!-- table: studies/table2-cpu, Two ways -->\n{}<!-- end of table -->"
MOST_FILES, MOST_BYTES = 150, 6_000_000


@pytest.mark.parametrize("path", pages(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_page_is_up_to_date(path):
    page = path.read_text()
    assert filled(page) == page, "run: python scripts/results.py"


def test_the_pages_have_tables():
    assert sum(path.read_text().count("<!-- table: ") for path in pages()) > 20


def test_a_report_is_that_of_its_logs(tmp_path):
    study = RESULTS / "studies" / "ratio-cpu"
    for path in study.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    rewrite_report(tmp_path)
    for path in study.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), "run: python scripts/results.py"


def test_results_stay_small():
    listed = subprocess.run(
        ["git", "-C", ROOT, "ls-files", "-z", "results"], capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a git repository")
    files = [path for name in listed.stdout.split("\0") if name and (path := ROOT / name).is_file()]
    assert len(files) <= MOST_FILES
    assert sum(path.stat().st_size for path in files) <= MOST_BYTES
    assert {path.suffix for path in files} <= {".json", ".jsonl", ".md", ".parquet"}


@pytest.mark.parametrize("path", [ROOT / "README.md", *pages()], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_what_a_page_quotes_exists(path):
    """A place under results/ in backquotes is a file, a folder or an entry of a file."""
    for place in re.findall(r"`results/([\w./-]+)`", path.read_text()):
        part, _, name = place.partition("/")
        entries = [json.loads(file.read_text()) for file in (RESULTS / part).glob("*.json")]
        assert (RESULTS / place).exists() or any(name in file for file in entries), place


def test_an_outdated_figure_is_replaced_and_the_prose_is_kept():
    page = "Before.\n\n" + STUDY_TABLE.format("| old |\n") + "\n\nAfter.\n"
    written = filled(page)
    assert "old" not in written
    assert "| SSD | " in written
    assert written.startswith("Before.\n\n<!-- table: ")
    assert written.endswith("<!-- end of table -->\n\nAfter.\n")
    assert filled(written) == written


METADATA = {
    "command": "__main__.py benchmark throughput --dtype bfloat16 --output runs/speed --repeats 3",
    "date": "2026-01-02T03:04:05+00:00",
    "commit": "0123456789",
    "dirty": True,
    "gpu": None,
    "cpu": "EPYC",
    "cpu_capability": "AVX2",
    "threads": 2,
}


def throughput_cell(contender, length, ratios):
    ratio = {"min": min(ratios), "median": sorted(ratios)[1], "max": max(ratios)} if ratios else None
    cell = {"mode": "train", "contender": contender, "length": length, "reference": "ours"}
    return cell | {"repeat_ratios": ratios, "ratio_to_reference": ratio}


THROUGHPUT = {
    "metadata": METADATA,
    "cells": [
        throughput_cell("ours", 1024, [1.0, 1.0, 1.0]),
        throughput_cell("llama", 1024, [1.1, 1.25, 1.5]),
        throughput_cell("llama-static", 1024, [2.2, 5.0, 1.5]),
        throughput_cell("llama", 4096, []),
    ],
}
DECODE = {
    "metadata": METADATA,
    "contenders": {"ours": {}, "llama": {}},
    "cells": [
        {"contender": "ours", "batch": 1, "tokens_per_second": 10.4},
        {"contender": "ours", "batch": 64, "tokens_per_second": 2031.0},
        {"contender": "llama", "batch": 64, "tokens_per_second": None},
    ],
}


@pytest.fixture
def results(tmp_path):
    """A results folder with two benchmarks, each packed from a folder of its own."""
    for name, kind, report in (("speed", "throughput", THROUGHPUT), ("batches", "decode", DECODE)):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{kind}.json").write_text(json.dumps(report))
        pack(tmp_path / name, f"cpu/{name}", tmp_path / "results")
    return tmp_path / "results"


@pytest.mark.parametrize(
    ("table", "rows"),
    [
        ("cpu/speed, Ratios", ["| 1K | 4K |", "| train, llama | 1.25 (1.10–1.50) | – |"]),
        (
            "cpu/speed, Ratios to llama",
            ["| train, ours | 0.80 (0.67–0.91) |", "| train, llama-static | 2.00 (1.00–4.00) |"],
        ),
        ("cpu/batches, Decoding", ["| 1 | 64 |", "| ours | 10 | 2,031 |", "| llama | – | – |"]),
        (
            "cpu, Runs",
            [
                "| speed | `transxssm benchmark throughput --dtype bfloat16 --repeats 3` | 2 cores of an EPYC, AVX2 | 2026-01-02 | "
                "0123456, with changes |",
                "| batches | ",
            ],
        ),
    ],
)
def test_tables_of_benchmarks(table, rows, results):
    written = filled(f"<!-- table: {table} -->\n<!-- end of table -->", results)
    assert all(row in written for row in rows)


def test_an_entry_is_replaced_and_the_others_are_kept(results, tmp_path):
    (tmp_path / "speed" / "throughput.json").write_text(json.dumps(THROUGHPUT | {"cells": []}))
    pack(tmp_path / "speed", "cpu/speed", results)
    pack(tmp_path / "speed", "cpu/other", results)
    entries = json.loads((results / "cpu" / "throughput.json").read_text())
    assert list(entries) == ["other", "speed"]
    assert entries["speed"]["cells"] == []


@pytest.mark.parametrize("place", ["cpu", "studies/speed", "cpu/speed/4k"])
def test_a_wrong_place_is_refused(place, results, tmp_path):
    with pytest.raises(ValueError, match="expected studies/NAME of a study, cpu/NAME or gpu/NAME of a benchmark"):
        pack(tmp_path / "speed", place, results)


@pytest.mark.parametrize(
    ("page", "message"),
    [
        (STUDY_TABLE.format("").replace("Two ways", "Three ways"), "no table 'Three ways' of "),
        (STUDY_TABLE.format("").replace("table2-cpu", "table9"), "no results at "),
        ("<!-- table: studies/table2-cpu, Two ways -->\n", "a table without its end"),
    ],
)
def test_a_wrong_marker_is_refused(page, message):
    with pytest.raises(ValueError, match=message):
        filled(page)


@pytest.mark.parametrize("arguments", [["pack", "nowhere", "cpu/speed"], ["pack", "nowhere"], ["unpack"]])
def test_a_mistake_is_one_line(arguments, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("results: ")
    assert error.count("\n") == 1
