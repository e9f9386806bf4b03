"""A benchmark's results as JSON, as Markdown and as a picture in the manner of the paper's Figure 4."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from transxssm.benchmarking.lengths import format_length

HEADERS = (
    "tokens",
    "contender",
    "ms (min–max)",
    "tokens/s",
    "time / reference (min–max)",
    "GFLOP/s",
    "time / floor",
    "peak memory, MB",
    "of it the step, MB",
)
PLOT_COLUMNS = 3


def write_report(folder: Path, name: str, results: dict[str, Any]) -> None:
    """Writes `name`.json, `name`.md and, where anything was timed, `name`.png into the folder."""
    write_json(folder / f"{name}.json", results)
    write_whole(folder / f"{name}.md", markdown(results).encode())
    if any(cell["tokens_per_second"] for cell in results["cells"]):
        plot(folder / f"{name}.png", results)


def write_json(path: Path, results: dict[str, Any]) -> None:
    """Writes results so that a kill leaves the old file or the new one."""
    write_whole(path, (json.dumps(results, indent=2) + "\n").encode())


def write_whole(path: Path, content: bytes) -> None:
    """Replaces a file at once, its folder made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.unfinished")
    aside.write_bytes(content)
    aside.replace(path)


def modes_of(results: dict[str, Any]) -> list[str]:
    """Modes that have cells, in the order they were measured."""
    return list(dict.fromkeys(cell["mode"] for cell in results["cells"]))


def rows(results: dict[str, Any], mode: str) -> Iterator[list[str]]:
    """The table of a mode, a row for each cell under `HEADERS`; a cell without figures says why in the third column."""
    for cell in results["cells"]:
        if cell["mode"] != mode:
            continue
        start = [format_length(cell["length"]), cell["contender"]]
        memory = [_megabytes(cell["peak_bytes"]), _megabytes(cell["step_bytes"])]
        if not cell["seconds"]:
            yield [*start, f"{cell['status']}: {cell['detail']}", "–", "–", "–", "–", *memory]
            continue
        milliseconds = {name: 1e3 * value for name, value in cell["seconds"].items()}
        if mode == "decode":  # a run is several tokens; what users feel is one
            milliseconds = {name: value / cell["num_tokens"] for name, value in milliseconds.items()}
        per_second = cell["flops_per_second"]
        yield [
            *start,
            _spread(milliseconds, ".1f") + ("" if cell["status"] == "ok" else f" ({cell['status']})"),
            f"{cell['tokens_per_second']:,.0f}" if cell["tokens_per_second"] else "–",
            _spread(cell["ratio_to_reference"], ".2f") if cell["ratio_to_reference"] else "–",
            f"{per_second / 1e9:,.0f}" if per_second else "–",
            f"{cell['times_floor']:.2f}" if cell["times_floor"] else "–",
            *memory,
        ]


def notes(results: dict[str, Any]) -> Iterator[str]:
    """What there is to say besides the tables, a line each."""
    peak = results["peak"]
    if peak:
        rows_, inner, columns = max(peak["products"], key=lambda product: product["flops_per_second"])["shape"]
        yield (
            f"Peak of a matrix product: {peak['flops_per_second'] / 1e9:,.0f} GFLOP/s in {results['settings']['dtype']} "
            f"({rows_} × {inner} × {columns}); floors are FLOPs at this rate."
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
    """Name, kind, parameters and what they are relative to the reference's."""
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


def markdown(results: dict[str, Any]) -> str:
    """The report as a page."""
    metadata, settings = results["metadata"], results["settings"]
    lines = [f"# transxssm benchmark {results['benchmark']}", ""]
    facts = {**metadata, **{f"setting: {name}": value for name, value in settings.items()}}
    lines += _table(("", ""), ([name, _plain(value)] for name, value in facts.items()))
    if results.get("contenders"):
        lines += ["", *_table(CONTENDER_HEADERS, contender_rows(results))]
    lines += ["", *(f"- {note}" for note in notes(results))]
    for mode in modes_of(results):
        headers = list(HEADERS)
        if mode == "decode":
            headers[2] = "ms a token (min–max)"
        lines += ["", f"## {mode}", "", *_table(headers, rows(results, mode))]
    return "\n".join(lines) + "\n"


def plot(path: Path, results: dict[str, Any]) -> None:
    """Tokens per second over length on a logarithmic plane: a panel for each mode, a line for each contender."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    timed = [cell for cell in results["cells"] if cell["tokens_per_second"]]
    modes = list(dict.fromkeys(cell["mode"] for cell in timed))
    columns = min(PLOT_COLUMNS, len(modes))
    num_rows = -(-len(modes) // columns)
    figure = Figure(figsize=(5 * columns, 4 * num_rows), layout="constrained")
    panels = figure.subplots(num_rows, columns, squeeze=False).flatten()
    names = list(dict.fromkeys(cell["contender"] for cell in timed))
    for panel in panels[len(modes) :]:
        panel.set_visible(False)
    for mode, panel in zip(modes, panels, strict=False):
        for index, name in enumerate(names):
            points = [
                (cell["length"], cell["num_tokens"], cell["seconds"])
                for cell in timed
                if cell["mode"] == mode and cell["contender"] == name
            ]
            if not points:
                continue
            lengths = [length for length, _, _ in points]
            medians = [tokens / seconds["median"] for _, tokens, seconds in points]
            slow, fast = ([tokens / seconds[end] for _, tokens, seconds in points] for end in ("max", "min"))
            panel.plot(lengths, medians, "o-", label=name, color=f"C{index}", markersize=4)
            panel.fill_between(lengths, slow, fast, color=f"C{index}", alpha=0.2, linewidth=0)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        ticks = sorted({cell["length"] for cell in timed if cell["mode"] == mode})
        panel.set_xticks(ticks, [format_length(length) for length in ticks])
        panel.set_title(mode)
        panel.set_xlabel("sequence length (tokens)")
        panel.set_ylabel("tokens per second")
        panel.grid(alpha=0.3)
        panel.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(path)


def _table(headers: Iterable[str], table_rows: Iterable[list[str]]) -> list[str]:
    headers = list(headers)
    lines = [headers, ["---"] * len(headers), *table_rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


def _spread(values: dict[str, float], form: str) -> str:
    return f"{values['median']:{form}} ({values['min']:{form}}–{values['max']:{form}})"


def _megabytes(num_bytes: int | None) -> str:
    return "–" if num_bytes is None else f"{num_bytes / 1e6:,.0f}"


def _lengths(fit: dict[str, Any]) -> str:
    return ", ".join(map(format_length, fit["lengths"]))


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
