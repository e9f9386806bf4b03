"""A study as small as can be: two cells that are trained and one that borrows weights, on a few small files."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from transxssm_lab.studies import Study, load_study

WORDS = ("state", "rotary", "position", "decay", "chunk", "scan", "head", "group", "query", "key", "loss", "step")


def write_corpus(folder: Path) -> Path:
    """Twelve files of some hundred bytes and a longer one, the same every time."""
    folder.mkdir()
    generator = random.Random(0)
    for index in range(12):
        lines = [f"def {generator.choice(WORDS)}():\n    return {generator.randrange(1000)}\n" for _ in range(12)]
        (folder / f"module_{index}.py").write_text("\n".join(lines), encoding="utf-8")
    return folder


def sections_of(corpus: Path, output_dir: Path) -> dict[str, Any]:
    """The miniature: four steps a run, two rates tuned on two, two seeds."""
    return {
        "grid": {"title": "Which is better?", "seeds": [0, 1], "output_dir": str(output_dir)},
        "tuning": {"learning_rates": [1e-3, 1e-2], "max_steps": 2},
        "cells": {
            "hybrid": {"row": "hybrid", "column": "RoPE"},
            "ssd": {"model": {"layer_types": ["linear_attention"] * 2}, "row": "SSD", "column": "RoPE"},
        },
        "model": {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2},
        "data": {
            "corpus": str(corpus),
            "tokenizer": "bytes",
            "sequence_length": 32,
            "held_out_fraction": 0.25,
            "cache_dir": str(corpus.parent / "cache"),
        },
        "training": {
            "max_steps": 4,
            "per_device_train_batch_size": 2,
            "logging_steps": 1,
            "save_steps": 2,
            "eval_steps": 2,
            "use_cpu": True,
            "bf16": False,
        },
    }


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("studies") / "corpus")


@pytest.fixture
def sections(tmp_path: Path, corpus: Path) -> dict[str, Any]:
    return sections_of(corpus, tmp_path / "out")


@pytest.fixture
def study(tmp_path: Path, sections: dict[str, Any]) -> Callable[..., Study]:
    """The miniature with sections replaced by `changes`; None takes one out."""

    def load(*overrides: str, **changes: Any) -> Study:
        chosen = {name: value for name, value in {**sections, **changes}.items() if value is not None}
        path = tmp_path / "mini.yaml"
        path.write_text(yaml.safe_dump(chosen, sort_keys=False), encoding="utf-8")
        return load_study(path, overrides)

    return load
