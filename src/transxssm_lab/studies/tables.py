"""The tables of a study's report."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from transxssm.evaluation import ResultTable

Reports = Mapping[str, dict[str, Any]]
MEASURES = {"bits_per_byte": "bits per byte", "perplexity": "perplexity", "eval_loss": "held-out loss"}
FORMS = {"bits_per_byte": ".4f", "perplexity": ",.2f", "eval_loss": ".4f"}
NONE = "–"
NUM_STRETCHES = 6


def tables_of(report: dict[str, Any]) -> dict[str, ResultTable]:
    """All tables for which the report has results, by title."""
    contenders = report["contenders"]
    tables = {
        "Results": _results(contenders),
        "Two ways": _two_ways(contenders),
        "Seed by seed": _seed_by_seed(contenders),
        "Gain by scale": _gain_by_scale(contenders),
        "At equal wall time": _equal_time(report["equal_time"], contenders),
        "Training loss over tokens": _stretches(contenders),
        "Learning rates": _rates(contenders, "rates"),
        "Tuning": _rates(contenders, "tuning"),
        "Measured": _measured(contenders),
    }
    return {title: table for title, table in tables.items() if table is not None}


def notes_of(report: dict[str, Any]) -> list[str]:
    """Notes that a reader of the tables needs."""
    contenders = report["contenders"]
    notes = ["± is the standard deviation over seeds. FLOPs are those of training, without elementwise operations."]
    if report["settings"]["grid"].get("repeat_rates") == "best":
        notes.append(
            "The first seed was trained with every learning rate, the others with its best one. The mean includes the first seed's "
            "best run, so it is slightly optimistic."
        )
    if any(one["rate_is_at_edge"] for one in contenders.values()):
        names = [name for name, one in contenders.items() if one["rate_is_at_edge"]]
        notes.append(
            f"Best at the lowest or highest learning rate tried, so that a better one may lie beyond: {', '.join(names)}."
        )
    if report["equal_time"]["seconds"]:
        notes.append(
            "At equal wall time: the held-out loss when the fastest contender of the same size had finished. Slower ones are then in the "
            "middle of their schedule, before their learning rate has decayed."
        )
    borrowed = [name for name, one in contenders.items() if one["weights_of"] is not None]
    if borrowed:
        notes.append(f"Evaluated with the weights of another cell, not trained: {', '.join(borrowed)}.")
    if report["status"] != "complete":
        notes.append(f"Not everything was run: {report['status']}.")
    return notes


def markdown(report: dict[str, Any], pictures: Sequence[str]) -> str:
    """The report as a page."""
    lines = [f"# Study {report['study']}", "", report["title"], ""]
    lines += [*(f"- {note}" for note in notes_of(report)), ""]
    for title, table in tables_of(report).items():
        lines += [f"## {title}", "", table.to_markdown()]
    lines += [f"![{name.removesuffix('.png')}]({name})\n" for name in pictures]
    lines += ["## Where", ""]
    facts = ResultTable(["", ""], [[name, str(value)] for name, value in report["metadata"].items()])
    return "\n".join([*lines, facts.to_markdown()])


def _results(contenders: Reports) -> ResultTable:
    measures = [
        key for key in MEASURES if any(key in one["mean"] for one in contenders.values() if one["weights_of"] is None)
    ]
    rows = [
        [
            name,
            f"{one['parameters']:,}",
            _number(one["mean"].get("train_tokens"), ",.0f"),
            f"{one['flops']:.2e}" if one["flops"] else NONE,
            NONE if one["learning_rate"] is None else f"{one['learning_rate']:g}",
            *(_with_spread(one, key, FORMS[key]) for key in measures),
            _with_spread(one, "train_seconds", ",.0f"),
            str(len(_averaged(one))),
            one["status"],
        ]
        for name, one in contenders.items()
        if one["weights_of"] is None
    ]
    headings = [
        "cell",
        "parameters",
        "tokens",
        "FLOPs",
        "rate",
        *(MEASURES[key] for key in measures),
        "seconds",
        "runs",
        "status",
    ]
    return ResultTable(headings, rows)


def _averaged(one: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The runs of which a contender's mean is taken. If rates are swept, these are the runs with the best one."""
    rates = (None, one["learning_rate"])  # a tuned run has the contender's rate
    return [run for run in one["runs"] if run["learning_rate"] in rates and not run["has_diverged"]]


