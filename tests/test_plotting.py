"""The style of the plots: one colour a model, names for people, labels that can be read."""

from itertools import pairwise

import matplotlib
import pytest
from matplotlib.figure import Figure
from PIL import Image

from transxssm import plotting
from transxssm.plotting import LOOKS, binned, draw_heat_map, draw_line, label_lines, looks_of, picture, set_ticks, tick


@pytest.fixture
def axes():
    return Figure(figsize=(6, 4)).subplots()


@pytest.mark.parametrize("model", ["transxssm", "llama"])
def test_the_variants_of_a_model_share_its_colour_and_differ_in_the_line(model):
    variants = [look for key, look in LOOKS.items() if key == model or key.startswith(f"{model}-")]
    variants = [look for look in variants if look not in (LOOKS["transxssm-conv"], LOOKS["transxssm-ssd"])]
    assert len({look.colour for look in variants}) == 1
    assert len({str(look.line) for look in variants}) == len(variants) > 2


def test_models_differ_in_colour():
    models = looks_of(["transxssm", "transxssm-conv", "llama", "mamba2", "jamba"])
    assert len({look.colour for look in models.values()}) == 5


def test_no_two_of_many_look_the_same():
    looks = looks_of(["rope", "rope-conv", "conv", *(f"option-{index}" for index in range(12))])
    assert len({(look.colour, look.line) for look in looks.values()}) == 15
    assert list(looks)[3] == "option-0"


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("transxssm-compiled", "TransXSSM, compiled"),
        ("mamba2", "Mamba-2"),
        ("ratio-15-1", "15:1"),
        ("norm-BC", "Norm on B and C"),
        ("output-gate", "Output gate"),
    ],
)
def test_names_are_for_people(key, name):
    assert looks_of([key])[key].name == name


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (512, "512"),
        (1024, "1K"),
        (65536, "64K"),
        (1e7, "10M"),
        (131_072_000, "131M"),
        (0.002, "0.002"),
        (0.05, "0.05"),
        (0, "0"),
        (2e9, "2B"),
        (1500, "1.5K"),
    ],
)
def test_numbers_are_short(number, text):
    assert tick(number) == text


def test_labels_stand_at_the_lines_in_their_order_and_apart(axes):
    for name, end in (("low", 1.0), ("middle", 1.01), ("high", 1.02), ("far", 3.0)):
        draw_line(axes, plotting.Look(name, plotting.BLUE, "-"), [1, 2], [2.0, end])
    label_lines(axes)
    labels = {text.get_text(): text for text in axes.texts}
    heights = [labels[name].xyann[1] for name in ("low", "middle", "high", "far")]
    assert heights == sorted(heights)
    assert min(b - a for a, b in pairwise(heights)) > 0.04
    assert all(0 <= height <= 1 for height in heights)
    assert labels["far"].xy == pytest.approx((0.954, 0.954), abs=0.01)  # where the line ends, in shares of the axes
    assert all(text.xyann[0] > 1 for text in labels.values())


def test_a_line_that_ends_in_a_gap_is_labelled_at_its_last_point(axes):
    draw_line(axes, LOOKS["llama"], [1, 2, 3], [1.0, 2.0, float("nan")])
    label_lines(axes)
    assert axes.texts[0].xy[0] < 1
    assert axes.texts[0].xy[1] > 0.5


def test_many_lines_have_a_legend(axes):
    for look in looks_of(map(str, range(plotting.MOST_LABELS + 1))).values():
        draw_line(axes, look, [1, 2], [1.0, 2.0])
    label_lines(axes)
    assert not axes.texts
    assert len(axes.get_legend().get_texts()) == plotting.MOST_LABELS + 1


def test_spread_is_a_band(axes):
    draw_line(axes, LOOKS["llama"], [1, 2], [1.0, 2.0], [0.5, 1.5], [1.5, 2.5])
    (band,) = axes.collections
    assert {tuple(vertex) for vertex in band.get_paths()[0].vertices} >= {(1, 0.5), (2, 1.5), (1, 1.5), (2, 2.5)}


def test_ticks_do_not_touch(axes):
    set_ticks(axes, [1, 64, 768, 832, 896])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "64", "768"]


def test_a_noisy_curve_keeps_its_mean():
    points = [{"tokens": index, "loss": index % 2} for index in range(1000)]
    means = binned(points, "tokens", ["loss"], most=100)
    assert len(means["loss"]) == 100
    assert means["loss"] == pytest.approx([0.5] * 100)
    assert means["tokens"].mean() == pytest.approx(499.5)


def test_a_heat_map_has_lengths_to_the_right_and_depths_downwards(axes):
    cells = [
        {"length": length, "depth": depth, "accuracy": found}
        for length, depth, found in [(1024, 0.0, 1.0), (1024, 1.0, 0.5), (2048, 0.0, 0.25)]
    ]
    image = draw_heat_map(axes, cells)
    assert image.get_array().tolist() == [[1.0, 0.25], [0.5, None]]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1K", "2K"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0%", "100%"]
    assert sorted(text.get_text() for text in axes.texts) == ["100", "25", "50"]


def test_a_picture_is_written_and_the_users_settings_are_left_alone(tmp_path):
    before = dict(matplotlib.rcParams)
    with picture(tmp_path / "new" / "a.png", 1, 2, width=4, height=2) as panels:
        assert panels.shape == (2,)
        assert not panels[0].spines["top"].get_visible()
    assert dict(matplotlib.rcParams) == before
    with Image.open(tmp_path / "new" / "a.png") as image:
        assert image.size == (640, 320)
