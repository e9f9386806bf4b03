"""A benchmark's results as JSON, as Markdown and as a plot like the paper's Figure 4."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from transxssm.plotting import draw_line, label_lines, looks_of, picture, set_ticks, short_ticks
from transxssm.whole_files import write_text_whole
from transxssm.wording import format_length

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HEADERS = (
    "tokens",
    "contender",
    "ms",
    "min–max",
    "tokens/s",
    "× reference",
    "GFLOP/s",
    "× floor",
    "peak MB",
    "step MB",
)
PLOT_COLUMNS = 3
TITLES = {
    "train": "Training step",
    "train-autocast": "Training step under autocast",
    "train-checkpointed": "Training step with gradient checkpointing",
    "prefill": "Prefill",
    "decode": "Decoding",
    "optimizer": "Optimiser step",
}


class Table(NamedTuple):
    """Rows under headers."""

    title: str
    headers: Sequence[str]
    rows: list[dict[str, str]]


@dataclass(frozen=True)
class Report:
    """The functions that show a benchmark's results.

    Args:
        tables: makes the tables of the results.
        plot: writes a plot of the results into a file.
    """

    tables: Callable[[dict[str, Any]], Iterable[Table]]
    plot: Callable[[Path, dict[str, Any]], None]


def write_report(folder: Path, name: str, results: dict[str, Any], report: Report) -> None:
    """Writes `name`.json, `name`.md and, where anything was timed, `name`.png into the folder."""
    write_json(folder / f"{name}.json", results)
    write_text_whole(folder / f"{name}.md", markdown(results, report.tables(results)))
    if any(cell["tokens_per_second"] for cell in results["cells"]):
        report.plot(folder / f"{name}.png", results)


def write_json(path: Path, results: dict[str, Any]) -> None:
    """Writes results so that a kill leaves the old file or the new one."""
    write_text_whole(path, json.dumps(results, indent=2) + "\n")


def mode_tables(results: dict[str, Any]) -> list[Table]:
    """A table for each mode that has cells, in the order of measurement."""
    modes = dict.fromkeys(cell["mode"] for cell in results["cells"])
    return [Table(mode, HEADERS, list(rows(results, mode))) for mode in modes]


def rows(results: dict[str, Any], mode: str) -> Iterator[dict[str, str]]:
    """The rows of a mode's table, one for each cell, by header (`HEADERS`). If nothing was timed, the row says why.

    The milliseconds are those of a run or, in decoding, of a token. The ratio to the reference is the median over the turns, with the
    extremes.
    """
    for cell in results["cells"]:
        if cell["mode"] != mode:
            continue
        row = dict.fromkeys(HEADERS, "–")
        row |= {"tokens": format_length(cell["length"]), "contender": cell["contender"]}
        row |= {"peak MB": megabytes(cell["peak_bytes"]), "step MB": megabytes(cell["step_bytes"])}
        if cell["status"] != "ok":
            row |= {"ms": cell["status"], "min–max": cell["detail"]}
        if cell["seconds"]:
            unit = cell["num_tokens"] if mode == "decode" else 1
            ms = {name: f"{1e3 * value / unit:,.1f}" for name, value in cell["seconds"].items()}
            note = "" if cell["status"] == "ok" else f" ({cell['status']})"
            row |= {"ms": ms["median"] + note, "min–max": f"{ms['min']}–{ms['max']}"}
        if ratio := cell["ratio_to_reference"]:
            row["× reference"] = f"{ratio['median']:.2f} ({ratio['min']:.2f}–{ratio['max']:.2f})"
        if cell["tokens_per_second"]:
            row["tokens/s"] = f"{cell['tokens_per_second']:,.0f}"
        if cell["flops_per_second"]:
            row["GFLOP/s"] = f"{cell['flops_per_second'] / 1e9:,.1f}"
        if cell["times_floor"]:
            row["× floor"] = f"{cell['times_floor']:,.1f}"
        yield row


def notes(results: dict[str, Any]) -> Iterator[str]:
    """Notes below the tables, one line each."""
    peak = results["peak"]
    if peak:
        rows_, inner, columns = max(peak["products"], key=lambda product: product["flops_per_second"])["shape"]
        yield (
            f"Peak of a matrix product: {peak['flops_per_second'] / 1e9:,.0f} GFLOP/s in {results['settings']['dtype']} "
            f"({rows_} × {inner} × {columns}); floors are FLOPs at this rate."
        )
    uses_mamba2 = {"mamba2", "jamba", "mamba2-scan"} & {cell["contender"] for cell in results["cells"]}
    if uses_mamba2 and results["metadata"]["mamba_ssm"] is None:
        yield (
            f"Without the package mamba_ssm transformers computes {', '.join(sorted(uses_mamba2))} by a reference in PyTorch, "
            "not by Mamba-2's own kernels: their times say what users of such an installation get."
        )
    for share in results.get("ssd_share", []):
        yield (
            f"SSD operator, forward and backward, in a training step of {format_length(share['length'])} tokens: "
            f"{share['share']:.1%} (under the profiler)."
        )
    for contender, fit in results.get("prefill_exponents", {}).items():
        yield f"Prefill time grows with length to the power {fit['exponent']:.2f}: {contender} ({_lengths(fit)})."
    if results["status"] != "complete":
        yield f"Not everything was measured: {results['status']}."


def contender_rows(results: dict[str, Any]) -> Iterator[list[str]]:
    """Name, kind and number of parameters of each contender, and that number relative to the reference's."""
    for name, contender in results.get("contenders", {}).items():
        yield [
            name,
            contender["label"],
            f"{contender['parameters']:,}",
            f"{contender['parameters_relative'] - 1:+.2%}",
            str(contender["num_layers"]),
            str(contender["intermediate_size"] or "–"),
        ]


