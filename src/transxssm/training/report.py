"""What is left when a run has finished: summary.json and loss.png."""

import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

import torch

from transxssm._version import __version__
from transxssm.plotting import BLUE, VERMILLION, Look, draw_line, label_lines, picture, short_ticks
from transxssm.whole_files import write_text_whole

SUMMARY = "summary.json"
TRAINING, HELD_OUT = Look("training", BLUE, "-"), Look("held out", VERMILLION, "-")
LIBRARIES = ("transformers", "accelerate", "datasets", "tokenizers")


def write_summary(run_dir: Path, summary: dict[str, Any]) -> None:
    """Writes summary.json; its presence says that the run has finished."""
    write_text_whole(run_dir / SUMMARY, json.dumps(summary, indent=2) + "\n")


def read_summary(run_dir: Path) -> dict[str, Any] | None:
    """The summary of a finished run; None where there is none."""
    try:
        return json.loads((run_dir / SUMMARY).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def versions() -> dict[str, str]:
    """Versions of this package, of Python and of the libraries that results depend on."""
    return {
        "transxssm": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # with its build, such as +cpu
        **{name: importlib.metadata.version(name) for name in LIBRARIES},
    }


def device_name(device: torch.device) -> str:
    """The accelerator's name, or the CPU's architecture and the number of threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {device.type}, {torch.get_num_threads()} threads"


def plot_loss(path: Path, rows: list[dict[str, Any]]) -> None:
    """Draws training and held-out loss over tokens.

    Args:
        path: of the PNG.
        rows: of metrics.jsonl; losses in nats per token.
    """
    with picture(path) as axes:
        for key, look, marker in (("loss", TRAINING, ""), ("eval_loss", HELD_OUT, "o")):
            points = [(row["tokens"], row[key]) for row in rows if key in row]
            if points:
                draw_line(axes, look, *zip(*points, strict=True), marker=marker)
        axes.set_xlabel("tokens")
        axes.set_ylabel("loss (nats per token)")
        short_ticks(axes, "x")
        label_lines(axes)
