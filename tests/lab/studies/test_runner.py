"""A study end to end: the same data for all, the tuned rate, resuming, the budget, and runs that diverge."""

import json
import math
import shutil
import signal

import pytest
import torch
import yaml

from transxssm.training import NonFiniteError
from transxssm.training.trainer import TransXSSMTrainer
from transxssm_lab.studies import report_study, run_study, runner
from transxssm_lab.studies.outcome import DIVERGED


@pytest.fixture
def batches(monkeypatch):
    """The token ids of every training step, by run folder."""
    seen = {}
    step = TransXSSMTrainer.training_step

    def record(self, model, inputs, *args, **kwargs):
        seen.setdefault(self.args.output_dir, []).append(inputs["input_ids"].clone())
        return step(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(TransXSSMTrainer, "training_step", record)
    return seen


def stable(report):
    """A report without what no two runs share: times and places."""
    text = json.dumps(report["contenders"], default=str)

    def strip(value):
        if isinstance(value, dict):
            return {key: strip(item) for key, item in value.items() if "seconds" not in key}
        return [strip(item) for item in value] if isinstance(value, list) else value

    return strip(json.loads(text))


def test_a_grid_gives_one_table(study, batches, tmp_path):
    told = []
    report = run_study(study(), notify=lambda what, done: told.append(done))
    assert report["status"] == "complete"
    assert told == sorted(told)
    assert 0 <= told[0] < told[-1] <= 1
    for name in ("hybrid", "ssd"):
        one = report["contenders"][name]
        losses = [run["eval_loss"] for run in one["runs"]]
        assert len(losses) == 2
        assert losses[0] != losses[1]  # seeds matter
        assert one["mean"]["eval_loss"] == pytest.approx(sum(losses) / 2)
        assert one["spread"]["eval_loss"] == pytest.approx(abs(losses[0] - losses[1]) / math.sqrt(2))
        assert one["mean"]["train_tokens"] == 4 * 2 * 32
        best = min(one["tuning"], key=lambda entry: entry["eval_loss"])
        assert one["learning_rate"] == best["learning_rate"]
        recipe = (tmp_path / "out" / name / "seed-1" / "recipe.yaml").read_text()
        assert f"learning_rate: {best['learning_rate']}" in recipe
    orders = [torch.stack(batches[f"{tmp_path}/out/hybrid/seed-{seed}"]) for seed in (0, 1)]
    assert not torch.equal(*orders)  # a seed is one of the data's order too
    page = (tmp_path / "out" / "README.md").read_text()
    assert "| perplexity | RoPE |" in page
    assert "At equal wall time" in page
    for name in ("results.json", "loss.png", "loss-over-rate.png"):
        assert (tmp_path / "out" / name).stat().st_size > 100


def test_every_cell_reads_the_same_tokens_in_the_same_order(study, batches, tmp_path):
    cells = {
        "hybrid": {},
        "ssd": {"model": {"layer_types": ["linear_attention"] * 2, "ssd_conv_kernel_size": 4}},
        "llama": {"model": {"architecture": "llama"}},
        "mamba2": {"model": {"architecture": "mamba2"}},
        "jamba": {"model": {"architecture": "jamba"}},
    }
    report = run_study(
        study("grid.seeds=[0]", "training.max_steps=2", "training.eval_strategy=no", cells=cells, tuning=None)
    )
    assert report["status"] == "complete"
    first, *others = [torch.stack(batches[f"{tmp_path}/out/{name}/seed-0"]) for name in cells]
    assert first.shape == (2, 2, 32)
    for other in others:
        assert torch.equal(other, first)
    parameters = [one["parameters"] for one in report["contenders"].values()]
    assert max(parameters) / min(parameters) < 1.25


def test_an_interrupted_study_ends_with_the_same_table(study, tmp_path, monkeypatch):
    one = {"tuning": None, "cells": {"hybrid": {}}}
    whole = run_study(study(f"grid.output_dir={tmp_path / 'whole'}", **one))
    step = TransXSSMTrainer.training_step
    steps = iter(range(1000))

    def interrupt(self, *args, **kwargs):
        if next(steps) == 7:  # in the middle of the second run, after its checkpoint
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(TransXSSMTrainer, "training_step", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_study(study(f"grid.output_dir={tmp_path / 'cut'}", **one))
    kept = json.loads((tmp_path / "cut" / "results.json").read_text())
    assert kept["status"].startswith("interrupted")
    assert len(kept["contenders"]["hybrid"]["runs"]) == 1
    monkeypatch.setattr(TransXSSMTrainer, "training_step", step)
    resumed = run_study(study(f"grid.output_dir={tmp_path / 'cut'}", **one))
    assert stable(resumed) == stable(whole)


def test_what_has_finished_is_not_run_again(study, batches):
    before = stable(run_study(study("grid.seeds=[0]", tuning=None)))
    batches.clear()
    assert stable(run_study(study("grid.seeds=[0]", tuning=None))) == before
    assert not batches


STEP_SECONDS = 10.0


@pytest.fixture
def clock(monkeypatch):
    """A clock that a training step moves on, and nothing else does."""
    now = [1000.0]
    step = TransXSSMTrainer.training_step

    def take_a_while(self, *args, **kwargs):
        now[0] += STEP_SECONDS
        return step(self, *args, **kwargs)

    monkeypatch.setattr("time.monotonic", lambda: now[0])
    monkeypatch.setattr(TransXSSMTrainer, "training_step", take_a_while)
    return now


class TestBudget:
    def test_it_cuts_a_run_off_in_time_and_the_next_call_goes_on(self, study, tmp_path, clock):
        cut = study("grid.seeds=[0]", tuning=None)
        told = []
        report = run_study(cut, budget_minutes=0.5, notify=lambda what, done: told.append((what, done)))
        # Two steps of four of the first of two runs: a third one would end when no time was left to report.
        assert clock[0] == 1000 + 2 * STEP_SECONDS
        assert (
            report["status"] == "the budget of 0.5 minutes is spent; the rest takes about 1 min, evaluation not counted"
        )
        assert {name: one["status"] for name, one in report["contenders"].items()} == {
            "hybrid": "unfinished",
            "ssd": "not begun",
        }
        assert list((tmp_path / "out" / "hybrid" / "seed-0").glob("checkpoint-2"))
        assert [what for what, _ in told] == [
            "hybrid, full, seed 0",
            "hybrid, full, seed 0 · step 1/4 · about 1 min left",
            "hybrid, full, seed 0 · step 2/4 · about 1 min left",
        ]
        assert 0.2 < told[-1][1] < 0.3
        assert run_study(cut, budget_minutes=60)["status"] == "complete"
        assert clock[0] == 1000 + 8 * STEP_SECONDS

    def test_what_came_before_and_the_preparation_of_data_are_of_it(self, study, clock, monkeypatch):
        real = runner.text_data

        def prepare(recipe):
            clock[0] += 45
            return real(recipe)

        monkeypatch.setattr(runner, "text_data", prepare)
        run_study(study("grid.seeds=[0]", tuning=None), budget_minutes=1.5, started=980.0)
        assert clock[0] <= 980 + 90
        assert clock[0] == 1000 + 45 + STEP_SECONDS  # a second step would end when no time was left to report

    def test_it_ends_evaluation_too(self, study, tmp_path, clock, monkeypatch):
        def evaluate(*arguments):
            signal.raise_signal(signal.SIGALRM)

        monkeypatch.setattr(runner, "evaluate_run", evaluate)
        report = run_study(study("grid.seeds=[0]", tuning=None, cells={"hybrid": {}}), budget_minutes=60)
        assert report["status"].startswith("the budget of 60 minutes is spent; the rest takes about < 1 min")
        assert report["contenders"]["hybrid"]["runs"]


def test_only_some_cells(study):
    two = study("grid.seeds=[0]", tuning=None)
    report = run_study(two, only=["ssd"])
    assert report["contenders"]["ssd"]["status"] == "finished"
    assert report["contenders"]["hybrid"]["runs"] == []
    assert report["status"] == "hybrid not begun"
    assert run_study(two)["status"] == "complete"


def test_a_rate_that_diverges_loses_the_tuning(study):
    report = run_study(study("tuning.learning_rates=[1e-3, 1e3]", "grid.seeds=[0]", cells={"hybrid": {}}))
    one = report["contenders"]["hybrid"]
    assert [entry["has_diverged"] for entry in one["tuning"]] == [False, True]
    assert one["learning_rate"] == 1e-3
    assert report["status"] == "complete"


class TestRepeatingTheBestRate:
    """`grid.repeat_rates: best`: the first seed is trained with every rate, the others with its best one."""

    @pytest.fixture
    def sweep(self, study):
        def load(*overrides, seeds=(0, 1), rates=(1e-3, 1e-2), **changes):
            grid = {"seeds": [*seeds], "learning_rates": [*rates], "repeat_rates": "best"}
            output = f"grid.output_dir={study().output_dir}"
            return study(output, *overrides, **({"tuning": None, "grid": grid, "cells": {"hybrid": {}}} | changes))

        return load

    def test_other_seeds_are_trained_with_the_first_ones_best_rate(self, sweep, tmp_path):
        report = run_study(sweep(seeds=(1, 0, 2), perplexity={"lengths": [32], "max_tokens": 256}))
        one = report["contenders"]["hybrid"]
        assert (report["status"], one["status"]) == ("complete", "finished")
        first = {entry["learning_rate"]: entry["eval_loss"] for entry in one["rates"] if entry["seed"] == 1}
        best = min(first, key=first.get)
        assert one["learning_rate"] == best
        assert [run["folder"] for run in one["runs"]] == [
            "hybrid/lr-0.001-seed-1",
            "hybrid/lr-0.01-seed-1",
            f"hybrid/lr-{best:g}-seed-0",
            f"hybrid/lr-{best:g}-seed-2",
        ]
        recipes = [
            yaml.safe_load((tmp_path / "out" / "hybrid" / f"lr-{best:g}-seed-{seed}" / "recipe.yaml").read_text())
            for seed in (1, 0, 2)
        ]
        for recipe, seed in zip(recipes, (1, 0, 2), strict=True):  # alike but for seed and folder
            training = recipe["training"]
            assert (training.pop("seed"), training.pop("data_seed")) == (seed, seed)
            del training["output_dir"]
        assert recipes[0] == recipes[1] == recipes[2]
        losses = [entry["eval_loss"] for entry in one["rates"] if entry["learning_rate"] == best]
        assert one["mean"]["eval_loss"] == pytest.approx(sum(losses) / 3)
        assert len(one["held_out"]) == 2
        assert one["measured"]
        assert "slightly optimistic" in (tmp_path / "out" / "README.md").read_text()

    def test_a_rate_is_chosen_when_all_have_ended(self, sweep, tmp_path, clock, monkeypatch):
        cut = run_study(sweep(), budget_minutes=1.2)
        assert cut["contenders"]["hybrid"]["status"] == "unfinished"
        assert len(cut["contenders"]["hybrid"]["runs"]) == 1
        monkeypatch.undo()
        stray = tmp_path / "out" / "hybrid" / "lr-0.001-seed-1"  # of a rate that may not be the best
        shutil.copytree(tmp_path / "out" / "hybrid" / "lr-0.001-seed-0", stray)
        assert len(report_study(sweep())["contenders"]["hybrid"]["runs"]) == 1
        shutil.rmtree(stray)
        assert run_study(sweep())["status"] == "complete"

    def test_every_rate_may_diverge(self, sweep):
        one = run_study(sweep(rates=[1e6]))["contenders"]["hybrid"]
        assert (one["status"], len(one["runs"])) == ("diverged at every learning rate", 1)

    @pytest.mark.parametrize(
        ("overrides", "words"),
        [
            (["grid.learning_rates=[]"], "expected several grid.learning_rates to choose from"),
            (["grid.learning_rates=[1e-3, 1e-3]"], "expected none twice"),
            (["grid.repeat_rates=first"], "grid.repeat_rates: got 'first'"),
        ],
    )
    def test_refusals(self, sweep, overrides, words):
        with pytest.raises(ValueError, match=words):
            sweep(*overrides)


def test_tuning_takes_steps(study):
    with pytest.raises(ValueError, match=r"tuning\.max_steps: got 0, expected at least 1"):
        study("tuning.max_steps=0")


def test_not_a_number_is_a_result(study, tmp_path, monkeypatch):
    real = runner.train

    def train(recipe, **options):
        if "layer_types" in recipe.model:
            recipe.output_dir.mkdir(parents=True)
            raise NonFiniteError("step 1 is not finite")
        return real(recipe, **options)

    monkeypatch.setattr(runner, "train", train)
    changes = {"tuning": None, "cells": {"ssd": {"model": {"layer_types": ["linear_attention"] * 2}}, "hybrid": {}}}
    report = run_study(study("grid.seeds=[0]", **changes))
    assert report["contenders"]["ssd"]["status"] == "1 of 1 runs diverged"
    assert report["contenders"]["hybrid"]["status"] == "finished"
    assert json.loads((tmp_path / "out" / "ssd" / "seed-0" / DIVERGED).read_text())["failure"]
    assert "NaN" not in (tmp_path / "out" / "results.json").read_text()


def test_every_rate_to_its_end_and_the_best_one_compared(study, tmp_path):
    grid = {"seeds": [0], "learning_rates": [1e-3, 1e-2], "output_dir": str(tmp_path / "out")}
    report = run_study(study(tuning=None, grid=grid, cells={"hybrid": {}}))
    one = report["contenders"]["hybrid"]
    losses = {entry["learning_rate"]: entry["eval_loss"] for entry in one["rates"]}
    assert one["mean"]["eval_loss"] == min(losses.values())
    assert one["learning_rate"] == min(losses, key=losses.get)
    assert "held-out loss at rate | 0.001 | 0.01" in (tmp_path / "out" / "README.md").read_text()


def test_other_settings_need_another_folder(study):
    run_study(study("training.max_steps=4", "grid.seeds=[0]", tuning=None), only=["ssd"])
    with pytest.raises(ValueError, match=r"training\.max_steps was 4 and is 5"):
        run_study(study("training.max_steps=5", "grid.seeds=[0]", tuning=None))


def test_seeds_and_cells_can_be_added(study, sections, batches):
    run_study(study("grid.seeds=[0]", cells={"hybrid": sections["cells"]["hybrid"]}))
    batches.clear()
    report = run_study(study())
    assert [len(report["contenders"][name]["runs"]) for name in ("hybrid", "ssd")] == [2, 2]
    assert not any("hybrid/seed-0" in folder or "hybrid/tuning" in folder for folder in batches)
    with pytest.raises(ValueError, match=r"grid\.seeds was \[0, 1\] and is \[0\]"):
        run_study(study("grid.seeds=[0]"))
    report_study(study("grid.seeds=[0,1,2]"))  # looks at one more, and notes nothing
    assert run_study(study())["status"] == "complete"


def test_a_run_that_was_not_measured_is_unfinished(study, tmp_path):
    measured = study("grid.seeds=[0]", tuning=None, cells={"hybrid": {}}, perplexity={"lengths": [16, 32]})
    assert run_study(measured)["contenders"]["hybrid"]["status"] == "finished"
    (cells,) = (tmp_path / "out" / "hybrid").glob("*.json")
    cells.unlink()
    assert report_study(measured)["contenders"]["hybrid"]["status"] == "unfinished"


def test_borrowed_weights_are_read_under_other_settings(study):
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
    cells = {
        "rope": {},
        "scaled": {"weights_of": "rope", "model": {"length_scaling_base": 2}},
        "yarn": {"weights_of": "rope", "model": {"rope_parameters": yarn}},
    }
    report = run_study(
        study("grid.seeds=[0]", tuning=None, cells=cells, perplexity={"lengths": [16, 64], "max_tokens": 512})
    )
    rope, scaled, yarn = (report["contenders"][name]["measured"] for name in cells)
    assert set(rope) == set(scaled) == set(yarn) == {"16", "64"}
    assert len({cells["64"]["bits_per_byte"] for cells in (rope, scaled, yarn)}) == 3
    assert report["contenders"]["scaled"]["weights_of"] == "rope"


def test_recall_trains_and_is_measured(study):
    recall = {
        "sizes": [[16, 2], [32, 4]],
        "vocab_size": 32,
        "tokens_per_step": 64,
        "held_out_steps": 2,
        "num_examples": 8,
    }
    report = run_study(study("grid.seeds=[0]", tuning=None, data=None, cells={"hybrid": {}}, recall=recall))
    one = report["contenders"]["hybrid"]
    assert set(one["measured"]) == {"16/2", "32/4"}
    assert 0 <= one["measured"]["16/2"]["accuracy"] <= 1
    assert "bits_per_byte" not in one["mean"]
    assert one["mean"]["train_tokens"] == 4 * 64


def test_algorithmic_tasks_train_and_are_measured(study):
    algorithmic = {
        "task": "s3",
        "train_elements": [4, 6],
        "lengths": [4, 12],
        "tokens_per_step": 24,
        "held_out_steps": 2,
        "num_examples": 8,
    }
    report = run_study(study("grid.seeds=[0]", tuning=None, data=None, cells={"hybrid": {}}, algorithmic=algorithmic))
    one = report["contenders"]["hybrid"]
    assert set(one["measured"]) == {"s3/4", "s3/12"}
    assert 0 <= one["measured"]["s3/12"]["accuracy"] <= 1
    assert one["mean"]["train_tokens"] == 2 * 24 + 2 * 24


def test_needles_are_trained_on_and_measured(study, tmp_path):
    needle = {
        "train_lengths": [192, 256],
        "lengths": [200, 400],
        "depths": [0.0, 1.0],
        "tokens_per_step": 512,
        "held_out_steps": 2,
        "num_examples": 2,
    }
    cells = {"hybrid": {}, "scaled": {"weights_of": "hybrid", "model": {"length_scaling_base": 2}}}
    report = run_study(study("grid.seeds=[0]", tuning=None, cells=cells, needle=needle))
    one, scaled = (report["contenders"][name] for name in cells)
    assert set(one["measured"]) == set(scaled["measured"]) == {"200/0", "200/1", "400/0", "400/1"}
    assert all(0 <= cell["accuracy"] <= 1 for cell in one["measured"].values())
    assert one["mean"]["train_tokens"] == 2 * 2 * 192 + 2 * 2 * 256
    page = (tmp_path / "out" / "README.md").read_text()
    assert "| found, mean over depths (worst depth), at length | 200 | 400 |" in page
    assert {"hybrid", "scaled"} <= {row.split(" | ")[0].strip("| ") for row in page.splitlines()}
    assert (tmp_path / "out" / "needle-hybrid.png").exists()


def test_settings_that_no_run_began_with_can_be_corrected(study, tmp_path):
    with pytest.raises(ValueError, match="no corpus"):
        run_study(study("data.corpus=absent"))
    corrected = study("grid.seeds=[0]", tuning=None, cells={"hybrid": {}})
    assert run_study(corrected)["status"] == "complete"


def test_a_folder_that_holds_something_else_is_left_alone(study, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").touch()
    with pytest.raises(ValueError, match="something other than a study"):
        run_study(study())
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]
