"""The command line in this process, and what it is run on."""

import logging
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

from tests.serving.checkpoints import write_random_checkpoint, write_reciting_checkpoint
from tests.training.conftest import _empty_pictures  # noqa: F401 (a fixture)
from transxssm_cli import app

Run = Callable[..., Result]
WORDS = ("state", "space", "rotary", "position", "decay", "chunk", "scan", "head", "group", "value", "query", "key")


@pytest.fixture(autouse=True)
def _own_settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What the command sets for its process stays in the test."""
    for variable in (*app.LIBRARY_VERBOSITY, "TRANSFORMERS_NO_ADVISORY_WARNINGS"):
        monkeypatch.setenv(variable, "error")
    monkeypatch.setenv(app.SPIN_VARIABLE, app.SPIN_COUNT)
    loggers = [logging.getLogger(name) for name in app.PACKAGES]
    before = [(logger.handlers, logger.level, logger.propagate) for logger in loggers]
    yield
    for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


@pytest.fixture
def run() -> Run:
    """Runs a command line; a mistake in the code, which would show a traceback, is raised."""

    def invoke(*arguments: object, **options: object) -> Result:
        result = CliRunner().invoke(app.app, [*map(str, arguments)], **options)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return invoke


@pytest.fixture
def error_of(run: Run) -> Callable[..., str]:
    """Runs a command line that must be refused; the one line it says, without "error: "."""

    def refuse(*arguments: object, **options: object) -> str:
        result = run(*arguments, **options)
        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1
        return result.stderr.removeprefix("error: ").rstrip("\n")

    return refuse


@pytest.fixture(scope="session")
def reciting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_reciting_checkpoint(tmp_path_factory.mktemp("cli") / "reciting")


@pytest.fixture(scope="session")
def random_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("cli") / "random")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a few small files, the same every time."""
    folder, generator = tmp_path_factory.mktemp("cli") / "corpus", random.Random(0)
    folder.mkdir()
    for index in range(12):
        lines = [f"def {generator.choice(WORDS)}():\n    return {generator.randrange(1000)}\n" for _ in range(12)]
        (folder / f"module_{index}.py").write_text("\n".join(lines), encoding="utf-8")
    return folder


@pytest.fixture
def recipe(tmp_path: Path, corpus: Path) -> Path:
    """Four steps of a model that is as small as can be, into `tmp_path / "run"`."""
    sections = {
        "model": {
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
        },
        "data": {
            "corpus": str(corpus),
            "tokenizer": "bytes",
            "sequence_length": 32,
            "held_out_fraction": 0.25,
            "cache_dir": str(corpus.parent / "cache"),
        },
        "training": {
            "output_dir": str(tmp_path / "run"),
            "max_steps": 4,
            "per_device_train_batch_size": 2,
            "logging_steps": 1,
            "save_steps": 2,
            "eval_steps": 2,
            "use_cpu": True,
            "bf16": False,
        },
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(sections), encoding="utf-8")
    return path
