"""`transxssm study`: the plan, the tables, and every mistake in one line."""

import json
import re
import time

import pytest
import yaml

from transxssm_lab import study_command


@pytest.fixture
def study_file(tmp_path, recipe):
    """One cell of two steps, out of the recipe that the other commands are tested with."""
    sections = yaml.safe_load(recipe.read_text())
    del sections["training"]["output_dir"]
    sections["training"] |= {"max_steps": 2, "eval_strategy": "no", "save_strategy": "no"}
    sections |= {
        "grid": {"title": "Is it one?", "output_dir": str(tmp_path / "out")},
        "cells": {"hybrid": {}, "llama": {"model": {"architecture": "llama"}}},
    }
    path = tmp_path / "mini.yaml"
    path.write_text(yaml.safe_dump(sections), encoding="utf-8")
    return path


def test_without_a_recipe_the_bundled_ones_are_listed(run):
    result = run("study")
    assert result.exit_code == 0
    for name in ("table2", "table3", "length", "recall", "ratio", "stability"):
        for size in ("cpu", "paper"):
            assert f"{name}-{size}" in result.stdout


def test_the_plan_alone_writes_nothing(run, study_file, tmp_path):
    result = run("study", study_file, "grid.seeds=[0, 1]", "--list")
    assert result.exit_code == 0
    assert "4 runs, 0 done" in result.stdout
    assert "hybrid" in result.stdout
    assert not (tmp_path / "out").exists()


def test_plan_progress_and_tables(run, study_file, tmp_path, monkeypatch):
    monkeypatch.setattr(study_command, "SECONDS_BETWEEN_LINES", 0.0)
    result = run("study", study_file, "--only", "hybrid")
    assert result.exit_code == 0
    assert result.stderr.index("1 runs, 0 done") < result.stderr.index("hybrid, full, seed 0")
    assert re.search(r"^ 50\.0%  hybrid, full, seed 0 · step 1/2 · about .* left$", result.stderr, re.MULTILINE)
    assert "resume" not in result.stderr
    report = json.loads((tmp_path / "out" / "results.json").read_text())
    loss = report["contenders"]["hybrid"]["mean"]["eval_loss"]
    assert f"{loss:.4f}"[:4] in result.stdout
    assert "Not everything was run: llama not begun" in result.stdout
    assert "0:00" not in result.stderr  # no bar where nobody watches
    result = run("study", study_file, "--only", "hybrid")
    assert "1 runs, 1 done, about < 1 min left" in result.stderr


def test_where_no_bar_is_there_is_a_line_a_run_and_one_now_and_then(study_file, monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with study_command._progress(study_command.load_study(study_file)) as notify:
        for what, seconds in (
            ("a", 0),
            ("a · step 1", 5),
            ("a · step 2", 9.9),
            ("a · step 3", 0.1),
            ("b", 1),
            ("b · step 1", 1),
        ):
            now[0] += seconds
            notify(what, now[0] / 100)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("  ")[-1] for line in lines] == ["a", "a · step 3", "b"]


def test_a_budget_that_was_too_small_says_what_is_left_in_place_of_empty_tables(run, study_file, monkeypatch):
    def run_study(study, *, started, budget_minutes, **options):
        begun.append(started)
        return real(study, started=started - 3600, budget_minutes=budget_minutes, **options)

    begun, real = [], study_command.run_study
    monkeypatch.setattr(study_command, "run_study", run_study)
    result = run("study", study_file, "--budget-minutes", "10")
    assert result.exit_code == 0
    assert begun[0] <= time.monotonic()
    assert "the budget of 10 minutes is spent; the rest takes about < 1 min, evaluation not counted" in result.stdout
    assert "not begun" not in result.stdout


def test_the_report_alone_is_of_what_is_there(run, error_of, study_file, tmp_path):
    assert "holds no study" in error_of("study", study_file, "--report")
    run("study", study_file, "--only", "hybrid")
    written = (tmp_path / "out" / "README.md").read_text()
    for name in ("README.md", "results.json"):
        (tmp_path / "out" / name).unlink()
    result = run("study", study_file, "--report")
    assert result.exit_code == 0
    assert "llama not begun" in result.stdout
    again = (tmp_path / "out" / "README.md").read_text()
    assert again.partition("## Where")[0] == written.partition("## Where")[0]
    summary = json.loads((tmp_path / "out/hybrid/seed-0/summary.json").read_text())
    assert f"| trained_on | {summary['device']}, {summary['dtype']}, torch " in again
    assert list((tmp_path / "out").rglob("seed-*/summary.json")) == [tmp_path / "out/hybrid/seed-0/summary.json"]


def test_an_interruption_says_how_to_go_on(run, study_file, monkeypatch):
    def stop(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("transxssm_lab.study_command.run_study", stop)
    result = run("study", study_file)
    assert result.exit_code == 130
    assert "the same command goes on from there" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["tabel2-cpu"], "no study 'tabel2-cpu': did you mean table2-cpu?"),
        (["table2-cpu", "--only", "hybrid-rop"], "did you mean hybrid-rope?"),
        (["table2-cpu", "grid.seed=[0]"], "unknown key grid.seed: did you mean grid.seeds?"),
        (["table2-cpu", "tunning.max_steps=3"], "unknown section 'tunning': did you mean tuning?"),
        (
            ["table2-cpu", "cells.hybrid-rope.modell={}"],
            "unknown key cells.hybrid-rope.modell: did you mean cells.hybrid-rope.model?",
        ),
        (["table2-cpu", "training.max_stepss=3"], "did you mean training.max_steps?"),
        (["table2-cpu", "model.hidden_sizee=3"], "did you mean model.hidden_size?"),
        (["table2-cpu", "grid.seeds=[zero]"], "grid.seeds.0: got 'zero'"),
        (["table2-cpu", "grid.seeds=[]"], "expected at least one seed"),
        (["options-gpu", "grid.learning_rates=[1e-3]"], "leave one out"),
        (["table2-cpu", "training.max_steps=-1"], "training.max_steps: got -1"),
        (["table2-cpu", "model.num_attention_heads=7"], "multiple of num_attention_heads"),
        (["table2-cpu", "cells.hybrid-rope.model.architecture=lama"], "model.architecture: got 'lama'"),
        (["table2-cpu", "--budget-minutes", "0"], "more than 0"),
        (["table2-cpu", "seeds"], "expected section.key=value"),
        (["table2-cpu", "--report", "--only", "hybrid-rope"], "leave out --only"),
        (["table2-cpu", "--report", "--list"], "leave one out"),
        (["needle-cpu", "needle.depths=[0.5, 1.5]"], "needle.depths"),
        (["recall-cpu", "recall.sizes=[[8, 4]]"], "need at least 16 tokens"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input(error_of, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert words in error_of("study", *arguments)
    assert not (tmp_path / "runs").exists()
