"""Writes the tables of docs/results.md anew from the JSON under results/: python scripts/write_tables.py [PAGE].

A table stands between two comments, the first of which says where its figures come from: a folder under results/ and the table's
title, `<!-- table: studies/table2-cpu, Two ways -->`, up to `<!-- end of table -->`. A study's folder has the tables of its README; a
benchmark's has "Ratios", time relative to the reference.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

from transxssm.benchmarking.lengths import format_length
from transxssm.evaluation import ResultTable
from transxssm.studies.tables import tables_of
from transxssm.whole_files import write_text_whole

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "results.md"
BLOCK = re.compile(r"(<!-- table: ([^,\n]+), ([^\n]+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def filled(page: str, results: Path = ROOT / "results") -> str:
    """The page with every table as its JSON under `results` has it.

    Raises:
        ValueError: a table of a folder or a title that is not there; a table without an end.
    """

    def table(match: re.Match[str]) -> str:
        opening, folder, title, end = match.groups()
        tables = _tables(results / folder)
        if title not in tables:
            raise ValueError(f"no table {title!r} in {results / folder}: expected one of {', '.join(tables)}")
        return f"{opening}\n{tables[title].to_markdown()}\n{end}"

    if page.count("<!-- table: ") != len(BLOCK.findall(page)):
        raise ValueError("a table without its end: every '<!-- table: FOLDER, TITLE -->' needs '<!-- end of table -->'")
    return BLOCK.sub(table, page)


def _tables(folder: Path) -> dict[str, ResultTable]:
    if (folder / "results.json").is_file():
        return tables_of(json.loads((folder / "results.json").read_text()))
    if (folder / "throughput.json").is_file():
        return {"Ratios": _ratios(json.loads((folder / "throughput.json").read_text()))}
    raise ValueError(f"no results in {folder}: expected results.json of a study or throughput.json of a benchmark")


def _ratios(report: dict[str, Any]) -> ResultTable:
    cells = {(cell["mode"], cell["contender"], cell["length"]): cell for cell in report["cells"]}
    lengths = list(dict.fromkeys(length for _, _, length in cells))
    lines = dict.fromkeys((mode, name) for (mode, name, _), cell in cells.items() if name != cell["reference"])
    rows = [
        [f"{mode}, {name}", *(_ratio(cells.get((mode, name, length))) for length in lengths)] for mode, name in lines
    ]
    return ResultTable(["its time / ours: median (extremes)", *map(format_length, lengths)], rows)


def _ratio(cell: dict[str, Any] | None) -> str:
    if cell is None or not cell["ratio_to_reference"]:
        return "–"
    ratio = cell["ratio_to_reference"]
    return f"{ratio['median']:.2f} ({ratio['min']:.2f}–{ratio['max']:.2f})"


def main(page: Path) -> int:
    """Fills a page's tables; returns the exit code, 2 with one line on stderr where that cannot be done."""
    try:
        write_text_whole(page, filled(page.read_text()))
    except (OSError, ValueError) as error:
        sys.stderr.write(f"write_tables: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else PAGE))
