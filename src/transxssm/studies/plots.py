"""The pictures of a study's report. Each function returns the names of the files it wrote: none without figures to draw."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transxssm.evaluation import plot_needle

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Reports = Mapping[str, dict[str, Any]]
LINE_STYLES = ("-", "--", ":", "-.")
COLOURS = 10  # of matplotlib's own cycle


def plot_curves(folder: Path, contenders: Reports) -> list[str]:
    """Training and held-out loss (points), means over seeds, over tokens and over seconds of training."""
    drawn = {name: one for name, one in contenders.items() if one["curve"] and one["weights_of"] is None}
    if not drawn:
        return []
    names = []
    for key, label in (("tokens", "tokens"), ("seconds", "seconds of training")):
        figure, axes = _figure()
        for index, (name, one) in enumerate(drawn.items()):
            style: dict[str, Any] = {
                "color": f"C{index % COLOURS}",
                "linestyle": LINE_STYLES[index // COLOURS % len(LINE_STYLES)],
            }
            axes.plot(*_columns(one["curve"], key), label=name, linewidth=1, **style)
            axes.plot(*_columns(one["held_out"], key), "o", color=style["color"], markersize=3)
        axes.set_xlabel(label)
        axes.set_ylabel("loss (nats per token); points: held out")
        names.append(_save(figure, axes, folder / f"loss-over-{key}.png"))
    return names


def plot_rates(folder: Path, contenders: Reports) -> list[str]:
    """Held-out loss over the learning rate, for whole runs where these sweep it, else for tuning; what diverged is a gap."""
    figure, axes = _figure()
    is_empty = True
    for name, one in contenders.items():
        entries = sorted(one["rates"] or one["tuning"], key=lambda entry: entry["learning_rate"])
        if not entries or one["weights_of"] is not None:
            continue
        losses = [entry["eval_loss"] if math.isfinite(entry["eval_loss"]) else math.nan for entry in entries]
        axes.plot([entry["learning_rate"] for entry in entries], losses, "o-", label=name, markersize=4)
        is_empty = False
    if is_empty:
        return []
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    axes.set_ylabel("held-out loss (nats per token)")
    return [_save(figure, axes, folder / "loss-over-rate.png")]


def plot_lengths(folder: Path, contenders: Reports) -> list[str]:
    """Bits per byte over the length of the window."""
    drawn = {
        name: one
        for name, one in contenders.items()
        if any("bits_per_byte" in cell for cell in one["measured"].values())
    }
    if not drawn:
        return []
    figure, axes = _figure()
    for name, one in drawn.items():
        points = sorted((int(length), cell["bits_per_byte"]) for length, cell in one["measured"].items())
        axes.plot(*zip(*points, strict=True), "o-", label=name, markersize=4)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("window (tokens)")
    axes.set_ylabel("bits per byte")
    return [_save(figure, axes, folder / "bits-per-byte-over-length.png")]


def plot_needles(folder: Path, contenders: Reports) -> list[str]:
    """A map of lengths and depths for every contender that has looked for needles."""
    names = []
    for name, one in contenders.items():
        cells = [cell for cell in one["measured"].values() if "depth" in cell]
        if cells:
            names.append(f"needle-{name}.png")
            plot_needle(folder / names[-1], cells)
    return names


def _columns(points: list[dict[str, float]], key: str) -> tuple[list[float], list[float]]:
    return [point[key] for point in points], [point["loss"] for point in points]


def _figure() -> "tuple[Figure, Axes]":
    from matplotlib.figure import Figure  # not pyplot, which keeps state and looks for a display

    figure = Figure(figsize=(8, 5), layout="constrained")
    return figure, figure.subplots()


def _save(figure: "Figure", axes: "Axes", path: Path) -> str:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    FigureCanvasAgg(figure).print_png(path)
    return path.name
