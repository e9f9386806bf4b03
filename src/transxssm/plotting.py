"""One style for all plots: colours that colour-blind readers can tell apart, one for each model everywhere, and names for people."""

import importlib.util
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage
    from matplotlib.lines import Line2D

# Okabe and Ito's palette.
BLUE, SKY, VERMILLION, GREEN, PURPLE, ORANGE, GREY = (
    "#0072B2",
    "#56B4E9",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#666666",
)
HEAT = "cividis"  # readable for colour-blind readers, and in grey
STYLE: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.labelcolor": "#333333",
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "grid.color": "#e8e8e8",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "figure.dpi": 160,
}
MOST_LABELS = 8  # labels at the ends of lines; more lines get a legend
TICK_GAP = 0.075  # least share of the axis between two ticks
LABEL_GAP = 1.25  # distance of labels, in heights of the text


class Look(NamedTuple):
    """The name and style of a model in plots."""

    name: str
    colour: str
    line: str


# The paper's model is blue and the recommended one, with a convolution, sky blue; attention is vermillion, pure SSDs are orange.
LOOKS = {
    "transxssm": Look("TransXSSM", BLUE, "-"),
    "transxssm-conv": Look("TransXSSM + convolution", SKY, "-"),
    "transxssm-compiled": Look("TransXSSM, compiled", BLUE, "--"),
    "transxssm-graph": Look("TransXSSM, CUDA graph", BLUE, ":"),
    "transxssm-ssd": Look("SSD layers only", ORANGE, "-"),
    "llama": Look("Llama", VERMILLION, "-"),
    "llama-compiled": Look("Llama, compiled", VERMILLION, "--"),
    "llama-eager": Look("Llama, eager attention", VERMILLION, "-."),
    "llama-graph": Look("Llama, CUDA graph", VERMILLION, ":"),
    "llama-static": Look("Llama, static cache", VERMILLION, (0, (6, 1, 1, 1, 1, 1))),  # type: ignore[arg-type]
    "mamba2": Look("Mamba-2", GREEN, "-"),
    "jamba": Look("Jamba", PURPLE, "-"),
    "attention": Look("Attention", VERMILLION, "-"),
    "attention-rope": Look("Attention, RoPE", VERMILLION, "-"),
    "ssd-rope": Look("SSD, RoPE", ORANGE, "-"),
    "ssd-conv": Look("SSD, convolution", ORANGE, "--"),
    "ssd-at": Look("SSD, $a_t$", ORANGE, ":"),
    "ssd-rope-conv": Look("SSD, RoPE + convolution", ORANGE, "-."),
    "hybrid": Look("Hybrid", BLUE, "-"),
    "hybrid-rope": Look("Hybrid, RoPE", BLUE, "-"),
    "hybrid-yarn": Look("Hybrid, YaRN", BLUE, "--"),
    "hybrid-at": Look("Hybrid, $a_t$", BLUE, ":"),
    "hybrid-conv": Look("Hybrid, convolution", SKY, "--"),
    "hybrid-rope-conv": Look("Hybrid, RoPE + convolution", SKY, "-"),
    "rope": Look("RoPE", BLUE, "-"),
    "rope-conv": Look("RoPE + convolution", SKY, "-"),
    "conv": Look("Convolution", SKY, "--"),
    "log-length": Look("RoPE, log-length scaling", BLUE, "--"),
    "yarn": Look("RoPE, YaRN", GREEN, "-"),
    "nope-attention": Look("NoPE in attention", PURPLE, "-"),
    "sliding-window": Look("Sliding window in attention", ORANGE, "-"),
    "plain": Look("Plain", BLUE, "-"),
}
# Names that cannot be derived from the key.
NAMES = {
    "norm-BC": "Norm on B and C",
    "BC-norm": "Norm on B and C",
    "bias-BC": "Norm and bias on B and C",
    "bias-BC-without-conv": "Norm and bias, no convolution",
    "qk-norm": "QK-norm",
    "skip": "D skip",
    "scan-in-fp32": "Scan in float32",
    "dt-wide": "Wide range of dt",
    "A-wide": "Wide range of A",
    "sdpa": "SDPA",
    "mamba2-scan": "Mamba-2 scan",
    "rms-norm": "RMSNorm",
    "torch-rms-norm": "torch RMSNorm",
    "swiglu": "SwiGLU",
    "torch-swiglu": "torch SwiGLU",
    "torch-linear": "torch linear",
}
_OTHERS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, GREY)
_LINES = ("-", "--", ":", "-.")


