"""A recipe that sizes itself to the text and the machine."""

import json
import math

import pytest

from transxssm.training import bundled_recipes, fit, load_recipe, run_folder, train
from transxssm.training.fit import fitted

MB = 10**6
# What a step of the smallest preset takes on two cores, and one of the larger, by their hidden sizes.
STEP_SECONDS = {128: 0.35, 512: 5.0}


@pytest.fixture
def laptop(tmp_path, corpus):
    def load(*overrides):
        settings = [
            f"data.corpus={corpus}",
            f"data.cache_dir={corpus.parent / 'cache'}",
            f"training.output_dir={tmp_path / 'run'}",
        ]
        return load_recipe("laptop", [*settings, "training.use_cpu=true", "training.bf16=false", *overrides])

    return load


@pytest.fixture
def machine(monkeypatch):
    """A machine of a speed and a text of a size."""

    def be(num_bytes, faster=1.0):
        monkeypatch.setattr(fit, "text_bytes", lambda documents: num_bytes)
        monkeypatch.setattr(
            fit, "measured_step_seconds", lambda model, *_, **__: STEP_SECONDS[model.config.hidden_size] / faster
        )

    return be


@pytest.mark.parametrize(
    ("num_bytes", "vocab_size", "length", "most_steps", "sample"),
    [
        (20_000, 512, 256, 50, None),
        (100_000, 512, 256, 116, None),
        (5 * MB, 4096, 512, 1457, None),
        (500 * MB, 4096, 512, 1457, 25 * MB),
    ],
)
def test_it_fits_any_text_into_the_time(laptop, machine, num_bytes, vocab_size, length, most_steps, sample):
    machine(num_bytes)
    recipe, line = fitted(laptop())
    assert recipe.model["preset"] == "tiny-conv"
    assert (recipe.data.vocab_size, recipe.data.sequence_length) == (vocab_size, length)
    assert most_steps * 0.9 <= recipe.training["max_steps"] <= most_steps
    assert recipe.training["max_steps"] * 0.35 <= 600
    assert recipe.data.max_bytes == (None if sample is None else pytest.approx(sample, rel=0.1))
    assert f"{num_bytes / MB:,.2f} MB of text" in line
    assert ("a sample of" in line) is (sample is not None)
    assert f"{recipe.training['max_steps']:,} steps" in line
    assert not recipe.open_settings


def test_a_fast_machine_with_much_text_trains_a_larger_model(laptop, machine):
    machine(500 * MB, faster=200)
    assert fitted(laptop())[0].model["preset"] == "small-conv"
    machine(MB, faster=200)
    assert fitted(laptop())[0].model["preset"] == "tiny-conv"


def test_what_is_given_stays(laptop, machine):
    machine(500 * MB)
    given = {
        "data.vocab_size": 300,
        "data.sequence_length": 64,
        "data.held_out_fraction": 0.3,
        "data.max_bytes": 5000,
        "training.max_steps": 5000,
    }
    recipe, _ = fitted(laptop("model.preset=small", *(f"{name}={value}" for name, value in given.items())))
    assert recipe.model["preset"] == "small"
    settings = recipe.to_dict()
    assert {name: settings[name.split(".")[0]][name.split(".")[1]] for name in given} == given


def test_a_run_is_fitted_once_and_resumed_as_it_began(laptop, machine, monkeypatch, caplog):
    """From the text to the model with what the machine really takes, in a second's time."""
    recipe = laptop("fit.minutes=0.02", "model.preset=tiny", "data.sequence_length=32", "data.vocab_size=300")
    summary = train(recipe)
    stored = run_folder.stored_recipe(recipe.output_dir)
    assert stored.fit == {"minutes": 0.02}
    assert stored.training["max_steps"] == summary["steps"] >= 1
    assert not stored.open_settings
    assert "fitted to 0." in caplog.text

    def again(*_, **__):
        raise AssertionError("measured again")

    monkeypatch.setattr(fit, "measured_step_seconds", again)
    assert train(recipe, resume=True) == json.loads((recipe.output_dir / "summary.json").read_text())
    with pytest.raises(ValueError, match="is not empty"):
        train(recipe)


def test_several_processes_are_refused(laptop, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="fit: got several processes, expected one"):
        fitted(laptop())


@pytest.mark.parametrize("minutes", [0, -3])
def test_the_minutes_are_positive(laptop, minutes):
    with pytest.raises(ValueError, match=rf"fit\.minutes: got {minutes}"):
        laptop(f"fit.minutes={minutes}")
    with pytest.raises(ValueError, match=r"unknown key fit\.hours"):
        laptop("fit.hours=1")


def test_other_recipes_have_nothing_open():
    for name in set(bundled_recipes()) - {"laptop"}:
        assert load_recipe(name).open_settings == frozenset()
        assert "fit" not in load_recipe(name).to_dict()
    assert math.isclose(load_recipe("laptop").fit["minutes"], 10)
