"""Studies in YAML: what is bundled, what is checked, what makes two studies the same."""

import re

import pytest

from transxssm_lab.studies import bundled_studies, contenders_of, load_study, plan_of
from transxssm_lab.studies.schedule import expected_config, recipe_for, size_of

HOURS = 3600.0


@pytest.mark.parametrize("name", [name for name in bundled_studies() if name.endswith("-cpu")])
def test_a_study_for_two_cores_fits_into_two_hours(name):
    study = load_study(name)
    contenders = contenders_of(study)
    assert plan_of(study, contenders).seconds < 1.75 * HOURS  # the rest is for evaluation and data
    for contender in contenders:
        parameters, _ = size_of(expected_config(study, contender), 1024)
        assert parameters < 8e6


@pytest.mark.parametrize("name", [name for name in bundled_studies() if name.endswith("-paper")])
def test_every_cell_has_a_size_for_two_cores_and_for_a_gpu(name):
    assert load_study(name).cells.keys() == load_study(name.replace("-paper", "-cpu")).cells.keys()
    assert load_study(name).grid.title == load_study(name.replace("-paper", "-cpu")).grid.title


def test_table_2_has_a_column_that_the_paper_lacks():
    cells = load_study("table2-cpu").cells
    places = {(cell.row, cell.column) for cell in cells.values()}
    columns = ("Conv1d + D", "a_t", "RoPE", "RoPE, Conv1d + D")
    assert places == {("attention", "RoPE"), *((row, c) for row in ("SSD", "SSD + attention") for c in columns)}


def test_table_3_is_matched_at_both_sizes():
    study = load_study("table3-cpu")
    parameters = {
        contender.name: size_of(expected_config(study, contender), 1024)[0] for contender in contenders_of(study)
    }
    for size in ("small", "large"):
        own = parameters[f"transxssm-{size}"]
        for name in ("transxssm-conv", "llama", "mamba2", "jamba"):
            assert parameters[f"{name}-{size}"] == pytest.approx(own, rel=0.02)
    assert 3.5 < parameters["transxssm-large"] / parameters["transxssm-small"] < 4.5


def test_runs_differ_in_nothing_but_what_the_grid_says(study, tmp_path):
    chosen = study()
    hybrid, ssd = (
        recipe_for(chosen, contender, tmp_path, seed=1, learning_rate=2e-3, max_steps=None).to_dict()
        for contender in contenders_of(chosen)
    )
    assert hybrid["data"] == ssd["data"]
    assert hybrid["training"] == ssd["training"]
    assert (hybrid["training"]["seed"], hybrid["training"]["data_seed"]) == (1, 1)
    assert ssd["training"]["learning_rate"] == 2e-3
    assert hybrid["model"] != ssd["model"]


def test_all_are_tuned_before_whole_runs_and_seeds_come_one_after_the_other(study):
    chosen = study()
    schedule = plan_of(chosen, contenders_of(chosen))
    assert {run.steps for run in schedule.tuning} == {2}
    assert [(run.contender.name, run.seed) for run in schedule.full] == [
        ("hybrid", 0),
        ("ssd", 0),
        ("hybrid", 1),
        ("ssd", 1),
    ]
    assert schedule.full[0].tokens == 4 * 2 * 32
    assert len({run.folder for run in schedule.runs}) == len(schedule.runs)


def test_where_and_how_fast_is_not_what_a_study_is(study):
    assert study("grid.output_dir=elsewhere", "grid.flops_per_second=1.0").settings() == study().settings()
    assert study("training.max_steps=5").settings() != study().settings()


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_a_study_on_another(tmp_path):
    base = write(
        tmp_path / "base.yaml",
        "cells: {a: {model: {qk_norm: true}}, b: {}}\ntuning: {learning_rates: [0.1], max_steps: 2}\ntraining: {max_steps: 4, seed: 1}\n",
    )
    assert base.exists()
    middle = write(tmp_path / "middle.yaml", "base: base.yaml\ncells: {b: null, c: {}}\ntuning: null\n")
    study = load_study(
        write(tmp_path / "top.yaml", f"base: {middle}\ntraining: {{seed: null, max_steps: 8}}\n"),
        ["training.weight_decay=0.1"],
    )
    assert (study.name, list(study.cells), study.tuning) == ("top", ["a", "c"], None)
    assert study.cells["a"].model == {"qk_norm": True}
    assert study.training == {"max_steps": 8, "weight_decay": 0.1}


@pytest.mark.parametrize(
    ("base", "words"),
    [
        ("table2-cpuu", "did you mean table2-cpu?"),
        ("[table2-cpu]", "expected the name or the file of a study"),
        ("{path}", "stands on this study itself"),
        ("other.yaml", "stands on this study itself"),
        ("folder/../other.yaml", "stands on this study itself"),
    ],
)
def test_bad_bases(tmp_path, base, words):
    """A circle of two, too: other.yaml stands on top.yaml."""
    path = tmp_path / "top.yaml"
    (tmp_path / "folder").mkdir()
    write(tmp_path / "other.yaml", "base: folder/../top.yaml\ncells: {b: {}}\n")
    write(path, f"base: {base.format(path=path)}\ncells: {{a: {{}}}}\n")
    with pytest.raises(ValueError, match=re.escape(words)) as refused:
        load_study(path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"cells": {"a": {"weights_of": "b"}}}, "no cell 'b'"),
        (
            {"cells": {"a": {}, "b": {"weights_of": "a"}}},
            "measured, not trained: add a section perplexity, recall, algorithmic or needle",
        ),
        (
            {"cells": {"a": {}, "b": {"weights_of": "a"}, "c": {"weights_of": "b"}}, "perplexity": {"lengths": [16]}},
            "no weights",
        ),
        ({"cells": None}, "a study needs cells"),
        ({"cells": {}}, "at least one cell"),
        ({"cells": {"../a": {}}}, "names no folder"),
        ({"recall": {"sizes": [[16]]}}, "expected [length, pairs]"),
        ({"algorithmic": {"task": "s4", "train_elements": [4], "lengths": [4]}}, "unknown task 's4'"),
        (
            {"algorithmic": {"task": "s3", "train_elements": [], "lengths": [4]}},
            "at least one of train_elements and lengths",
        ),
        (
            {"algorithmic": {"task": "s3", "train_elements": [4], "lengths": [0]}},
            "at least 1 element or letter: got length 0",
        ),
        ({"needle": {"train_lengths": [], "lengths": [64]}}, "at least one of train_lengths"),
        (
            {"needle": {"train_lengths": [64], "lengths": [64]}, "perplexity": {"lengths": [16]}},
            "one of perplexity, recall, algorithmic and needle",
        ),
        ({"sizes": {"s": {"models": {}}}}, "unknown key sizes.s.models: did you mean sizes.s.model?"),
    ],
    ids=str,
)
def test_bad_studies(study, changes, words):
    with pytest.raises(ValueError, match=re.escape(words)) as refused:
        study(**changes)
    assert "\n" not in str(refused.value)