CONTENDER_HEADERS = ("contender", "model", "parameters", "difference", "layers", "FFN")


def markdown(results: dict[str, Any], tables: Iterable[Table]) -> str:
    """The report as a page."""
    metadata, settings = results["metadata"], results["settings"]
    lines = [f"# transxssm benchmark {results['benchmark']}", ""]
    facts = {**metadata, **{f"setting: {name}": value for name, value in settings.items()}}
    lines += _table(("", ""), ([name, _plain(value)] for name, value in facts.items()))
    if results.get("contenders"):
        lines += ["", *_table(CONTENDER_HEADERS, contender_rows(results))]
    lines += ["", *(f"- {note}" for note in notes(results))]
    for title, headers, table_rows in tables:
        lines += ["", f"## {title}", "", *_table(headers, ([row[name] for name in headers] for row in table_rows))]
    return "\n".join(lines) + "\n"


def plot(path: Path, results: dict[str, Any]) -> None:
    """Tokens per second over length on a logarithmic plane: a panel for each mode, a line for each contender."""
    timed = [cell for cell in results["cells"] if cell["tokens_per_second"]]
    modes = list(dict.fromkeys(cell["mode"] for cell in timed))
    columns = min(PLOT_COLUMNS, len(modes))
    num_rows = -(-len(modes) // columns)
    with picture(path, num_rows, columns, width=6 * columns, height=4 * num_rows) as panels:
        panels = np.atleast_1d(panels).flatten()
        for panel in panels[len(modes) :]:
            panel.set_visible(False)
        for mode, panel in zip(modes, panels, strict=False):
            draw_rates(panel, [cell for cell in timed if cell["mode"] == mode], "length")
            panel.set_title(TITLES.get(mode, mode))
            panel.set_xlabel("sequence length (tokens)")


OVER_LENGTH = Report(mode_tables, plot)


def draw_rates(panel: "Axes", timed: Sequence[dict[str, Any]], x: str) -> None:
    """Draws tokens per second of timed cells over their integer field `x`, on logarithmic axes, with the spread over the repeats."""
    for name, look in looks_of(cell["contender"] for cell in timed).items():
        points = [(cell[x], cell["num_tokens"], cell["seconds"]) for cell in timed if cell["contender"] == name]
        places = [place for place, _, _ in points]
        medians = [tokens / seconds["median"] for _, tokens, seconds in points]
        slow, fast = ([tokens / seconds[end] for _, tokens, seconds in points] for end in ("max", "min"))
        draw_line(panel, look, places, medians, slow, fast)
    set_ticks(panel, [cell[x] for cell in timed])
    panel.set_yscale("log")
    short_ticks(panel, "y")
    panel.set_ylabel("tokens per second")
    label_lines(panel)


def _table(names: Sequence[str], table_rows: Iterable[list[str]]) -> list[str]:
    lines = [names, ["---"] * len(names), *table_rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


def megabytes(num_bytes: float | None) -> str:
    """Formats bytes as megabytes, such as "1,024". A dash stands for None."""
    return "–" if num_bytes is None else f"{num_bytes / 1e6:,.0f}"


def _lengths(fit: dict[str, Any]) -> str:
    return ", ".join(map(format_length, fit["lengths"]))


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