def looks_of(keys: Iterable[str]) -> dict[str, Look]:
    """The look of each of several models: its own if it has one, else the next colour that none of them uses."""
    keys = list(dict.fromkeys(keys))
    known = {key: LOOKS[key] for key in keys if key in LOOKS}
    taken = {(look.colour, look.line) for look in known.values()}
    free = ((colour, line) for line in _LINES for colour in _OTHERS if (colour, line) not in taken)
    others = {key: Look(_name(key), *pair) for key, pair in zip((key for key in keys if key not in known), free)}  # noqa: B905
    return {key: known.get(key) or others.get(key) or Look(_name(key), GREY, "-") for key in keys}


def tick(number: float) -> str:
    """Formats a number for an axis: "4K" for 4096, "131M" for 131,072,000, "0.5"."""
    if number >= 1024 and number % 1024 == 0 and number < 1e6:
        return f"{number / 1024:g}K"
    for size, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(number) >= size:
            return f"{number / size:.3g}{suffix}"
    return f"{number:.3g}"


def reason_without_pictures() -> str | None:
    """Why no plot can be drawn here, or None if one can."""
    if importlib.util.find_spec("matplotlib") is None:
        return "matplotlib is not installed: pip install 'transxssm[lab]'"
    return None


@contextmanager
def picture(path: Path, rows: int = 1, columns: int = 1, *, width: float = 7.0, height: float = 4.0) -> Iterator[Any]:
    """Yields the axes of a new figure, which is written to `path` as a PNG at the end.

    Args:
        path: path of the PNG. Its folder is created.
        rows, columns: numbers of axes. One of each gives an `Axes`, otherwise a numpy array of them.
        width, height: size in inches.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # not pyplot, which keeps state and looks for a display

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure.subplots(rows, columns)
        path.parent.mkdir(parents=True, exist_ok=True)
        FigureCanvasAgg(figure).print_png(path)


def draw_line(
    axes: "Axes",
    look: Look,
    x: Sequence[float],
    y: Sequence[float],
    low: Sequence[float] | None = None,
    high: Sequence[float] | None = None,
    *,
    marker: str = "o",
) -> None:
    """Draws a model's line, with its spread as a band if it is known."""
    axes.plot(x, y, color=look.colour, linestyle=look.line, marker=marker, label=look.name)
    if low is not None and high is not None:
        axes.fill_between(x, low, high, color=look.colour, alpha=0.18, linewidth=0)


def label_lines(axes: "Axes") -> None:
    """Writes each line's name at its end, in its colour, without overlaps. Many lines get a legend."""
    lines = [line for line in axes.get_lines() if not str(line.get_label()).startswith("_")]
    if len(lines) > MOST_LABELS:
        axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.01, 0.5))
        return
    axes.autoscale_view()
    axes.get_xlim(), axes.get_ylim()  # settles the limits that the transform reads
    shares = axes.transScale + axes.transLimits  # from data to shares of the axes
    ends = [shares.transform(_last_point(line)) for line in lines]
    figure = axes.get_figure()
    assert figure is not None
    rows = axes.get_subplotspec().get_gridspec().nrows if axes.get_subplotspec() else 1  # type: ignore[union-attr]
    height = 72 * figure.get_figheight() / rows * 0.75  # type: ignore[union-attr]
    places = _apart([float(y) for _, y in ends], LABEL_GAP * 9 / height)
    for line, (x, y), place in zip(lines, ends, places, strict=True):
        axes.annotate(
            str(line.get_label()),
            xy=(x, y),
            xytext=(1.03, place),
            xycoords="axes fraction",
            textcoords="axes fraction",
            color=_darker(str(line.get_color())),
            fontsize=9,
            va="center",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": line.get_color(),
                "alpha": 0.5,
                "linewidth": 0.8,
                "shrinkA": 0,
                "relpos": (0, 0.5),
            },
        )


def set_ticks(axes: "Axes", numbers: Iterable[float], *, base: float = 2) -> None:
    """Makes the x axis logarithmic with ticks at these numbers. A tick that would touch the one before is left out."""
    numbers = sorted(set(numbers))
    shown: list[float] = []
    for number in numbers:
        if not shown or math.log(number / shown[-1]) > TICK_GAP * math.log(numbers[-1] / numbers[0]):
            shown.append(number)
    axes.set_xscale("log", base=base)
    axes.set_xticks(shown, [tick(number) for number in shown])
    axes.minorticks_off()


