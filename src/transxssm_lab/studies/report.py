"""The report of a study: results of every contender from its runs, as JSON, Markdown and plots."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from transxssm.evaluation import plot_needle
from transxssm.machine import run_metadata
from transxssm.models import read_device
from transxssm.plotting import Look, binned, draw_line, label_lines, looks_of, picture, set_ticks, short_ticks
from transxssm.training.recipe import TRAINING_DEFAULTS
from transxssm.whole_files import write_text_whole
from transxssm_lab.studies.definition import Study
from transxssm_lab.studies.outcome import Outcome
from transxssm_lab.studies.schedule import Contender, PlannedRun, expected_config, sequence_length, size_of
from transxssm_lab.studies.tables import markdown
from transxssm_lab.studies.tasks import wanted_cells

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Reports = Mapping[str, dict[str, Any]]
LOSS, RATES, LENGTHS = "loss.png", "loss-over-rate.png", "bits-per-byte-over-length.png"


RESULTS, PAGE = "results.json", "README.md"
MEASURED = ("length", "depth", "accuracy", "bits_per_byte", "perplexity", "nats_per_token")
AVERAGED = ("eval_loss", "perplexity", "bits_per_byte", "train_seconds", "train_tokens")


def plot_curves(folder: Path, contenders: Reports) -> list[str]:
    """Plots training loss over tokens and over seconds, and held-out loss as points: means over seeds, with the extremes as bands."""
    drawn = {name: one for name, one in contenders.items() if one["curve"] and one["weights_of"] is None}
    if not drawn:
        return []
    looks = contender_looks(drawn)
    with picture(folder / LOSS, columns=2, width=12, height=4.5) as panels:
        for axes, key, label in zip(panels, ("tokens", "seconds"), ("tokens", "seconds of training"), strict=True):
            for name, one in drawn.items():
                draw_curve(axes, looks[name], one, key)
            axes.set_xlabel(label)
            short_ticks(axes, "x")
        panels[0].set_ylabel("loss (nats per token)")
        panels[0].set_title("Training loss; points: held out")
        label_lines(panels[1])
    return [LOSS]


def draw_curve(axes: "Axes", look: Look, one: Mapping[str, Any], key: str) -> None:
    """Draws a contender's training loss over "tokens" or "seconds", and its held-out loss as points."""
    points = [{"low": point["loss"], "high": point["loss"], **point} for point in one["curve"]]
    means = binned(points, key, ("loss", "low", "high"))
    draw_line(axes, look, means[key], means["loss"], means["low"], means["high"], marker="")  # type: ignore[arg-type]
    held_out = one["held_out"]
    axes.plot([point[key] for point in held_out], [point["loss"] for point in held_out], "o", color=look.colour)


def plot_rates(folder: Path, contenders: Reports) -> list[str]:
    """Plots held-out loss over the learning rate, of full runs if they sweep it, else of tuning. Runs that diverged leave a gap."""
    losses_of: dict[str, dict[float, list[float]]] = {}
    for name, one in contenders.items():
        for entry in (one["rates"] or one["tuning"]) if one["weights_of"] is None else ():
            loss = entry["eval_loss"]
            loss = loss if loss is not None and math.isfinite(loss) else math.nan
            losses_of.setdefault(name, {}).setdefault(entry["learning_rate"], []).append(loss)
    if not losses_of:
        return []
    looks = contender_looks({name: contenders[name] for name in losses_of})
    with picture(folder / RATES, width=8, height=5) as axes:
        for name, by_rate in losses_of.items():
            rates = sorted(by_rate)
            means, low, high = ([of(by_rate[rate]) for rate in rates] for of in (statistics.fmean, min, max))
            draw_line(axes, looks[name], rates, means, low, high)
        set_ticks(axes, [rate for by_rate in losses_of.values() for rate in by_rate], base=10)
        axes.set_xlabel("learning rate")
        axes.set_ylabel("held-out loss (nats per token)")
        label_lines(axes)
    return [RATES]


def plot_lengths(folder: Path, contenders: Reports) -> list[str]:
    """Plots bits per byte over the length of the windows."""
    drawn = {
        name: one
        for name, one in contenders.items()
        if any("bits_per_byte" in cell for cell in one["measured"].values())
    }
    if not drawn:
        return []
    with picture(folder / LENGTHS) as axes:
        draw_lengths(axes, drawn)
    return [LENGTHS]


