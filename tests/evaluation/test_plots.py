"""The pictures show the figures of the cells, gaps and unknown errors included."""

from contextlib import contextmanager

import pytest
from matplotlib.figure import Figure

from transxssm.evaluation import plot_harness, plot_needle, plot_perplexity, plot_recall, plots


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draws a picture and gives its axes."""

    def draw(plot, *arguments):
        axes = Figure().subplots()

        @contextmanager
        def picture(path):
            yield axes

        monkeypatch.setattr(plots, "picture", picture)
        plot(tmp_path / "picture.png", *arguments)
        return axes

    return draw


def place(low, high, error=0.1):
    return {"from": low, "to": high, "tokens": 5, "nats_per_token": 2.0 / low, "standard_error": error}


PERPLEXITY = [
    {"length": 8, "positions": [place(1, 2), place(2, 8)]},
    {"length": 4, "positions": [place(1, 2, None), place(2, 4, None)]},
]
NEEDLE = [
    {"length": 512, "depth": 0.0, "accuracy": 1.0},
    {"length": 512, "depth": 1.0, "accuracy": 0.5},
    {"length": 1024, "depth": 0.0, "accuracy": 0.0},
]
RECALL = [
    {"length": 64, "pairs": 8, "accuracy": 0.25, "standard_error": None},
    {"length": 64, "pairs": 4, "accuracy": 0.5, "standard_error": 0.1},
]
HARNESS = {"piqa": {"results": {"piqa": {"acc": 0.5}}}}


@pytest.mark.parametrize("training_length", [6, None])
def test_perplexity_has_a_line_a_window(drawn, training_length):
    axes = drawn(plot_perplexity, PERPLEXITY, training_length)
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert lines["Window 4"].get_ydata() == pytest.approx([2.0, 1.0])
    assert lines["Window 8"].get_xdata() == pytest.approx([1.0, 14**0.5])
    assert axes.get_ylabel() == "loss (nats per token)"
    marks = [line for line in axes.get_lines() if list(line.get_xdata()) == [6, 6]]
    assert len(marks) == (training_length is not None)


def test_needle_is_a_map(drawn):
    axes = drawn(plot_needle, NEEDLE)
    assert axes.get_images()[0].get_array().tolist() == [[1.0, 0.0], [0.5, None]]


def test_recall_has_a_bar_a_task(drawn):
    axes = drawn(plot_recall, RECALL)
    assert [bar.get_height() for bar in axes.patches] == [0.5, 0.25]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["64\n4 pairs", "64\n8 pairs"]


def test_the_harness_has_a_bar_a_task(drawn):
    axes = drawn(plot_harness, HARNESS)
    assert [bar.get_width() for bar in axes.patches] == [0.5]
    assert [text.get_text() for text in axes.texts] == [" 50.0%"]


@pytest.mark.parametrize(
    ("plot", "arguments"),
    [
        (plot_perplexity, (PERPLEXITY, 6)),
        (plot_needle, (NEEDLE,)),
        (plot_recall, (RECALL,)),
        (plot_harness, (HARNESS,)),
    ],
)
def test_a_picture_is_a_png(tmp_path, plot, arguments):
    plot(tmp_path / "picture.png", *arguments)
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