def short_ticks(axes: "Axes", *which: str) -> None:
    """Formats the numbers of the axes ("x", "y") in short form, without powers of ten."""
    from matplotlib.ticker import FuncFormatter

    for name in which:
        axis = getattr(axes, f"{name}axis")
        axis.set_major_formatter(FuncFormatter(lambda number, _: tick(number)))
        low, high = sorted(getattr(axes, f"get_{name}lim")())
        if axis.get_scale() == "log":  # up to a decade, minor ticks have numbers, too
            between = {2, 5} if high < 30 * low else set()
            axis.set_minor_formatter(
                FuncFormatter(
                    lambda number, _, between=between: tick(number) if _first_digit(number) in between else ""
                )
            )


def binned(
    points: Sequence[Mapping[str, float]], x: str, names: Sequence[str], most: int = 120
) -> dict[str, np.ndarray]:
    """Averages points in at most `most` groups of neighbours, so that a noisy curve is readable.

    Returns:
        The means of `x` and of each name, by name.
    """
    groups = np.array_split(np.arange(len(points)), min(most, len(points)))
    columns = {name: np.array([point[name] for point in points]) for name in (x, *names)}
    return {name: np.array([column[group].mean() for group in groups]) for name, column in columns.items()}


def draw_heat_map(axes: "Axes", cells: Iterable[Mapping[str, Any]]) -> "AxesImage":
    """Draws the share of needles found over lengths and, downwards, depths (the paper's Figure 5)."""
    accuracy_of = {(cell["length"], cell["depth"]): cell["accuracy"] for cell in cells}
    lengths = sorted({length for length, _ in accuracy_of})
    depths = sorted({depth for _, depth in accuracy_of})
    values = np.array([[accuracy_of.get((length, depth), np.nan) for length in lengths] for depth in depths])
    image = axes.imshow(values, cmap=HEAT, vmin=0, vmax=1, aspect="auto")
    axes.grid(False)
    axes.set_xticks(range(len(lengths)), [tick(length) for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    for row, column in np.argwhere(~np.isnan(values)):
        value = values[row, column]
        colour = "black" if value > 0.5 else "white"
        axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=8, color=colour)
    axes.set_xlabel("length (tokens)")
    return image


def _name(key: str) -> str:
    """Derives a readable name from a key: "7:1" for "ratio-7-1", "Output gate" for "output-gate"."""
    if match := re.fullmatch(r"ratio-(\d+)-(\d+)", key):
        return f"{match[1]}:{match[2]}"
    if key in NAMES:
        return NAMES[key]
    words = key.replace("-", " ").replace("_", " ")
    return words[:1].upper() + words[1:]


def _first_digit(number: float) -> int:
    return round(number / 10 ** math.floor(math.log10(number) + 1e-9)) if number > 0 else 0


def _apart(places: Sequence[float], gap: float) -> list[float]:
    """Numbers near `places` in the same order, at least `gap` apart and, if they fit, between 0 and 1."""
    order = sorted(range(len(places)), key=places.__getitem__)
    moved = [places[index] for index in order]
    for _ in range(100):
        for index in range(len(moved) - 1):
            if (missing := gap - (moved[index + 1] - moved[index])) > 1e-6:
                moved[index] -= missing / 2
                moved[index + 1] += missing / 2
        if moved and gap * (len(moved) - 1) <= 1:
            moved[0], moved[-1] = max(moved[0], 0.0), min(moved[-1], 1.0)
    return [place for _, place in sorted(zip(order, moved, strict=True))]


def _last_point(line: "Line2D") -> tuple[float, float]:
    """The last finite point of a line. Others are not drawn."""
    x, y = np.asarray(line.get_xdata(), float), np.asarray(line.get_ydata(), float)
    drawn = np.flatnonzero(np.isfinite(y))
    place = drawn[-1] if len(drawn) else -1
    return float(x[place]), float(np.nan_to_num(y[place]))


def _darker(colour: str) -> str:
    """A darker colour for text, which needs more contrast than a line."""
    red, green, blue = (int(colour[place : place + 2], 16) for place in (1, 3, 5))
    return f"#{int(0.78 * red):02x}{int(0.78 * green):02x}{int(0.78 * blue):02x}"
