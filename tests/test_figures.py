"""The figures of the documentation: each can be drawn again, and the page shows each with the command that does."""

import re

import pytest

from scripts.figures import DRAWN, FIGURES, main, relative_speeds
from scripts.results import ROOT, relative_to

PAGE = ROOT / "docs" / "figures.md"


@pytest.mark.parametrize("name", DRAWN)
def test_a_figure_is_drawn(name, tmp_path):
    assert main([name], tmp_path) == 0
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_shows_every_figure_with_its_command():
    page = PAGE.read_text()
    assert set(re.findall(r"!\[[^]]+\]\(figures/([\w-]+)\.png\)", page)) == set(DRAWN)
    assert set(re.findall(r"scripts/figures\.py ([a-z0-9-]+)", page)) == set(DRAWN)
    assert {path.name for path in FIGURES.iterdir()} == {f"{name}.png" for name in DRAWN}


def test_an_unknown_figure_is_one_line(capsys):
    assert main(["figure9"]) == 2
    assert capsys.readouterr().err.startswith("figures: no figure 'figure9': expected one of overview, figure4")


def cell(contender, ratios, mode="train"):
    ratio = {"min": min(ratios), "median": sorted(ratios)[1], "max": max(ratios)}
    names = {"mode": mode, "contender": contender, "length": 1024, "reference": "transxssm"}
    return names | {"repeat_ratios": ratios, "ratio_to_reference": ratio}


def test_speed_is_the_inverse_of_the_time_of_the_same_turn():
    first = {"cells": [cell("llama", [2.0, 4.0, 8.0]), cell("llama", [1.0, 1.0, 1.0], mode="prefill")]}
    second = {"cells": [cell("llama", [1.0, 1.0, 1.0]), cell("jamba", [0.5, 1.0, 2.0])]}
    speeds = relative_speeds([first, second], ("train",))
    assert speeds == {"llama": {1024: (1 / 8, 1 / 4, 1 / 2)}, "jamba": {1024: (0.5, 1.0, 2.0)}}
    turned = relative_to({"cells": [cell("llama", [2.0, 4.0, 8.0]), cell("jamba", [1.0, 1.0, 1.0])]}, "jamba")
    assert relative_speeds([turned], ("train",))["llama"] == {1024: (1 / 8, 1 / 4, 1 / 2)}
