"""The scripts for a GPU, where there is none: the commands that they are made of exist and take what they are given."""

import json
import os
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer

from transxssm import TransXSSMConfig
from transxssm.inspection import cache_bytes
from transxssm.models.baselines import count_baseline_parameters
from transxssm.models.modeling_transxssm import TransXSSMDecoderLayer
from transxssm_cli.app import app
from transxssm_lab.benchmarking import parse_length
from transxssm_lab.benchmarking.decode import DecodeSettings
from transxssm_lab.benchmarking.throughput import ThroughputSettings

ROOT = Path(__file__).parent.parent
SCRIPTS = ROOT / "scripts" / "gpu"


@pytest.fixture
def noting_python(tmp_path):
    """A python3 that notes its arguments and does nothing, and what gives the lists that it noted."""
    noted, python3 = tmp_path / "noted.jsonl", tmp_path / "bin" / "python3"
    python3.parent.mkdir()
    note = "import json, sys; print(json.dumps(sys.argv[2:]), file=open(sys.argv[1], 'a'))"
    python3.write_text(f'#!/bin/sh\nexec {shlex.join([sys.executable, "-c", note, str(noted)])} "$@"\n')
    python3.chmod(0o755)
    return python3, lambda: [json.loads(line) for line in noted.read_text().splitlines()]


@pytest.fixture
def commands_of(noting_python):
    """Runs a shell script with that python3."""
    python3, commands = noting_python

    def run(script: str, *arguments: str) -> list[list[str]]:
        environment = os.environ | {"PATH": f"{python3.parent}:{os.environ['PATH']}"}
        subprocess.run([SCRIPTS / script, *arguments], env=environment, check=True)
        return commands()

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
    commands = commands_of("figure4.sh", str(tmp_path))
    parsed = [parse(command) for command in commands]
    (batches,) = (options for options in parsed if "batches" in options)
    for options in parsed:
        if options is not batches:
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
    assert {options["device"] for options in parsed} == {"cuda"}
    assert len({options["output"] for options in parsed}) == len(commands) == 4


def test_scaling(commands_of, tmp_path):
    """Every measurement has its command, on one GPU or on two, and the summary comes last."""
    *commands, last = commands_of("scaling.sh", str(tmp_path))
    parser = runpy.run_path(str(SCRIPTS / "scaling.py"))["parser"]()
    measured = {}
    for command in commands:
        script = command.index("scripts/gpu/scaling.py")
        options = parser.parse_args(command[script + 1 :])
        launcher = command[:script]
        assert not launcher or launcher[:4] == ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
        measured[options.file.stem] = options.measurement, len(launcher) > 0
    assert measured == {
        "laws": ("laws", True),
        "run-1": ("whole-run", False),
        "run-2": ("broken-run", False),  # which launches processes itself
        **{f"context-{gpus}": ("context", gpus == 2) for gpus in (1, 2)},
        **{f"{size}-{gpus}": ("throughput", gpus == 2) for size in ("large", "memory", "small") for gpus in (1, 2)},
    }
    assert last[-2:] == ["summary", str(tmp_path)]


def test_what_runs_on_two_gpus_say_of_one_on_one(tmp_path):
    script = runpy.run_path(str(SCRIPTS / "scaling.py"))
    steps = {"step": [1, 2], "tokens": [64, 128]}
    whole = {**steps, "loss": [5.0, 4.0], "eval_loss": [None, 4.0]}
    broken = {**steps, "loss": [5.0, 4.004], "eval_loss": [None, 4.0], "sharded": {"loss": [5.0005]}}
    killed = dict.fromkeys(("seconds_after_kill", "exit_code_after_kill", "left_after_kill", "said_after_kill"), 1)
    (tmp_path / "run-1.json").write_text(json.dumps(whole))
    (tmp_path / "run-2.json").write_text(json.dumps(broken | killed))
    script["summarize"](tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["logged losses, first 20 steps, 2 GPUs (FSDP2) against 1, largest relative difference"] == (
        pytest.approx(1e-4)
    )
    assert summary["2, 1, 2 GPUs against 1, last loss, relative difference"] == pytest.approx(1e-3)
    assert summary["2, 1, 2 GPUs against 1: steps and tokens are the same"] is True


PROFILED = ["--preset", "tiny", "--device", "cpu", "--dtype", "float32", "--length", "64"]


@pytest.mark.parametrize(
    ("contender", "mode", "layers", "floors"),
    [
        ("transxssm", "decode", ["SSD", "attention"], ["FLOPs", "bytes"]),
        ("transxssm", "train", ["SSD", "attention"], ["FLOPs"]),
        ("llama", "prefill", ["LlamaDecoderLayer"], ["FLOPs"]),
    ],
)
def test_a_profile(contender, mode, layers, floors, tmp_path, capsys):
    script = runpy.run_path(str(SCRIPTS / "profile_step.py"))
    before = TransXSSMDecoderLayer.__call__
    asked = [str(tmp_path / "out"), *PROFILED, "--contender", contender, "--mode", mode, "--batch", "2"]
    assert script["main"](asked) == 0
    assert TransXSSMDecoderLayer.__call__ is before
    result = json.loads((tmp_path / "out" / "profile.json").read_text())
    assert [row["layer"] for row in result["layers"]] == layers
    assert [row["of"] for row in result["floors"]] == floors
    assert all(row["milliseconds"] > 0 for row in result["layers"] + result["floors"])
    (embedding,) = (row for row in result["kernels"] if row["kernel"] == "aten::embedding")
    assert embedding["calls"] == 1, "figures are of one step, in decoding of one token"
    listed = sum(row["milliseconds"] for row in result["kernels"])
    assert listed == pytest.approx(result["kernel_milliseconds"])
    milliseconds = [row["milliseconds"] for row in result["kernels"]]
    assert milliseconds == sorted(milliseconds, reverse=True)
    assert result["kernels"][0]["kernel"] in capsys.readouterr().out


def test_what_a_step_of_decoding_has_to_move(tmp_path):
    """The weights once, every row's keys and values, its states in and out."""
    script = runpy.run_path(str(SCRIPTS / "profile_step.py"))
    config, dtype = TransXSSMConfig.from_preset("tiny"), torch.bfloat16
    cache, weights = cache_bytes(config, 64, dtype), 2 * count_baseline_parameters(config)
    moved = [script["floors"](config, "decode", 64, batch, dtype, torch.device("cpu"))[1]["amount"] for batch in (1, 3)]
    assert moved == [weights + batch * (cache.kv + 2 * cache.state) for batch in (1, 3)]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--contender", "gpt"], "unknown contender 'gpt'"),
        (["--contender", "llama-static", "--mode", "train"], "can be measured in decode only"),
        (["--batch", "0"], "at least 1 sequence: got 0"),
        (["--length", "x"], "got 'x'"),
        (["--length", "1", "--mode", "train", "--contender", "llama"], "got a length of 1"),
        (["--device", "nonsense"], "nonsense"),
        (["--preset", "huge"], "unknown preset 'huge'"),
    ],
)
def test_a_profile_of_nothing_is_refused(options, words, tmp_path, capsys):
    script = runpy.run_path(str(SCRIPTS / "profile_step.py"))
    with pytest.raises(SystemExit) as stopped:
        script["main"]([str(tmp_path / "out"), *PROFILED, *options])
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


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
