"""Decoding over the batch in tables and a picture: every batch, and what each contender comes to at its largest."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transxssm.plotting import picture
from transxssm_lab.benchmarking.report import Report, Table, draw_rates, megabytes

HEADERS = ("contender", "batch", "ms a step", "min–max", "tokens/s", "cache MB a sequence", "peak MB")


def summarize(results: dict[str, Any]) -> dict[str, Any]:
    """By contender with a measured batch: its largest, its fastest, the first that did not fit, and how the reference compares.

    `reference_over_this` is the reference's most tokens per second, at whatever batch it has them, over the contender's.
    """
    best_of = {}
    for name in results["contenders"]:
        fits = _cells(results, name, "ok")
        if fits:
            best_of[name] = max(fits, key=lambda cell: cell["tokens_per_second"])
    reference = best_of.get(results["reference"])
    summary = {}
    for name, best in best_of.items():
        largest = max(_cells(results, name, "ok"), key=lambda cell: cell["batch"])
        too_large = [cell["batch"] for cell in _cells(results, name, "out of memory")]
        summary[name] = {
            "largest_batch": largest["batch"],
            "out_of_memory_batch": min(too_large, default=None),
            "largest_batch_tokens_per_second": largest["tokens_per_second"],
            "best_batch": best["batch"],
            "best_tokens_per_second": best["tokens_per_second"],
            "reference_over_this": reference and reference["tokens_per_second"] / best["tokens_per_second"],
        }
    return summary


def tables(results: dict[str, Any]) -> list[Table]:
    """All batches, and the summary."""
    ratio = f"{results['reference']} ÷ this"
    headers = ("contender", "largest batch", "does not fit", "tokens/s there", "most tokens/s", "at batch", ratio)
    summary_rows = [
        {
            "contender": name,
            "largest batch": str(of["largest_batch"]),
            "does not fit": str(of["out_of_memory_batch"] or "–"),
            "tokens/s there": f"{of['largest_batch_tokens_per_second']:,.0f}",
            "most tokens/s": f"{of['best_tokens_per_second']:,.0f}",
            "at batch": str(of["best_batch"]),
            ratio: f"{of['reference_over_this']:.2f}" if of["reference_over_this"] else "–",
        }
        for name, of in results["summary"].items()
    ]
    return [
        Table("decode", HEADERS, list(rows(results))),
        Table("largest batch", headers, summary_rows),
    ]


def rows(results: dict[str, Any]) -> Iterator[dict[str, str]]:
    """For each cell what stands under each of `HEADERS`; where nothing was timed, why."""
    for cell in results["cells"]:
        row = dict.fromkeys(HEADERS, "–") | {"contender": cell["contender"], "batch": str(cell["batch"])}
        if cell["status"] != "ok":
            yield row | {"ms a step": cell["status"], "min–max": cell["detail"]}
            continue
        ms = {name: f"{value:,.1f}" for name, value in cell["milliseconds_per_step"].items()}
        yield row | {
            "ms a step": ms["median"],
            "min–max": f"{ms['min']}–{ms['max']}",
            "tokens/s": f"{cell['tokens_per_second']:,.0f}",
            "cache MB a sequence": f"{cell['cache_bytes_per_sequence'] / 1e6:,.2f}",
            "peak MB": megabytes(cell["peak_bytes"]),
        }


def plot(path: Path, results: dict[str, Any]) -> None:
    """Tokens per second over the batch on a logarithmic plane, a line for each contender."""
    with picture(path) as panel:
        draw_rates(panel, [cell for cell in results["cells"] if cell["tokens_per_second"]], "batch")
        panel.set_title(f"Decoding after {results['settings']['length']:,} tokens")
        panel.set_xlabel("batch (sequences)")


OVER_BATCH = Report(tables, plot)


def _cells(results: dict[str, Any], contender: str, status: str) -> list[dict[str, Any]]:
    return [cell for cell in results["cells"] if (cell["contender"], cell["status"]) == (contender, status)]
