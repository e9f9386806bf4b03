"""The pictures of a study's report. Each function returns the names of the files it wrote: none without figures to draw."""

import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transxssm.evaluation import plot_needle
from transxssm.plotting import Look, binned, draw_line, label_lines, looks_of, picture, set_ticks, short_ticks

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Reports = Mapping[str, dict[str, Any]]
LOSS, RATES, LENGTHS = "loss.png", "loss-over-rate.png", "bits-per-byte-over-length.png"


def plot_curves(folder: Path, contenders: Reports) -> list[str]:
    """Training loss over tokens and over seconds, held-out loss as points; means over seeds, their extremes as bands."""
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
    """A contender's training loss over "tokens" or "seconds", and its held-out loss as points."""
    points = [{"low": point["loss"], "high": point["loss"], **point} for point in one["curve"]]
    means = binned(points, key, ("loss", "low", "high"))
    draw_line(axes, look, means[key], means["loss"], means["low"], means["high"], marker="")  # type: ignore[arg-type]
    held_out = one["held_out"]
    axes.plot([point[key] for point in held_out], [point["loss"] for point in held_out], "o", color=look.colour)


def plot_rates(folder: Path, contenders: Reports) -> list[str]:
    """Held-out loss over the learning rate, for whole runs where these sweep it, else for tuning; what diverged is a gap."""
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
    """Bits per byte over the length of the windows that were read."""
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
    """Bits per byte of each contender over the length of the windows."""
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
    """A map of lengths and depths for every contender that has looked for needles."""
    names = []
    for name, one in contenders.items():
        cells = [cell for cell in one["measured"].values() if "depth" in cell]
        if cells:
            names.append(f"needle-{name}.png")
            plot_needle(folder / names[-1], cells)
    return names


def contender_looks(contenders: Reports) -> dict[str, Look]:
    """How each contender is drawn: as its cell, the second size of a cell as dashes."""
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
