"""A corpus of a few small files, the recipe of a model that trains on it in seconds, and one run of it."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from transxssm.training import Recipe, load_recipe, train

WORDS = (
    "state",
    "rotary",
    "position",
    "decay",
    "chunk",
    "scan",
    "head",
    "group",
    "query",
    "key",
    "loss",
    "step",
    "row",
)


def write_corpus(folder: Path, num_files: int = 60) -> Path:
    """Files of a few hundred bytes of made-up Python, the same every time."""
    folder.mkdir()
    generator = random.Random(0)
    for index in range(num_files):
        lines = [
            f"def {generator.choice(WORDS)}_{generator.randrange(100)}({generator.choice(WORDS)}):\n"
            f"    return {generator.choice(WORDS)} + {generator.randrange(1000)}\n"
            for _ in range(generator.randrange(4, 12))
        ]
        (folder / f"module_{index}.py").write_text("\n".join(lines), encoding="utf-8")
    return folder


def write_recipe(folder: Path, corpus: Path) -> Path:
    """20 steps in float32, more than one epoch, with a checkpoint every 5 steps and an evaluation every 10."""
    recipe = {
        "model": {
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        },
        "data": {
            "corpus": str(corpus),
            "tokenizer": "bytes",
            "sequence_length": 64,
            "held_out_fraction": 0.2,
            "cache_dir": str(corpus.parent / "cache"),
        },
        "training": {
            "output_dir": str(folder / "run"),
            "max_steps": 20,
            "per_device_train_batch_size": 20,
            "per_device_eval_batch_size": 4,
            "learning_rate": 3e-3,
            "logging_steps": 2,
            "save_steps": 5,
            "eval_steps": 10,
            "use_cpu": True,
            "bf16": False,
        },
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def _empty_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs leave a loss.png that took no time; that of `finished_run` is drawn."""
    monkeypatch.setattr("transxssm.training.loop.plot_loss", lambda path, rows: path.touch())


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("training") / "corpus")


@pytest.fixture
def recipe_file(tmp_path: Path, corpus: Path) -> Path:
    return write_recipe(tmp_path, corpus)


@pytest.fixture
def recipe(recipe_file: Path) -> Callable[..., Recipe]:
    """Loads the recipe with overrides."""

    def load(*overrides: str) -> Recipe:
        return load_recipe(recipe_file, overrides)

    return load


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """The folder of a run of the recipe that nothing interrupted; not to be changed."""
    folder = tmp_path_factory.mktemp("finished")
    recipe = load_recipe(write_recipe(folder, corpus))
    train(recipe)
    return recipe.output_dir
