"""Results grow by a cell, are continued under the same settings, and refuse others."""

import json

import pytest

from transxssm.evaluation import CellPlan, Results, ResultTable

SETTINGS = {"seed": 0, "text": "a"}


def plans_of(*keys, measured, fails_at=None):
    def measure(key, advance):
        if key == fails_at:
            raise KeyboardInterrupt
        measured.append(key)
        advance(2)
        return {"value": f"of {key}"}

    return [CellPlan(key, 2, lambda advance, key=key: measure(key, advance)) for key in keys]


def open_results(path, **changes):
    return Results.open(path, "test", SETTINGS | changes, {"device": "cpu"})


def run(results, plans):
    steps, finished = [], []
    results.measure(plans, steps.append, finished.append)
    return sum(steps), finished


def test_an_interrupted_evaluation_goes_on_and_ends_the_same(tmp_path):
    whole, measured = open_results(tmp_path / "whole.json"), []
    assert run(whole, plans_of("a", "b", "c", measured=measured)) == (6, ["a", "b", "c"])

    path, measured = tmp_path / "new" / "parts.json", []
    with pytest.raises(KeyboardInterrupt):
        run(open_results(path), plans_of("a", "b", "c", measured=measured, fails_at="c"))
    assert measured == ["a", "b"]
    again = open_results(path)
    assert run(again, plans_of("a", "b", "c", measured=measured)) == (6, ["c"])
    assert measured == ["a", "b", "c"]
    assert again.cells == whole.cells
    assert path.read_text() == (tmp_path / "whole.json").read_text()
    assert [entry.name for entry in path.parent.iterdir()] == ["parts.json"]


def test_further_cells_join_those_that_are_there(tmp_path):
    path, measured = tmp_path / "results.json", []
    run(open_results(path), plans_of("b", measured=measured))
    results = open_results(path)
    run(results, plans_of("a", measured=measured))
    assert json.loads(path.read_text())["cells"] == {"b": {"value": "of b"}, "a": {"value": "of a"}}


def test_other_settings_are_refused_and_named(tmp_path):
    path = tmp_path / "results.json"
    run(open_results(path), plans_of("a", measured=[]))
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"under other settings: more was None and is 1; seed was 0 and is 5\. Choose"):
        open_results(path, seed=5, more=1)
    assert path.read_bytes() == before


def test_a_tuple_is_the_list_that_it_is_stored_as(tmp_path):
    run(open_results(tmp_path / "r.json", depths=(0, 1)), plans_of("a", measured=[]))
    assert open_results(tmp_path / "r.json", depths=(0, 1)).cells


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"settings": {}}'])
def test_what_is_no_result_is_refused(tmp_path, content):
    path = tmp_path / "results.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="holds no results that can be continued"):
        open_results(path)


def test_a_table_in_markdown():
    table = ResultTable(["task", "value"], [["a", "1"], ["b", "2"]])
    assert table.to_markdown() == "| task | value |\n| :-- | --: |\n| a | 1 |\n| b | 2 |\n"
