"""Draws the figures of the documentation from results/: python scripts/figures.py [NAME…], all of them where none is named."""

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from scripts.results import RESULTS, ROOT, read_entries, relative_to
from transxssm.plotting import (
    BLUE,
    GREY,
    ORANGE,
    VERMILLION,
    draw_heat_map,
    draw_line,
    label_lines,
    looks_of,
    picture,
    set_ticks,
    short_ticks,
)
from transxssm_lab.benchmarking.report import draw_rates
from transxssm_lab.studies.report import contender_looks, draw_curve, draw_lengths

FIGURES = ROOT / "docs" / "figures"
LENGTHS = (1024, 4096, 16384, 65536)
# The entries of results/ that a panel of Figure 4 is made of. Where two have the same point, the first one counts.
CPU = ("zen5-1k", "zen5-4k", "zen5-16k", "zen5-64k", "zen5-decode")
GPU = (
    "figure4-kernels-1k",
    "figure4-kernels-train",
    "figure4-prefill",
    "figure4-kernels-16k",
    "figure4-kernels-64k",
    "figure4-kernels",
    "figure4",
    "figure4-1k",
    "figure4-eager",
    "figure4-decode-graph",
)
# Runs with the scan's Triton kernels, whose reference is the model that is not compiled; they count before those above.
KERNELS = ("kernels-train-1k", "kernels-train-4k", "kernels-prefill-4k")
ZEN4 = ("small-bfloat16-4k", "small-bfloat16-16k")
COMPARED = ("llama", "llama-compiled", "llama-eager", "llama-static", "llama-graph", "mamba2", "jamba")


def figure4(path: Path) -> None:
    """Speed over length, relative to TransXSSM, on a CPU and on a GPU."""
    with picture(path, 3, 2, width=12, height=11) as panels:
        for column, (machine, part, entries) in enumerate(
            (("CPU: two cores, 30M parameters", "cpu", CPU), ("GPU: one H200 or H100, 1.3B parameters", "gpu", GPU))
        ):
            reports = reports_of(part, entries)
            for row, (modes, title) in enumerate(
                (
                    (("train", "train-checkpointed"), "Training"),
                    (("prefill",), "Prefill"),
                    (("decode",), "Decoding one sequence"),
                )
            ):
                axes, of_panel = panels[row, column], list(reports.values())
                if part == "gpu" and modes == (
                    "decode",
                ):  # one token as one graph: else it is launches that are compared
                    of_panel = [relative_to(reports["figure4-decode-graph"], "transxssm-graph")]
                draw_relative(axes, relative_speeds(of_panel, modes))
                axes.set_title(f"{title} · {machine}" if row == 0 else title)
                if row == 2:
                    axes.set_xlabel("length (tokens)")
                if column == 0:
                    axes.set_ylabel("speed relative to TransXSSM")


