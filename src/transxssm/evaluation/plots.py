"""The pictures of the evaluations."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from transxssm.evaluation.harness import accuracy
from transxssm.evaluation.results import Cell
from transxssm.plotting import (
    BLUE,
    GREY,
    draw_heat_map,
    draw_line,
    label_lines,
    looks_of,
    picture,
    set_ticks,
    tick,
)


def plot_perplexity(path: Path, cells: Iterable[Cell], training_length: int | None) -> None:
    """Loss over the number of tokens before the predicted one, a line a length, with bands of one standard error.

    Args:
        path: of the PNG.
        cells: of `measure_length`.
        training_length: is marked, where it is known.
    """
    cells = sorted(cells, key=lambda cell: cell["length"])
    looks = looks_of(f"window {tick(cell['length'])}" for cell in cells)
    with picture(path) as axes:
        for cell, look in zip(cells, looks.values(), strict=True):
            # A bin's middle in the logarithm of its first and last position.
            middles = [(bin_["from"] * (bin_["to"] - 1)) ** 0.5 for bin_ in cell["positions"]]
            means = np.array([bin_["nats_per_token"] for bin_ in cell["positions"]])
            errors = np.array([bin_["standard_error"] or 0.0 for bin_ in cell["positions"]])
            draw_line(axes, look, middles, list(means), list(means - errors), list(means + errors))
        set_ticks(axes, [cell["length"] for cell in cells] + [1])
        if training_length is not None:
            axes.axvline(training_length, color=GREY, linestyle="--", linewidth=1)
            top = axes.get_xaxis_transform()
            axes.text(training_length, 1.0, " training length", transform=top, fontsize=8, va="bottom", ha="center")
        axes.set_xlabel("tokens before the predicted one, in the window")
        axes.set_ylabel("loss (nats per token)")
        label_lines(axes)


def plot_needle(path: Path, cells: Iterable[Cell]) -> None:
    """A map of the share of needles found, lengths to the right, depths downwards (the paper's Figure 5)."""
    with picture(path) as axes:
        image = draw_heat_map(axes, cells)
        axes.set_ylabel("depth of the needle")
        axes.figure.colorbar(image, label="found").ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")


def plot_recall(path: Path, cells: Iterable[Cell]) -> None:
    """Accuracy of every task, with bars of one standard error."""
    cells = sorted(cells, key=lambda cell: (cell["length"], cell["pairs"]))
    with picture(path) as axes:
        axes.bar(
            [f"{tick(cell['length'])}\n{cell['pairs']} pairs" for cell in cells],
            [cell["accuracy"] for cell in cells],
            yerr=[cell["standard_error"] or 0.0 for cell in cells],
            color=BLUE,
        )
        axes.set_ylim(0, 1)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.grid(False, axis="x")
        axes.set_xlabel("length (tokens), pairs of key and value")
        axes.set_ylabel("accuracy")


def plot_harness(path: Path, cells: Mapping[str, Cell]) -> None:
    """Accuracy (exact match where a task has none) of every task."""
    with picture(path) as axes:
        values = [accuracy(task, cell) for task, cell in cells.items()]
        axes.barh(list(cells), values, color=BLUE)
        for row, value in enumerate(values):
            axes.text(value, row, f" {value:.1%}", va="center", fontsize=9)
        axes.invert_yaxis()
        axes.set_xlim(0, 1)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.grid(False, axis="y")
        axes.set_xlabel("accuracy")