def draw_lengths(axes: "Axes", contenders: Reports) -> None:
    """Draws bits per byte of each contender over the length of the windows."""
    looks, lengths = contender_looks(contenders), set()
    for name, one in contenders.items():
        points = sorted((int(length), cell["bits_per_byte"]) for length, cell in one["measured"].items())
        lengths |= {length for length, _ in points}
        draw_line(axes, looks[name], *zip(*points, strict=True))
    set_ticks(axes, lengths)
    axes.set_xlabel("window (tokens)")
    axes.set_ylabel("bits per byte")
    label_lines(axes)


def plot_needles(folder: Path, contenders: Reports) -> list[str]:
    """Plots a heat map over lengths and depths for every contender that was evaluated on needles."""
    names = []
    for name, one in contenders.items():
        cells = [cell for cell in one["measured"].values() if "depth" in cell]
        if cells:
            names.append(f"needle-{name}.png")
            plot_needle(folder / names[-1], cells)
    return names


def contender_looks(contenders: Reports) -> dict[str, Look]:
    """The style of each contender: cells have their own, and the second size of a cell is dashed."""
    of_cells = looks_of(one["cell"] for one in contenders.values())
    sizes = list(dict.fromkeys(one["size"] for one in contenders.values()))
    looks = {}
    for name, one in contenders.items():
        look = of_cells[one["cell"]]
        if one["size"] is not None:
            look = look._replace(
                name=f"{look.name}, {one['size']}", line=look.line if one["size"] == sizes[0] else "--"
            )
        looks[name] = look
    return looks


@dataclass(frozen=True)
class Evidence:
    """The runs and evaluations of a contender.

    Args:
        contender: the contender.
        tuning: outcome of each short run, by learning rate.
        full: the full runs. If the contender uses another's weights, the runs of that one.
        measured: cells of the evaluation, by the run's folder.
    """

    contender: Contender
    tuning: Mapping[float | None, Outcome]
    full: Sequence[tuple[PlannedRun, Outcome]]
    measured: Mapping[Path, dict[str, Any]]


def best_rate(outcomes: Mapping[float | None, Outcome]) -> float | None:
    """The learning rate with the lowest held-out loss, or None if all runs diverged."""
    alive = {rate: outcome.eval_loss for rate, outcome in outcomes.items() if not outcome.has_diverged}
    return min(alive, key=alive.__getitem__) if alive else None


def write_report(study: Study, evidence: Sequence[Evidence], status: str) -> dict[str, Any]:
    """Writes results.json, README.md and the plots into the study's folder.

    Args:
        study: the study.
        evidence: evidence of every contender.
        status: "complete", or why not everything was done.

    Returns:
        The report.
    """
    metadata = {"trained_on": _machines_of(evidence)} | run_metadata(read_device("auto"), None)
    report = report_of(study, evidence, status, metadata)
    folder, contenders = study.output_dir, report["contenders"]
    pictures = plot_curves(folder, contenders) + plot_rates(folder, contenders) + plot_lengths(folder, contenders)
    pictures += plot_needles(folder, contenders)
    write_tables(folder, report, pictures)
    return report


