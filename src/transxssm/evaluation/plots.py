"""The pictures of the evaluations."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from transxssm.evaluation.harness import accuracy
from transxssm.evaluation.results import Cell

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_perplexity(path: Path, cells: Iterable[Cell], training_length: int | None) -> None:
    """Loss over the number of tokens before the predicted one, a line a length, with bands of one standard error.

    Args:
        path: of the PNG.
        cells: of `measure_length`.
        training_length: is marked, where it is known.
    """
    figure, axes = _figure()
    for cell in sorted(cells, key=lambda cell: cell["length"]):
        # A bin's middle in the logarithm of its first and last position.
        middles = [(bin_["from"] * (bin_["to"] - 1)) ** 0.5 for bin_ in cell["positions"]]
        means = np.array([bin_["nats_per_token"] for bin_ in cell["positions"]])
        errors = np.array([bin_["standard_error"] or 0.0 for bin_ in cell["positions"]])
        (line,) = axes.plot(middles, means, ".-", markersize=4, label=f"{cell['length']:,}")
        axes.fill_between(middles, means - errors, means + errors, color=line.get_color(), alpha=0.2, linewidth=0)
    if training_length is not None:
        axes.axvline(training_length, color="black", linestyle="--", linewidth=1, label="training length")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("tokens before the predicted one, in the window")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend(title="window")
    _save(figure, path)


def plot_needle(path: Path, cells: Iterable[Cell]) -> None:
    """A map of the share of needles found, lengths to the right, depths downwards (the paper's Figure 5)."""
    accuracy_of = {(cell["length"], cell["depth"]): cell["accuracy"] for cell in cells}
    lengths = sorted({length for length, _ in accuracy_of})
    depths = sorted({depth for _, depth in accuracy_of})
    values = np.array([[accuracy_of.get((length, depth), np.nan) for length in lengths] for depth in depths])
    figure, axes = _figure()
    image = axes.imshow(values, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    for row, column in np.argwhere(~np.isnan(values)):
        axes.text(column, row, f"{values[row, column]:.0%}", ha="center", va="center", fontsize=8)
    axes.set_xlabel("length (tokens)")
    axes.set_ylabel("depth of the needle")
    figure.colorbar(image, label="found")
    _save(figure, path)


def plot_recall(path: Path, cells: Iterable[Cell]) -> None:
    """Accuracy of every task, with bars of one standard error."""
    cells = sorted(cells, key=lambda cell: (cell["length"], cell["pairs"]))
    figure, axes = _figure()
    axes.bar(
        [f"{cell['length']:,}\n{cell['pairs']} pairs" for cell in cells],
        [cell["accuracy"] for cell in cells],
        yerr=[cell["standard_error"] or 0.0 for cell in cells],
    )
    axes.set_ylim(0, 1)
    axes.set_xlabel("length (tokens), pairs of key and value")
    axes.set_ylabel("accuracy")
    axes.grid(axis="y", alpha=0.3)
    _save(figure, path)


def plot_harness(path: Path, cells: Mapping[str, Cell]) -> None:
    """Accuracy (exact match where a task has none) of every task."""
    figure, axes = _figure()
    axes.barh(list(cells), [accuracy(task, cell) for task, cell in cells.items()])
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel("accuracy")
    axes.grid(axis="x", alpha=0.3)
    _save(figure, path)


def _figure() -> "tuple[Figure, Axes]":
    from matplotlib.figure import Figure  # not pyplot, which keeps state and looks for a display

    figure = Figure(figsize=(7, 4), layout="constrained")
    return figure, figure.subplots()


def _save(figure: "Figure", path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure).print_png(path)
