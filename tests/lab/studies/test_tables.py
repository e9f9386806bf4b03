"""The tables, from figures whose answers are known."""

import pytest

from transxssm_lab.studies.report import _equal_time
from transxssm_lab.studies.tables import notes_of, tables_of


def contender(**values):
    return {
        "cell": "a",
        "size": None,
        "row": None,
        "column": None,
        "weights_of": None,
        "status": "finished",
        "parameters": 1000,
        "flops": 2e9,
        "learning_rate": 1e-3,
        "rate_is_at_edge": False,
        "mean": {"eval_loss": 2.0, "perplexity": 7.4, "bits_per_byte": 1.5, "train_seconds": 10.0, "train_tokens": 64},
        "spread": {},
        "runs": [{"seed": 0, "learning_rate": 1e-3, "has_diverged": False, "bits_per_byte": 1.5, "eval_loss": 2.0}],
        "tuning": [],
        "rates": [],
        "measured": {},
        "curve": [],
        "held_out": [],
        **values,
    }


def report(contenders, status="complete"):
    return {
        "settings": {"grid": {}},
        "contenders": contenders,
        "equal_time": _equal_time(contenders),
        "status": status,
    }


def test_equal_time_is_that_of_the_fastest():
    curve = [{"seconds": 10.0, "loss": 4.0}, {"seconds": 20.0, "loss": 3.0}]
    slow = [{"seconds": 20.0, "loss": 3.5}, {"seconds": 40.0, "loss": 2.5}]
    late = [{"seconds": 30.0, "loss": 3.5}, {"seconds": 40.0, "loss": 2.5}]
    between = [{"seconds": 10.0, "loss": 3.8}, {"seconds": 30.0, "loss": 2.8}]
    contenders = {
        name: contender(held_out=points)
        for name, points in {"fast": curve, "slow": slow, "late": late, "between": between}.items()
    }
    assert _equal_time(contenders)["seconds"] == dict.fromkeys(contenders, 20.0)
    assert _equal_time(contenders)["eval_loss"] == {
        "fast": 3.0,
        "slow": 3.5,
        "late": None,
        "between": pytest.approx(3.3),
    }


def test_training_loss_over_stretches_that_double():
    curve = [{"tokens": tokens, "seconds": 1.0, "loss": float(tokens)} for tokens in range(8, 257, 8)]
    table = tables_of(report({"a": contender(curve=curve), "b": contender(curve=curve[:1])}))[
        "Training loss over tokens"
    ]
    assert table.headings[1:] == ["8", "16", "32", "64", "128", "256"]
    assert table.rows == [
        ["a", "8.000", "16.000", "28.000", "52.000", "100.000", "196.000"],
        ["b", "8.000", "–", "–", "–", "–", "–"],
    ]


def test_sizes_are_not_compared_in_time_and_their_gain_is_a_difference():
    curve = [{"seconds": 10.0, "loss": 4.0}]
    contenders = {
        "a-small": contender(size="small", held_out=curve),
        "a-large": contender(size="large", held_out=curve, mean={"bits_per_byte": 1.2}, spread={"bits_per_byte": 0.01}),
    }
    assert _equal_time(contenders)["seconds"] == {}
    table = tables_of(report(contenders))["Gain by scale"]
    assert table.rows == [["a", "1.5000", "1.2000 ± 0.0100", "0.3000"]]


def test_the_two_ways_have_gaps_where_no_cell_is():
    contenders = {
        "x": contender(row="attention", column="RoPE"),
        "y": contender(row="SSD", column="a_t", mean={"perplexity": 8.0}),
    }
    table = tables_of(report(contenders))["Two ways"]
    assert table.headings == ["perplexity", "RoPE", "a_t"]
    assert table.rows == [["attention", "7.400", "–"], ["SSD", "–", "8.000"]]


def test_rates_say_where_a_cell_diverged_and_notes_where_the_best_is_at_the_edge():
    rates = [
        {"learning_rate": 1e-3, "eval_loss": 2.0, "has_diverged": False, "last_step": 4},
        {"learning_rate": 1e-2, "eval_loss": float("inf"), "has_diverged": True, "last_step": 3},
    ]
    one = report({"a": contender(rates=rates, rate_is_at_edge=True)}, status="the budget of 1 minutes is spent")
    assert tables_of(one)["Learning rates"].rows == [["a", "2.0000", "diverged (step 3)"]]
    notes = "\n".join(notes_of(one))
    assert "lowest or highest learning rate tried" in notes
    assert "Not everything was run: the budget" in notes


def runs_of(*figures):
    """(seed, rate, bits per byte; None: diverged)."""
    return [
        {"seed": seed, "learning_rate": rate, "has_diverged": value is None, "bits_per_byte": value, "eval_loss": value}
        for seed, rate, value in figures
    ]


def test_runs_are_those_behind_the_mean():
    swept = runs_of((0, 1e-3, 1.5), (1, 1e-3, 1.6), (2, 1e-3, None), (0, 1e-2, 1.4))
    tuned = runs_of(*((seed, None, 1.5) for seed in range(4)))
    table = tables_of(report({"swept": contender(runs=swept), "tuned": contender(runs=tuned)}))["Results"]
    assert [row[table.headings.index("runs")] for row in table.rows] == ["2", "4"]


def test_seeds_are_compared_with_the_best_of_the_size_one_by_one():
    best = runs_of((0, 1e-3, 1.5), (1, 1e-3, 1.7), (2, 1e-3, 1.2), (0, 1e-2, 1.9))  # another rate's does not count
    other = runs_of((0, None, 1.6), (1, None, 1.6), (2, None, 1.5), (3, None, 9.0))
    large = runs_of((0, 1e-3, 1.1))
    contenders = {
        "best": contender(size="small", runs=best, mean={"bits_per_byte": 1.47}),
        "other": contender(size="small", runs=other, mean={"bits_per_byte": 3.43}),
        "large": contender(size="large", runs=large, mean={"bits_per_byte": 1.1}),
        "none": contender(size="large", runs=[], mean={}),
    }
    table = tables_of(report(contenders))["Seed by seed"]
    assert table.headings == ["bits per byte, seed", "0", "1", "2", "3", "behind the best of its size"]
    assert table.rows == [
        ["best", "1.5000", "1.7000", "1.2000", "–", "–"],
        ["other", "1.6000", "1.6000", "1.5000", "9.0000", "0.1000 ± 0.2000 (2 of 3)"],
        ["large", "1.1000", "–", "–", "–", "–"],
        ["none", "–", "–", "–", "–", "–"],
    ]


def test_one_seed_has_no_table_of_seeds():
    one = contender(runs=runs_of((0, 1e-3, 1.5), (0, 1e-2, 1.6)))
    assert "Seed by seed" not in tables_of(report({"one": one}))


def test_figures_of_no_text_are_losses():
    runs = [run | {"bits_per_byte": None} for run in runs_of((0, None, 2.0), (1, None, 2.5))]
    table = tables_of(report({"a": contender(runs=runs, mean={"eval_loss": 2.25})}))["Seed by seed"]
    assert table.headings[0] == "held-out loss, seed"
    assert table.rows == [["a", "2.0000", "2.5000", "–"]]