def report_of(study: Study, evidence: Sequence[Evidence], status: str, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The report of a study, as in results.json.

    Args:
        study: the study.
        evidence: evidence of every contender.
        status: "complete", or why not everything was done.
        metadata: the machine and versions with which it was run.
    """
    contenders = {one.contender.name: _contender_report(study, one) for one in evidence}
    missing = {
        word: ", ".join(name for name, report in contenders.items() if report["status"] == word)
        for word in ("unfinished", "not begun")
    }
    if status == "complete" and any(missing.values()):
        status = "; ".join(f"{names} {word}" for word, names in missing.items() if names)
    return {
        "study": study.name,
        "title": study.grid.title,
        "status": status,
        "metadata": dict(metadata),
        "settings": study.settings(),
        "contenders": contenders,
        "equal_time": _equal_time(contenders),
    }


def write_tables(folder: Path, report: dict[str, Any], pictures: Sequence[str]) -> None:
    """Writes results.json, and README.md with the plots of these names."""
    write_text_whole(folder / RESULTS, json.dumps(_json_ready(report), indent=1, ensure_ascii=False) + "\n")
    write_text_whole(folder / PAGE, markdown(report, pictures))


def _machines_of(evidence: Sequence[Evidence]) -> str:
    """The machines on which the runs were made. The report may be written on another."""
    outcomes = [
        outcome for one in evidence for outcome in (*one.tuning.values(), *(outcome for _, outcome in one.full))
    ]
    summaries = [outcome.summary for outcome in outcomes if outcome.summary]
    return "; ".join(sorted({f"{s['device']}, {s['dtype']}, torch {s['versions']['torch']}" for s in summaries}))


def _contender_report(study: Study, one: Evidence) -> dict[str, Any]:
    contender, cell = one.contender, study.cells[one.contender.cell]
    parameters, flops = size_of(expected_config(study, contender), sequence_length(study))
    by_rate = _by_rate(one)
    means = {rate: statistics.fmean(_deciding_losses(study, runs)) for rate, runs in by_rate.items()}
    rate = min(means, key=means.__getitem__) if means else None
    runs = by_rate.get(rate, [])
    whole = [outcome for _, outcome in runs if not outcome.has_diverged]
    if whole:  # the model that was trained, which may differ from the expected one
        parameters = whole[0].summary["parameters"]
    tokens = whole[0].summary["train_tokens"] if whole else 0
    tuned_rate = best_rate(one.tuning) if one.tuning else None
    shared_rate = contender.training.get("learning_rate", TRAINING_DEFAULTS["learning_rate"])
    tried = sorted(rate for rate in (one.tuning or by_rate) if rate is not None)
    chosen = tuned_rate if one.tuning else rate
    return {
        "cell": contender.cell,
        "size": contender.size,
        "row": cell.row,
        "column": cell.column,
        "weights_of": contender.weights_of,
        "status": _status(study, one, runs),
        "parameters": parameters,
        "flops": flops * tokens,
        "learning_rate": tuned_rate if study.tuning else rate if study.grid.learning_rates else shared_rate,
        "rate_is_at_edge": chosen is not None and len(tried) > 1 and chosen in (tried[0], tried[-1]),
        "mean": _statistic(whole, statistics.fmean),
        "spread": _statistic(whole, statistics.stdev) if len(whole) > 1 else {},
        "runs": [_run_report(run, outcome) for run, outcome in one.full],
        "tuning": [_rate_report(rate, outcome) for rate, outcome in one.tuning.items()],
        "rates": [
            _rate_report(rate, outcome) | {"seed": run.seed}
            for run, outcome in one.full
            if (rate := run.learning_rate) is not None
        ],
        "measured": _mean_cells([one.measured[run.folder] for run, outcome in runs if not outcome.has_diverged]),
        "curve": _mean_curve(whole),
        "held_out": _mean_held_out(whole),
    }


def _by_rate(one: Evidence) -> dict[float | None, list[tuple[PlannedRun, Outcome]]]:
    by_rate: dict[float | None, list[tuple[PlannedRun, Outcome]]] = {}
    for run, outcome in one.full:
        by_rate.setdefault(run.learning_rate, []).append((run, outcome))
    return by_rate


def _deciding_losses(study: Study, runs: Sequence[tuple[PlannedRun, Outcome]]) -> list[float]:
    """The held-out losses by which a rate is chosen: of all seeds, or of the first if only that one is trained with every rate."""
    chooses = [run for run in runs if study.grid.repeat_rates == "all" or run[0].seed == study.grid.seeds[0]]
    return [outcome.eval_loss for _, outcome in chooses]


def _status(study: Study, one: Evidence, runs: Sequence[tuple[PlannedRun, Outcome]]) -> str:
    if not one.full and not (study.output_dir / (one.contender.weights_of or one.contender.name)).exists():
        return "not begun"
    if (
        one.tuning
        and study.tuning
        and len(one.tuning) == len(study.tuning.learning_rates)
        and best_rate(one.tuning) is None
    ):
        return "diverged at every learning rate"
    seeds, rates = len(study.grid.seeds), max(1, len(study.grid.learning_rates))
    if study.grid.repeat_rates == "best":
        if len(one.full) == rates and all(outcome.has_diverged for _, outcome in one.full):
            return "diverged at every learning rate"
        if len(one.full) < rates + seeds - 1:
            return "unfinished"
    elif len(one.full) < seeds * rates:
        return "unfinished"
    if any(
        not wanted_cells(study) <= one.measured[run.folder].keys() for run, outcome in runs if not outcome.has_diverged
    ):
        return "unfinished"
    failed = sum(outcome.has_diverged for _, outcome in runs)
    return f"{failed} of {len(runs)} runs diverged" if failed else "finished"


def _statistic(outcomes: Sequence[Outcome], statistic: Any) -> dict[str, float]:
    return {
        key: statistic([outcome.summary[key] for outcome in outcomes])
        for key in AVERAGED
        if outcomes and key in outcomes[0].summary
    }


def _run_report(run: PlannedRun, outcome: Outcome) -> dict[str, Any]:
    return {
        "folder": run.folder.as_posix(),
        "seed": run.seed,
        "learning_rate": run.learning_rate,
        "has_diverged": outcome.has_diverged,
        "failure": outcome.failure,
        "last_step": outcome.last_step,
        **{key: outcome.summary.get(key) for key in AVERAGED},
    }


def _rate_report(rate: float | None, outcome: Outcome) -> dict[str, Any]:
    return {
        "learning_rate": rate,
        "eval_loss": outcome.eval_loss,
        "has_diverged": outcome.has_diverged,
        "last_step": outcome.last_step,
    }


def _mean_cells(of_runs: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """The results of each cell that tables show, averaged over the runs that have the cell."""
    averaged: dict[str, dict[str, float]] = {}
    for key in dict.fromkeys(key for cells in of_runs for key in cells):
        cells = [cells[key] for cells in of_runs if key in cells]
        names = [name for name in MEASURED if name in cells[0]]
        averaged[key] = {name: statistics.fmean(cell[name] for cell in cells) for name in names}
    return averaged


def _mean_curve(outcomes: Sequence[Outcome]) -> list[dict[str, float]]:
    """Training loss and time over tokens, averaged over runs, with the extremes of the loss. All runs log at the same steps."""
    if not outcomes:
        return []
    logged = [{row["tokens"]: row for row in outcome.rows if "loss" in row} for outcome in outcomes]
    curve = []
    for tokens in logged[0]:
        if not all(tokens in rows for rows in logged):
            continue
        losses = [rows[tokens]["loss"] for rows in logged]
        seconds = statistics.fmean(rows[tokens]["train_seconds"] for rows in logged)
        point = {"tokens": tokens, "seconds": seconds, "loss": statistics.fmean(losses)}
        curve.append(point | ({"low": min(losses), "high": max(losses)} if len(losses) > 1 else {}))
    return curve


def _mean_held_out(outcomes: Sequence[Outcome]) -> list[dict[str, float]]:
    curves = [{tokens: (seconds, loss) for tokens, seconds, loss in outcome.held_out_curve()} for outcome in outcomes]
    return [
        {
            "tokens": tokens,
            "seconds": statistics.fmean(curve[tokens][0] for curve in curves),
            "loss": statistics.fmean(curve[tokens][1] for curve in curves),
        }
        for tokens in (curves[0] if curves else ())
        if all(tokens in curve for curve in curves)
    ]


def _equal_time(contenders: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Held-out loss of each contender when the fastest one of its size has finished, interpolated between two evaluations."""
    losses: dict[str, float | None] = {}
    seconds: dict[str, float] = {}
    for size in dict.fromkeys(report["size"] for report in contenders.values()):
        curves = {
            name: report["held_out"]
            for name, report in contenders.items()
            if report["size"] == size and report["held_out"] and report["weights_of"] is None
        }
        if len(curves) < 2:
            continue
        limit = min(curve[-1]["seconds"] for curve in curves.values())
        for name, curve in curves.items():
            times, values = [point["seconds"] for point in curve], [point["loss"] for point in curve]
            seconds[name] = limit
            losses[name] = float(np.interp(limit, times, values)) if times[0] <= limit else None
    return {"seconds": seconds, "eval_loss": losses}


def _json_ready(value: Any) -> Any:
    """A copy of nested values in which null replaces infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _json_ready(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_json_ready(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
