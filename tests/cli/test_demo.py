"""`transxssm demo`, from nothing to the last line, at a size that takes seconds."""

import json
import lzma
import re

import pytest

from transxssm.training import load_recipe
from transxssm_cli import demo
from transxssm_cli.demo import chart, loss_points, xz_bits_per_byte
from transxssm_cli.training import opening_words


@pytest.fixture
def show(run, recipe):
    def invoke(*overrides):
        return run("demo", "--recipe", recipe, *overrides)

    return invoke


def test_it_trains_and_shows_what_came_of_it_and_shows_it_again(show, tmp_path, corpus):
    folder = tmp_path / "run"
    first = show()
    assert first.exit_code == 0, first.stderr
    summary = json.loads((folder / "summary.json").read_text())

    assert f"Training the recipe recipe on {corpus}, into {folder}." in first.stdout
    assert re.search(r"^\d\.\d\d ┤", first.stdout, re.MULTILINE)  # the chart's upper end
    assert f"{folder}/loss.png" in first.stdout
    held_out, num_bytes, bits = re.search(
        r"on (\d+) held-out files, ([\d,]+) bytes.*\n +([\d.]+)  this model", first.stdout
    ).groups()
    assert 0 < int(held_out) < 12
    assert int(num_bytes.replace(",", "")) == summary["held_out_bytes"]
    assert float(bits) == pytest.approx(summary["bits_per_byte"], abs=5e-4)
    assert re.search(r"[\d.]+  xz -9, on the same files", first.stdout)
    words = opening_words(load_recipe(folder / "recipe.yaml").data)
    assert words.startswith("def ")
    for prompt, seed in ((words, 0), (words, 1)):
        assert f"It continues {prompt!r} (seed {seed}):\n{prompt}" in first.stdout
    for place in (f'from_pretrained("{folder}")', f"generate {folder}", "metrics.jsonl", "train laptop data.corpus="):
        assert place in first.stdout

    again = show()
    assert again.exit_code == 0
    assert "Training the recipe" not in again.stdout
    assert f"To train it again: rm -r {folder}" in again.stdout
    # The same figures and, from fixed seeds, the same completions.
    result = first.stdout[first.stdout.index("Loss in nats") :]
    assert again.stdout[again.stdout.index("Loss in nats") :].startswith(result)


def test_it_goes_on_with_an_unfinished_run(show, tmp_path):
    assert show("training.max_steps=2").exit_code == 0
    (tmp_path / "run" / "summary.json").unlink()
    resumed = show()
    assert resumed.exit_code == 0
    assert "resuming from" in resumed.stderr
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 4


def test_on_a_slow_machine_it_shortens_itself_once_to_the_time_it_promises(show, tmp_path, monkeypatch):
    monkeypatch.setattr("transxssm.training.fit.measured_step_seconds", lambda *_, **__: 100.0)
    first = show()
    assert "a step takes 100.00 s on this machine: 2 of the recipe's 4 steps fit into 5 minutes" in first.stderr
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 2
    monkeypatch.setattr("transxssm.training.fit.measured_step_seconds", lambda *_, **__: 1.0)
    again = show()
    assert "had finished before" in again.stdout
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 2


def test_a_length_that_was_asked_for_is_kept(show, tmp_path, monkeypatch):
    monkeypatch.setattr("transxssm.training.fit.measured_step_seconds", lambda *_, **__: 1000.0)
    assert show("training.max_steps=3").exit_code == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 3


def test_an_interruption_says_that_the_same_command_goes_on(show, monkeypatch):
    def interrupt(recipe, resume):
        raise KeyboardInterrupt("continue with --resume")  # which this command does not have

    monkeypatch.setattr(demo, "train", interrupt)
    result = show()
    assert result.exit_code == 130
    assert result.stderr == "interrupted: the same command goes on from the last checkpoint\n"


def test_another_run_in_its_folder_is_left_alone(run, recipe, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    result = run("demo", "--recipe", recipe)
    assert result.exit_code == 2
    assert "holds something other than a run" in result.stderr
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def test_bits_per_byte_of_xz():
    texts = ["def f(x):\n    return x\n" * 50, "é€😀"]
    content = "".join(texts).encode()
    bits, num_bytes = xz_bits_per_byte(iter(texts))
    assert num_bytes == len(content)
    assert bits * num_bytes / 8 == len(lzma.compress(content, preset=9))


def test_loss_points(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 5.0}\n{"step": 2, "loss": 4.0, "eval_loss": 4.5}\n')
    assert loss_points(path, "loss") == [(1, 5.0), (2, 4.0)]
    assert loss_points(path, "eval_loss") == [(2, 4.5)]


def test_points_lie_where_their_axes_say():
    lines = chart({"·": [(0, 5.0), (10, 3.0), (20, 1.0)], "o": [(20, 2.0)]}, width=11, height=5)
    assert lines == [
        "5.00 ┤·",
        "     ┤",
        "     ┤     ·",
        "     ┤          o",
        "1.00 ┤          ·",
        "     └───────────",
        "      0        20",
    ]


def test_later_series_cover_earlier_ones():
    assert chart({"·": [(1, 1.0)], "o": [(1, 1.0)]}, width=4, height=2)[0] == "1.00 ┤o"


def test_one_point_is_enough_and_none_is_not():
    assert "·" in "".join(chart({"·": [(7, 2.5)]}))
    with pytest.raises(ValueError, match="at least one point"):
        chart({"·": []})
