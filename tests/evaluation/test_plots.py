"""Pictures are drawn from cells, gaps and unknown errors included."""

import pytest
from PIL import Image

from transxssm.evaluation import plot_harness, plot_needle, plot_perplexity, plot_recall


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
    {"length": 64, "pairs": 4, "accuracy": 0.5, "standard_error": 0.1},
    {"length": 64, "pairs": 8, "accuracy": 0.25, "standard_error": None},
]
HARNESS = {"piqa": {"results": {"piqa": {"acc": 0.5}}}}


@pytest.mark.parametrize(
    ("draw", "arguments"),
    [
        (plot_perplexity, (PERPLEXITY, 6)),
        (plot_perplexity, (PERPLEXITY, None)),
        (plot_needle, (NEEDLE,)),
        (plot_recall, (RECALL,)),
        (plot_harness, (HARNESS,)),
    ],
)
def test_a_picture(tmp_path, draw, arguments):
    draw(tmp_path / "picture.png", *arguments)
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.format == "PNG"
        assert len(picture.convert("RGB").getcolors(10**6)) > 10
