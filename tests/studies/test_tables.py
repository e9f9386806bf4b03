"""The tables, from figures whose answers are known."""

import pytest

from transxssm.studies.report import _equal_time
from transxssm.studies.tables import notes_of, tables_of


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
        "runs": [{"has_diverged": False}],
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
    assert "at the edge of those tried" in notes
    assert "Not everything was run: the budget" in notes


def test_runs_are_those_behind_the_mean():
    rates = [
        {"learning_rate": rate, "eval_loss": 2.0, "has_diverged": has_diverged, "last_step": 8}
        for rate, has_diverged in ((1e-3, False), (1e-3, False), (1e-3, True), (1e-2, False))
    ]
    table = tables_of(
        report({"swept": contender(rates=rates), "tuned": contender(runs=4 * [{"has_diverged": False}])})
    )["Results"]
    assert [row[table.headings.index("runs")] for row in table.rows] == ["2", "4"]