def reports_of(part: str, entries: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Throughput reports by their names, those with the newest kernels first; on a GPU relative to the compiled model."""
    reports = read_entries(RESULTS / part / "throughput.json")
    newest = {name: relative_to(reports[name], "transxssm-compiled") for name in KERNELS if name in reports}
    return newest | {name: reports[name] for name in entries if name in reports}


def relative_speeds(
    reports: Iterable[dict[str, Any]], modes: tuple[str, ...]
) -> dict[str, dict[int, tuple[float, float, float]]]:
    """By contender and length: speed divided by the reference's in the same turn, lowest, median and highest."""
    found: dict[str, dict[int, tuple[float, float, float]]] = {}
    for cell in (cell for report in reports for cell in report["cells"]):
        ratio = cell["ratio_to_reference"]
        if cell["mode"] in modes and ratio and cell["contender"] in COMPARED:
            speeds = (1 / ratio["max"], 1 / ratio["median"], 1 / ratio["min"])
            found.setdefault(cell["contender"], {}).setdefault(cell["length"], speeds)
    return {name: dict(sorted(found[name].items())) for name in COMPARED if name in found}


def draw_relative(axes: Any, speeds: dict[str, dict[int, tuple[float, float, float]]]) -> None:
    """Lines below one are slower than TransXSSM."""
    ours = looks_of(["transxssm"])["transxssm"]
    draw_line(axes, ours, LENGTHS, [1.0] * len(LENGTHS), marker="")
    for name, look in looks_of(speeds).items():
        low, median, high = zip(*speeds[name].values(), strict=True)
        draw_line(axes, look, list(speeds[name]), median, low, high)
    axes.set_yscale("log")
    set_ticks(axes, LENGTHS)
    axes.set_xlim(LENGTHS[0] * 0.85, LENGTHS[-1] * 1.15)
    axes.set_ylim(0.03, 2.5)
    axes.set_yticks([0.05, 0.1, 0.2, 0.5, 1, 2])
    short_ticks(axes, "y")
    label_lines(axes)


def decoding(path: Path) -> None:
    """Tokens decoded a second over the number of sequences."""
    with picture(path, columns=2, width=12, height=4.5) as panels:
        for axes, (part, name, title) in zip(
            panels,
            (
                ("cpu", "zen5-batches", "CPU: two cores, 30M parameters, after 1K tokens"),
                ("gpu", "decode-triton", "GPU: one H200, 1.3B parameters, after 4K tokens"),
            ),
            strict=True,
        ):
            report = read_entries(RESULTS / part / "decode.json")[name]
            draw_rates(axes, [cell for cell in report["cells"] if cell["tokens_per_second"]], "batch")
            axes.set_title(title)
            axes.set_xlabel("sequences at once")


def quality(path: Path) -> None:
    """Held-out bits per byte over parameters."""
    with picture(path, columns=2, width=12, height=4.5) as panels:
        for axes, (name, title) in zip(
            panels,
            (("table3-cpu", "After 1.3M tokens, four seeds"), ("table3-gpu", "After 210M tokens, one or two seeds")),
            strict=True,
        ):
            draw_scale(axes, _contenders(name))
            axes.set_title(title)
        panels[0].set_ylabel("held-out bits per byte")


def draw_scale(axes: Any, contenders: dict[str, dict[str, Any]]) -> None:
    """Bits per byte of each cell over its sizes, with the standard deviation over seeds as a band."""
    for cell, look in looks_of(one["cell"] for one in contenders.values()).items():
        of_cell = [one for one in contenders.values() if one["cell"] == cell]
        means = [one["mean"]["bits_per_byte"] for one in of_cell]
        spreads = [one["spread"].get("bits_per_byte", 0.0) for one in of_cell]
        low = [mean - spread for mean, spread in zip(means, spreads, strict=True)]
        high = [mean + spread for mean, spread in zip(means, spreads, strict=True)]
        draw_line(axes, look, [one["parameters"] for one in of_cell], means, low, high)
    sizes = {one["size"]: one["parameters"] for one in contenders.values()}
    axes.set_xscale("log")
    axes.set_xticks(list(sizes.values()), [f"{number / 1e6:.2g}M" for number in sizes.values()])
    axes.minorticks_off()
    axes.set_xlabel("parameters")
    label_lines(axes)


def needle(path: Path) -> None:
    """The share of needles found, over length and depth (the paper's Figure 5)."""
    contenders, names = _contenders("needle-gpu"), ("TransXSSM", "TransXSSM, YaRN", "TransXSSM + convolution", "Llama")
    with picture(path, columns=len(contenders), width=13, height=3.4) as panels:
        for axes, (key, name) in zip(panels, zip(contenders, names, strict=True), strict=True):
            image = draw_heat_map(axes, contenders[key]["measured"].values())
            axes.set_title(name)
        panels[0].set_ylabel("depth of the needle")
        bar = panels[0].figure.colorbar(image, ax=list(panels), label="found", shrink=0.9)
        bar.ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")


def losses(path: Path) -> None:
    """Training loss over tokens and over seconds, on two cores, at 2.1M parameters."""
    _losses(path, {name: one for name, one in _contenders("table3-cpu").items() if one["size"] == "large"}, (3.8, 7.8))


def losses_gpu(path: Path) -> None:
    """Training loss over tokens and over seconds, on a GPU, at 60M parameters."""
    _losses(path, {name: one for name, one in _contenders("table3-gpu").items() if one["size"] == "60m"}, (1.25, 6))


def _losses(path: Path, contenders: dict[str, dict[str, Any]], limits: tuple[float, float]) -> None:
    looks = looks_of(one["cell"] for one in contenders.values())
    with picture(path, columns=2, width=12, height=4.5) as panels:
        for axes, key, label in zip(panels, ("tokens", "seconds"), ("tokens", "seconds of training"), strict=True):
            for one in contenders.values():
                draw_curve(axes, looks[one["cell"]], one, key)
            axes.set_xlabel(label)
            axes.set_yscale("log")
            axes.set_yticks([1.5, 2, 3, 4, 5, 6, 7, 8])
            axes.set_ylim(*limits)
            axes.minorticks_off()
            short_ticks(axes, "x", "y")
            label_lines(axes)
        panels[0].set_ylabel("loss (nats per token); points: held out")


def encodings(path: Path) -> None:
    """Training loss of the encodings of Table 2 over tokens."""
    contenders = {
        name: one
        for name, one in _contenders("table2-gpu").items()
        if name.startswith("hybrid") or name == "attention-rope"
    }
    looks = contender_looks(contenders)
    with picture(path, width=8, height=4.5) as axes:
        for name, one in contenders.items():
            draw_curve(axes, looks[name], one, "tokens")
        axes.set_xscale("log")
        axes.set_xlim(left=1e6)
        short_ticks(axes, "x")
        axes.set_xlabel("tokens")
        axes.set_ylabel("loss (nats per token); points: held out")
        label_lines(axes)


def length(path: Path) -> None:
    """Bits per byte over the length of the window, up to 16 times the training length."""
    with picture(path, width=8, height=4.5) as axes:
        draw_lengths(axes, {name: one for name, one in _contenders("length-gpu").items() if one["measured"]})
        axes.axvline(1024, color=GREY, linestyle="--", linewidth=1)
        axes.text(
            1024, 1.0, "training length", transform=axes.get_xaxis_transform(), fontsize=8, ha="left", va="bottom"
        )


def overview(path: Path) -> None:
    """Speed over length and quality, side by side."""
    with picture(path, columns=2, width=12, height=4.5) as (speed, bits):
        for part, entries, names, label, line in (
            ("cpu", CPU, ("llama",), "Zen 5", "-"),
            ("cpu", ZEN4, ("llama",), "Zen 4", "-"),
            ("gpu", GPU, ("llama-compiled", "mamba2", "jamba"), "GPU", "--"),
        ):
            speeds = relative_speeds(reports_of(part, entries).values(), ("train", "train-checkpointed"))
            for name in names:
                low, median, high = zip(*speeds[name].values(), strict=True)
                look = looks_of([name])[name]
                draw_line(
                    speed,
                    look._replace(name=f"{look.name} ({label})", line=line),
                    list(speeds[name]),
                    median,
                    low,
                    high,
                )
        speed.axhline(1, color=BLUE, linewidth=2.5)
        speed.text(LENGTHS[-1], 1.06, "TransXSSM", color=BLUE, fontsize=9, ha="right")
        speed.set_yscale("log")
        set_ticks(speed, LENGTHS)
        speed.set_yticks([0.1, 0.2, 0.5, 1, 2])
        speed.set_ylim(0.1, 2.2)  # the spread of the short steps on a GPU, which are bound by launches, goes further
        short_ticks(speed, "y")
        speed.set_title("Training speed over length (higher is faster)")
        speed.set_ylabel("speed relative to TransXSSM")
        speed.set_xlabel("length (tokens)")
        label_lines(speed)
        draw_scale(bits, _contenders("table3-gpu"))
        bits.set_title("Held-out bits per byte after 210M tokens (lower is better)")


def architecture(path: Path) -> None:
    """A block of the model: seven SSD layers and one attention layer, one rotation for both, and both kinds of cache."""
    ssd, attention, rotation = ORANGE, VERMILLION, BLUE
    with picture(path, width=11, height=5.6) as axes:
        axes.set_xlim(0, 11)
        axes.set_ylim(0, 5.6)
        axes.axis("off")
        for layer in range(8):
            is_attention = layer == 7
            name = "attention + FFN" if is_attention else "SSD + FFN"
            _box(axes, (0.5, 0.55 + 0.52 * layer), (2.3, 0.42), name, attention if is_attention else ssd)
        axes.annotate("", (1.65, 5.3), (1.65, 4.66), arrowprops={"arrowstyle": "->", "color": GREY})
        axes.annotate("", (1.65, 0.53), (1.65, 0.12), arrowprops={"arrowstyle": "->", "color": GREY})
        axes.text(1.85, 0.22, "embeddings", color=GREY, fontsize=9, va="center")
        axes.text(1.85, 5.0, "next block, or the head", color=GREY, fontsize=9, va="center")
        axes.text(0.3, 2.35, "7 : 1", rotation=90, ha="center", va="center", fontsize=12, fontweight="bold")

        _box(axes, (4.1, 2.3), (2.2, 0.95), "one rotary table\ncos, sin by position", rotation)
        _box(axes, (4.1, 4.12), (2.2, 0.62), "Q, K, V", attention)
        _box(axes, (4.1, 0.85), (2.2, 0.62), "C, B, x, dt", ssd)
        for start, end, text in (
            ((5.2, 3.27), (5.2, 4.1), "rotates Q and K"),
            ((5.2, 2.28), (5.2, 1.49), "rotates C and B"),
        ):
            axes.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": rotation, "linewidth": 2})
            axes.text(5.32, (start[1] + end[1]) / 2, text, color=rotation, fontsize=9, va="center")
        for height, target, colour in ((4.40, 4.43, attention), (1.16, 1.16, ssd)):
            axes.annotate("", (4.08, target), (2.82, height), arrowprops={"arrowstyle": "->", "color": colour})
            axes.annotate("", (7.48, target), (6.32, target), arrowprops={"arrowstyle": "->", "color": colour})

        axes.text(7.5, 5.3, "cache of an attention layer: grows with the text", fontsize=9.5, va="center")
        for token in range(9):
            for row in range(2):
                _box(
                    axes,
                    (7.5 + 0.34 * token, 4.08 + 0.42 * row),
                    (0.28, 0.34),
                    "",
                    attention,
                    alpha=0.18 + 0.05 * token,
                )
        axes.text(7.5, 3.8, "K and V of every token", color=GREY, fontsize=9, va="center")
        axes.text(7.5, 2.1, "cache of an SSD layer: always the same size", fontsize=9.5, va="center")
        _box(axes, (7.5, 0.75), (1.5, 1.05), "state\n(h, p, n)", ssd)
        axes.text(9.15, 1.28, "$S_t = e^{dt A} S_{t-1} + dt\\, x_t B_t^{\\top}$", fontsize=10, va="center")
        axes.text(7.5, 0.45, "float32, one for each head", color=GREY, fontsize=9, va="center")


def _box(
    axes: Any, corner: tuple[float, float], size: tuple[float, float], text: str, colour: str, alpha: float = 0.22
) -> None:
    from matplotlib.patches import FancyBboxPatch

    style = "round,pad=0,rounding_size=0.06"
    axes.add_patch(
        FancyBboxPatch(corner, *size, boxstyle=style, facecolor=(colour, alpha), edgecolor=colour, linewidth=1.2)
    )
    axes.text(corner[0] + size[0] / 2, corner[1] + size[1] / 2, text, ha="center", va="center", fontsize=10)


def _contenders(study: str) -> dict[str, dict[str, Any]]:
    return json.loads((RESULTS / "studies" / study / "results.json").read_text(encoding="utf-8"))["contenders"]


DRAWN: dict[str, Callable[[Path], None]] = {
    "overview": overview,
    "figure4": figure4,
    "decoding": decoding,
    "quality": quality,
    "losses": losses,
    "losses-gpu": losses_gpu,
    "encodings": encodings,
    "needle": needle,
    "length": length,
    "architecture": architecture,
}


def main(names: list[str], folder: Path = FIGURES) -> int:
    """Draws figures into a folder; returns the exit code, 2 with one line on stderr for a name that is none."""
    unknown = [name for name in names if name not in DRAWN]
    if unknown:
        sys.stderr.write(f"figures: no figure {unknown[0]!r}: expected one of {', '.join(DRAWN)}\n")
        return 2
    for name in names or DRAWN:
        DRAWN[name](folder / f"{name}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