def _seed_by_seed(contenders: Reports) -> ResultTable | None:
    """The result of every seed, and the distance of each contender from the best of its size with the same seed.

    A seed gives all contenders the same rows in the same order, so that differences within a seed vary less than results over seeds.
    """
    trained = {name: one for name, one in contenders.items() if one["weights_of"] is None}
    runs = {name: {run["seed"]: run for run in _averaged(one)} for name, one in trained.items()}
    seeds = sorted({seed for by_seed in runs.values() for seed in by_seed})
    if len(seeds) < 2:
        return None
    found = [run for by_seed in runs.values() for run in by_seed.values()]
    key = "eval_loss" if any(run.get("bits_per_byte") is None for run in found) else "bits_per_byte"
    rows = []
    for name, one in trained.items():
        rivals = [other for other in trained if trained[other]["size"] == one["size"] and key in trained[other]["mean"]]
        best = min(rivals, key=lambda other: trained[other]["mean"][key], default=name)
        shared = [seed for seed in seeds if seed in runs[name] and seed in runs[best]]
        behind = [runs[name][seed][key] - runs[best][seed][key] for seed in shared]
        values = (_number(runs[name][seed][key], FORMS[key]) if seed in runs[name] else NONE for seed in seeds)
        rows.append([name, *values, NONE if best == name else _paired(behind)])
    return ResultTable([f"{MEASURES[key]}, seed", *(str(seed) for seed in seeds), "behind the best of its size"], rows)


def _paired(differences: Sequence[float]) -> str:
    """Mean and spread of differences, and the number of seeds for which they are positive."""
    if not differences:
        return NONE
    spread = f" ± {statistics.stdev(differences):.4f}" if len(differences) > 1 else ""
    positive = sum(difference > 0 for difference in differences)
    return f"{statistics.fmean(differences):.4f}{spread} ({positive} of {len(differences)})"


def _two_ways(contenders: Reports) -> ResultTable | None:
    placed = {(one["row"], one["column"]): one for one in contenders.values() if one["row"] and one["column"]}
    if not placed:
        return None
    rows, columns = (list(dict.fromkeys(place[axis] for place in placed)) for axis in (0, 1))
    key = "perplexity"
    return ResultTable(
        [key, *columns],
        [
            [
                row,
                *(
                    _with_spread(placed[row, column], key, ".3f") if (row, column) in placed else NONE
                    for column in columns
                ),
            ]
            for row in rows
        ],
    )


def _gain_by_scale(contenders: Reports) -> ResultTable | None:
    sizes = list(dict.fromkeys(one["size"] for one in contenders.values() if one["size"] is not None))
    if len(sizes) < 2:
        return None
    of_cell: dict[str, dict[str, Any]] = {}
    for one in contenders.values():
        of_cell.setdefault(one["cell"], {})[one["size"]] = one
    rows = []
    for cell, by_size in of_cell.items():
        values = [by_size[size]["mean"].get("bits_per_byte") if size in by_size else None for size in sizes]
        gain = None if values[0] is None or values[-1] is None else values[0] - values[-1]
        shown = [_with_spread(by_size[size], "bits_per_byte", ".4f") if size in by_size else NONE for size in sizes]
        rows.append([cell, *shown, _number(gain, ".4f")])
    return ResultTable(["bits per byte", *sizes, "gain"], rows)


def _equal_time(equal_time: dict[str, Any], contenders: Reports) -> ResultTable | None:
    if not equal_time["seconds"]:
        return None
    return ResultTable(
        ["cell", "seconds", "held-out loss", "at the end of its own schedule", "seconds of it"],
        [
            [
                name,
                f"{seconds:,.0f}",
                _number(equal_time["eval_loss"][name], ".4f"),
                _number(contenders[name]["mean"].get("eval_loss"), ".4f"),
                _number(contenders[name]["mean"].get("train_seconds"), ",.0f"),
            ]
            for name, seconds in equal_time["seconds"].items()
        ],
    )


