"""Keeps results/ small, and writes what is made of it: the tables of the documentation and the reports of the studies.

    python scripts/results.py                      # writes everything again from the data under results/
    python scripts/results.py pack FOLDER PLACE    # takes results in, for instance runs/studies/ratio-cpu studies/ratio-cpu

A study under results/studies/ has results.json, README.md and runs.parquet, the logs of its runs. A benchmark or a profile becomes an
entry of a file of its kind: `gpu/figure4` is the entry "figure4" of results/gpu/throughput.json, decode.json, ops.json or profile.json.

A table in a page stands between two comments, the first of which says where its figures come from: a place under results/ and the
table's title, `<!-- table: studies/table2-cpu, Two ways -->`, up to `<!-- end of table -->`. A study has the tables of its README, a
throughput benchmark "Ratios" (times relative to the reference) and "Ratios to NAME" (to another contender), a decoding benchmark
"Decoding", and results/cpu and results/gpu "Runs", the list of their entries. `<!-- study: table2-cpu -->` up to
`<!-- end of study -->` holds all that a study found: how it was run, the command that repeats it, and every table.
"""

import json
import re
import statistics
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from transxssm.evaluation import ResultTable
from transxssm.whole_files import write_text_whole
from transxssm.wording import format_length
from transxssm_lab.studies.archive import pack_study, rewrite_report
from transxssm_lab.studies.tables import notes_of, tables_of

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results"
CORPORA = {
    "python-stdlib": "Python's standard library",
    "python-environment": "the Python source installed on the machine",
}
KINDS = ("throughput", "decode", "ops", "profile")
STUDY = re.compile(r"(<!-- study: ([^\n]+) -->\n).*?(<!-- end of study -->)", re.DOTALL)
BLOCK = re.compile(r"(<!-- table: ([^,\n]+), ([^\n]+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def pages() -> list[Path]:
    """The pages that may have tables."""
    return [*sorted((ROOT / "docs").rglob("*.md")), *sorted(RESULTS.glob("*/README.md"))]


def filled(page: str, results: Path = RESULTS) -> str:
    """The page with every table and study as the data under `results` has it.

    Raises:
        ValueError: a table of a place or a title that does not exist; a table or a study without an end.
    """

    def table(match: re.Match[str]) -> str:
        opening, place, title, end = match.groups()
        tables = _tables(results, place)
        if title not in tables:
            raise ValueError(f"no table {title!r} of {place}: expected one of {', '.join(tables)}")
        return f"{opening}\n{tables[title].to_markdown()}\n{end}"

    def study(match: re.Match[str]) -> str:
        opening, name, end = match.groups()
        if not (results / "studies" / name / "results.json").is_file():
            raise ValueError(f"no study {name!r}: expected a folder of {results / 'studies'} with results.json")
        report = json.loads((results / "studies" / name / "results.json").read_text(encoding="utf-8"))
        return f"{opening}\n{_study(report)}\n{end}"

    if page.count("<!-- study: ") != len(STUDY.findall(page)):
        raise ValueError("a study without its end: every '<!-- study: NAME -->' needs '<!-- end of study -->'")
    page = STUDY.sub(study, page)
    if page.count("<!-- table: ") != len(BLOCK.findall(page)):
        raise ValueError("a table without its end: every '<!-- table: PLACE, TITLE -->' needs '<!-- end of table -->'")
    return BLOCK.sub(table, page)


def pack(folder: Path, place: str, results: Path = RESULTS) -> None:
    """Takes the results of a study, a benchmark or a profile into `results`, in place of what stands there.

    Raises:
        ValueError: the folder holds none, or the place is not of the form that its kind has.
    """
    part, _, name = place.partition("/")
    kinds = [kind for kind in KINDS if (folder / f"{kind}.json").is_file()]
    if not name or "/" in name or (part == "studies") == bool(kinds):
        raise ValueError(
            f"got {place!r} for {folder}: expected studies/NAME of a study, cpu/NAME or gpu/NAME of a benchmark"
        )
    if part == "studies":
        pack_study(folder, results / place)
    for kind in kinds:
        entries = read_entries(results / part / f"{kind}.json") | {
            name: json.loads((folder / f"{kind}.json").read_text(encoding="utf-8"))
        }
        write_text_whole(results / part / f"{kind}.json", json.dumps(dict(sorted(entries.items())), indent=1) + "\n")


def read_entries(path: Path) -> dict[str, dict[str, Any]]:
    """The results in a file of one kind, by name; none where there is no file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _tables(results: Path, place: str) -> dict[str, ResultTable]:
    if (results / place / "results.json").is_file():
        return tables_of(json.loads((results / place / "results.json").read_text(encoding="utf-8")))
    part, _, name = place.partition("/")
    entries = {kind: read_entries(results / part / f"{kind}.json") for kind in KINDS}
    if not name and any(entries.values()):
        return {"Runs": _runs(entries)}
    tables = {}
    if name in entries["throughput"]:
        report = entries["throughput"][name]
        tables["Ratios"] = _ratios(report)
        names = dict.fromkeys(cell["contender"] for cell in report["cells"])
        tables |= {f"Ratios to {other}": _ratios(relative_to(report, other)) for other in names}
    if name in entries["decode"]:
        tables["Decoding"] = _decoding(entries["decode"][name])
    if not tables:
        raise ValueError(
            f"no results at {place}: expected a study's results.json or a benchmark's name under {results}"
        )
    return tables


def _study(report: dict[str, Any]) -> str:
    """The section of a study: how it was run, what to know, and its tables."""
    lines = [f"## {report['study']}", "", f"*{report['title']}*", "", *(f"- {fact}" for fact in _facts(report)), ""]
    for title, table in tables_of(report).items():
        lines += [f"**{title}**", "", table.to_markdown()]
    return "\n".join(lines)


def _facts(report: dict[str, Any]) -> Iterator[str]:
    settings, metadata = report["settings"], report["metadata"]
    trained = [one for one in report["contenders"].values() if one["weights_of"] is None]
    parameters = sorted(one["parameters"] for one in trained)
    tokens = max(one["mean"].get("train_tokens", 0) for one in trained)
    sizes = " to ".join(dict.fromkeys(_millions(number) for number in (parameters[0], parameters[-1])))
    yield f"{sizes} parameters, {_millions(tokens)} tokens a run, {_text(settings)}."
    rates = sorted({entry["learning_rate"] for one in trained for entry in (one["tuning"] or one["rates"])})
    seeds = sorted({run["seed"] for one in trained for run in one["runs"]})
    how = f"compared over {settings['tuning']['max_steps']:,} steps" if settings["tuning"] else "compared by whole runs"
    how += " of the first seed" if settings["grid"].get("repeat_rates") == "best" else ""
    tried = (
        f"Learning rates {', '.join(f'{rate:g}' for rate in rates)}, {how}"
        if len(rates) > 1
        else f"Learning rate {rates[0]:g}"
    )
    yield f"{tried}; {'seeds' if len(seeds) > 1 else 'seed'} {', '.join(map(str, seeds))}."
    yield f"Trained on: {metadata['trained_on']}. Report written at commit {_commit(metadata)}, {metadata['date'][:10]}."
    yield f"Run it: `{_study_command(metadata)}`. Data: `results/studies/{report['study']}`."
    yield from notes_of(report)


def _text(settings: dict[str, Any]) -> str:
    if settings["recall"] is not None:
        return "associative recall in place of text"
    if settings.get("algorithmic") is not None:
        return f"{settings['algorithmic']['task']} in place of text"
    corpus = CORPORA.get(settings["data"]["corpus"], settings["data"]["corpus"])
    if settings["needle"] is not None:
        return f"needles in {corpus}"
    return f"{corpus} in rows of {settings['data']['sequence_length']:,} tokens"


def _study_command(metadata: dict[str, Any]) -> str:
    words = metadata["command"].replace("__main__.py", "transxssm").replace(" --report", "")
    return " ".join(f'"{word}"' if "[" in word else word for word in words.split() if "output_dir" not in word)


def _millions(number: float) -> str:
    return f"{number / 1e6:.1f}M" if number < 1e8 else f"{number / 1e6:.0f}M"


def relative_to(report: dict[str, Any], reference: str) -> dict[str, Any]:
    """A throughput report with times relative to another contender's, turn by turn."""
    of = {(cell["mode"], cell["length"]): cell for cell in report["cells"] if cell["contender"] == reference}
    cells = []
    for cell in report["cells"]:
        other, ratios = of.get((cell["mode"], cell["length"])), []
        if other is not None and cell["ratio_to_reference"] and other["ratio_to_reference"]:
            turns = zip(cell["repeat_ratios"], other["repeat_ratios"], strict=True)
            ratios = [mine / theirs for mine, theirs in turns]
        ratio = {"min": min(ratios), "median": statistics.median(ratios), "max": max(ratios)} if ratios else None
        cells.append(cell | {"reference": reference, "ratio_to_reference": ratio})
    return report | {"cells": cells}


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


def _decoding(report: dict[str, Any]) -> ResultTable:
    rate = {(cell["contender"], cell["batch"]): cell["tokens_per_second"] for cell in report["cells"]}
    batches = sorted({batch for _, batch in rate})
    rows = [
        [name, *(f"{rate[name, batch]:,.0f}" if rate.get((name, batch)) else "–" for batch in batches)]
        for name in report["contenders"]
    ]
    return ResultTable(["tokens decoded a second, with sequences", *map(str, batches)], rows)


def _runs(entries: dict[str, dict[str, dict[str, Any]]]) -> ResultTable:
    rows = [
        [
            name,
            f"`{_command(of['metadata'])}`",
            _machine(of["metadata"]),
            of["metadata"]["date"][:10],
            _commit(of["metadata"]),
        ]
        for kind in KINDS
        for name, of in entries[kind].items()
    ]
    return ResultTable(["entry", "command", "machine", "date", "commit"], rows)


def _command(metadata: dict[str, Any]) -> str:
    """The command as a user would repeat it: without the folder that its results went to."""
    command = metadata["command"].replace("__main__.py", "transxssm")
    return re.sub(r"(profile_step\.py) \S+| --output \S+", r"\1", command)


def _machine(metadata: dict[str, Any]) -> str:
    return metadata["gpu"] or f"{metadata['threads']} cores of an {metadata['cpu']}, {metadata['cpu_capability']}"


def _commit(metadata: dict[str, Any]) -> str:
    return (metadata["commit"] or "unknown")[:7] + (", with changes" if metadata["dirty"] else "")


def write(paths: Iterable[Path]) -> None:
    """Fills the tables of these pages."""
    for path in paths:
        page = path.read_text(encoding="utf-8")
        if (written := filled(page)) != page:
            write_text_whole(path, written)


def main(arguments: list[str]) -> int:
    """Runs one of the two commands; returns the exit code, 2 with one line on stderr where that cannot be done."""
    try:
        match arguments:
            case []:
                for report in sorted(RESULTS.glob("studies/*/results.json")):
                    rewrite_report(report.parent)
                write(pages())
            case ["pack", folder, place]:
                pack(Path(folder), place)
                write(pages())
            case _:
                raise ValueError(f"got {' '.join(arguments)!r}: expected nothing, or pack FOLDER PLACE")
    except (OSError, ValueError) as error:
        sys.stderr.write(f"results: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
