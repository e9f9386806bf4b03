"""The scripts for a GPU, where there is none: the commands that they are made of exist and take what they are given."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from transxssm.benchmarking import parse_length
from transxssm.benchmarking.decode import DecodeSettings
from transxssm.benchmarking.throughput import ThroughputSettings
from transxssm.studies import contenders_of, load_study
from transxssm_cli.app import app

ROOT = Path(__file__).parent.parent
SCRIPTS = ROOT / "scripts" / "gpu"


@pytest.fixture
def commands_of(tmp_path):
    """Runs a script with a python3 that notes its arguments and does nothing."""

    def run(script: str, *arguments: str) -> list[list[str]]:
        noted, python3 = tmp_path / "noted.jsonl", tmp_path / "bin" / "python3"
        python3.parent.mkdir()
        note = "import json, sys; print(json.dumps(sys.argv[2:]), file=open(sys.argv[1], 'a'))"
        python3.write_text(f'#!/bin/sh\nexec {shlex.join([sys.executable, "-c", note, str(noted)])} "$@"\n')
        python3.chmod(0o755)
        environment = os.environ | {"PATH": f"{python3.parent}:{os.environ['PATH']}"}
        subprocess.run([SCRIPTS / script, *arguments], env=environment, check=True)
        return [json.loads(line) for line in noted.read_text().splitlines()]

    return run


def parse(command: list[str]) -> dict:
    """The options of `python3 -m transxssm …`, read and checked as the command itself would, which is not run."""
    assert command[:2] == ["-m", "transxssm"]
    found, rest = typer.main.get_command(app), command[2:]
    while hasattr(found, "commands"):
        name, *rest = rest
        found = found.commands[name]
    return found.make_context(found.name, rest).params


def test_laws(commands_of, tmp_path):
    [[module, pytest_, *rest]] = commands_of("laws.sh", str(tmp_path / "out"), "-x")
    assert (module, pytest_, rest[-1]) == ("-m", "pytest", "-x")
    assert all((ROOT / path).exists() for path in rest if path.startswith("tests"))
    assert rest[rest.index("--device") + 1] == "cuda"


def test_figure_4(commands_of, tmp_path):
    batches, edges, middle = (parse(command) for command in sorted(commands_of("figure4.sh", str(tmp_path))))
    for options in (edges, middle):
        ThroughputSettings(
            preset=options["preset"],
            contenders=tuple(options["contenders"].split(",")),
            modes=tuple(options["modes"].split(",")),
            lengths=tuple(map(parse_length, options["lengths"].split(","))),
            dtype=options["dtype"],
        )
    DecodeSettings(
        preset=batches["preset"],
        contenders=tuple(batches["contenders"].split(",")),
        length=parse_length(batches["length"]),
        batches=tuple(map(int, batches["batches"].split(","))),
        dtype=batches["dtype"],
    )
    assert {options["device"] for options in (edges, batches, middle)} == {"cuda"}
    assert len({options["output"] for options in (edges, batches, middle)}) == 3


@pytest.mark.parametrize(("script", "cell"), [("table2.sh", "hybrid-rope"), ("table3.sh", "llama")])
def test_tables(script, cell, commands_of, tmp_path):
    [command] = commands_of(script, str(tmp_path), cell, "training.max_steps=8")
    options = parse(command)
    recipe, *overrides = options["arguments"]
    study = load_study(recipe, overrides)
    assert study.training["max_steps"] == 8
    assert {contender.cell for contender in contenders_of(study, options["only"])} == {cell}


@pytest.mark.parametrize("script", ["table2.sh", "table3.sh"])
def test_no_folder(script):
    done = subprocess.run([SCRIPTS / script], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: no folder for the results was given")
    assert len(done.stderr.splitlines()) == 1


def test_an_archive_has_no_weights(tmp_path):
    run_folder = tmp_path / "table2" / "cell" / "seed-0"
    (run_folder / "checkpoint-8").mkdir(parents=True)
    for name in ("summary.json", "model.safetensors", "checkpoint-8/optimizer.pt"):
        (run_folder / name).write_text("x")
    archive = tmp_path / "archive.tar.gz"
    subprocess.run([SCRIPTS / "pack.sh", tmp_path / "table2", archive], check=True)
    listed = subprocess.run(["tar", "-tzf", archive], capture_output=True, text=True, check=True).stdout
    assert "summary.json" in listed
    assert "safetensors" not in listed
    assert "checkpoint" not in listed


def test_cells_at_once(commands_of, tmp_path):
    commands = commands_of(
        "at-once.sh", "table2.sh", str(tmp_path / "out"), "hybrid-rope", "ssd-rope", "training.max_steps=8"
    )
    assert sorted(parse(command)["only"] for command in commands) == [["hybrid-rope"], ["ssd-rope"]]
    assert all("training.max_steps=8" in command for command in commands)
    assert (tmp_path / "out/logs/ssd-rope.txt").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["table2.sh", "{folder}"], "error: got 2 arguments"),
        (["table9.sh", "{folder}", "hybrid-rope"], "expected table2.sh or table3.sh"),
        (["table2.sh", "{folder}", "hybrid-rop"], "error: hybrid-rop: "),
    ],
    ids=["no cells", "no such study", "no such cell"],
)
def test_mistakes_with_cells_at_once(arguments, words, tmp_path):
    arguments = [argument.format(folder=tmp_path) for argument in arguments]
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        [SCRIPTS / "at-once.sh", *arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1