def _stretches(contenders: Reports) -> ResultTable | None:
    """Mean training loss over intervals, each as long as all before it. The order of contenders may change during training."""
    curves = {name: one["curve"] for name, one in contenders.items() if one["curve"] and one["weights_of"] is None}
    if not curves:
        return None
    total = max(point["tokens"] for curve in curves.values() for point in curve)
    ends = [total / 2**halvings for halvings in reversed(range(NUM_STRETCHES))]
    stretches = list(zip([0.0, *ends], ends, strict=False))
    rows = []
    for name, curve in curves.items():
        losses = [[point["loss"] for point in curve if low < point["tokens"] <= high] for low, high in stretches]
        rows.append([name, *(f"{statistics.fmean(found):.3f}" if found else NONE for found in losses)])
    return ResultTable(["training loss up to tokens", *(f"{end:,.0f}" for end in ends)], rows)


def _rates(contenders: Reports, key: str) -> ResultTable | None:
    rates = sorted({entry["learning_rate"] for one in contenders.values() for entry in one[key]})
    if not rates:
        return None
    rows = []
    for name, one in contenders.items():
        if not one[key] or one["weights_of"] is not None:
            continue
        by_rate: dict[float, list[dict[str, Any]]] = {}
        for entry in one[key]:
            by_rate.setdefault(entry["learning_rate"], []).append(entry)
        rows.append([name, *(_of_rate(by_rate.get(rate, [])) for rate in rates)])
    return ResultTable(["held-out loss at rate", *(f"{rate:g}" for rate in rates)], rows)


def _of_rate(entries: Sequence[dict[str, Any]]) -> str:
    if not entries:
        return NONE
    failed = [entry for entry in entries if entry["has_diverged"]]
    if failed:
        return f"diverged (step {min(entry['last_step'] for entry in failed)})"
    return f"{math.fsum(entry['eval_loss'] for entry in entries) / len(entries):.4f}"


def _measured(contenders: Reports) -> ResultTable | None:
    keys = list(dict.fromkeys(key for one in contenders.values() for key in one["measured"]))
    if not keys:
        return None
    if any("depth" in cell for one in contenders.values() for cell in one["measured"].values()):
        return _needles(contenders)
    is_recall = any("accuracy" in cell for one in contenders.values() for cell in one["measured"].values())
    measure, form = ("accuracy", ".1%") if is_recall else ("bits_per_byte", ".4f")
    places = "length/pairs" if keys[0][0].isdigit() else "task/length"
    heading = f"accuracy at {places}" if is_recall else "bits per byte in windows of"
    rows = [
        [name, *(_number(one["measured"].get(key, {}).get(measure), form) for key in keys)]
        for name, one in contenders.items()
        if one["measured"]
    ]
    return ResultTable([heading, *keys], rows)


def _needles(contenders: Reports) -> ResultTable:
    """Share of needles found at each length: the mean and the minimum over the depths."""
    found: dict[str, dict[float, list[float]]] = {}
    for name, one in contenders.items():
        for cell in one["measured"].values():
            found.setdefault(name, {}).setdefault(cell["length"], []).append(cell["accuracy"])
    lengths = sorted({length for of_lengths in found.values() for length in of_lengths})
    rows = [
        [name, *(f"{statistics.fmean(at[n]):.1%} ({min(at[n]):.0%})" if n in at else NONE for n in lengths)]
        for name, at in found.items()
    ]
    return ResultTable(["found, mean over depths (worst depth), at length", *(f"{n:g}" for n in lengths)], rows)


def _with_spread(one: dict[str, Any], key: str, form: str) -> str:
    mean, spread = one["mean"].get(key), one["spread"].get(key)
    return _number(mean, form) + ("" if spread is None else f" ± {spread:{form}}")


def _number(value: float | None, form: str) -> str:
    return NONE if value is None else f"{value:{form}}"
