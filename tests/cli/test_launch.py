"""`--gpus`: several processes of a command, here on the CPU through gloo, that speak with one voice."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.training.conftest import write_corpus, write_recipe
from transxssm_cli.launch import EXIT_PROCESS_LOST, ProcessFailure, _why, number_of_processes

COMMAND = [sys.executable, "-m", "transxssm", "train"]
ENVIRONMENT = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


@pytest.fixture
def gpus(monkeypatch):
    """Lets torch see so many GPUs."""
    return lambda number: monkeypatch.setattr(torch.cuda, "device_count", lambda: number)


def test_number_of_processes(gpus):
    gpus(4)
    assert number_of_processes("all", on_cpu=False) == 4
    assert number_of_processes("3", on_cpu=False) == 3
    gpus(0)
    assert number_of_processes("2", on_cpu=True) == 2


@pytest.mark.parametrize(
    ("asked", "there", "on_cpu", "expected"),
    [
        ("3", 2, False, "torch sees 2 here; expected 2 at most"),
        ("2", 0, False, "torch sees no GPU here"),
        ("all", 0, False, "torch sees no GPU here"),
        ("0", 2, False, "expected a number of GPUs from 1 on, or all"),
        ("two", 2, False, "expected a number of GPUs from 1 on, or all"),
        ("all", 0, True, "expected a number of processes"),
    ],
)
def test_wrong_numbers(gpus, asked, there, on_cpu, expected):
    gpus(there)
    with pytest.raises(ValueError, match=expected):
        number_of_processes(asked, on_cpu=on_cpu)


def test_a_process_of_a_launcher_launches_none(gpus, monkeypatch):
    gpus(2)
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ValueError, match="leave out either"):
        number_of_processes("2", on_cpu=False)


def test_without_a_gpu_the_command_says_so_in_one_line(error_of, recipe, tmp_path, gpus):
    gpus(0)
    words = error_of("train", recipe, "training.use_cpu=false", "--gpus", "2")
    assert words.startswith("--gpus 2: torch sees no GPU here")
    assert not (tmp_path / "run").exists()


def test_why_a_launch_failed(tmp_path):
    def failures(**codes):
        found = {}
        for order, (process, code) in enumerate(codes.items()):
            rank = int(process[-1])
            found[rank] = ProcessFailure(local_rank=rank, pid=1, exitcode=code, error_file="<N/A>")
            found[rank].timestamp = order
        return found

    def why(**codes):
        return _why(failures(**codes), 2, tmp_path, "--resume", is_interrupted=False)

    log = tmp_path / "run" / "attempt_0" / "1" / "stderr.log"
    log.parent.mkdir(parents=True)
    log.write_text("a warning\nerror: no such file\n\n")
    assert why(process_1=2, process_0=2) == (2, "")  # the first process has said it
    assert why(process_0=-signal.SIGTERM, process_1=2) == (2, "error: no such file")
    code, line = why(process_0=-signal.SIGTERM, process_1=-signal.SIGKILL)
    assert code == 1
    assert line.startswith("error: process 1 of 2 ended (SIGKILL)")
    assert why(process_0=EXIT_PROCESS_LOST, process_1=-signal.SIGKILL) == (code, line)
    code, line = _why(failures(process_1=130, process_0=-signal.SIGTERM), 2, tmp_path, "--resume", is_interrupted=True)
    assert code == 130
    assert line.startswith("interrupted")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_interrupted_and_resumed_by_another_number_of_processes(run, tmp_path):
    """Two processes of which one is killed, two that are interrupted, one that ends the run: as one process from the start."""
    corpus = write_corpus(tmp_path / "corpus")
    (tmp_path / "alone").mkdir()
    (tmp_path / "several").mkdir()
    alone, several = write_recipe(tmp_path / "alone", corpus), write_recipe(tmp_path / "several", corpus)
    steps = ["training.max_steps=60", "training.logging_steps=1", "training.save_steps=5", "training.eval_steps=60"]
    assert run("train", alone, *steps, "training.per_device_train_batch_size=8").exit_code == 0
    halves = [*COMMAND, several, *steps, "training.per_device_train_batch_size=4"]
    metrics = tmp_path / "several" / "run" / "metrics.jsonl"

    def start(*options):
        return subprocess.Popen(
            [*halves, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
        )

    def until_step(process, step):
        while process.poll() is None:
            rows = metrics.read_text().splitlines() if metrics.exists() else []
            if rows and json.loads(rows[-1])["step"] >= step:
                return
            time.sleep(0.05)
        raise AssertionError(process.communicate())

    killed = start("--gpus", "2")
    until_step(killed, 12)
    workers = [child for child in psutil.Process(killed.pid).children() if child.environ().get("RANK") == "1"]
    workers[0].kill()
    _, said = killed.communicate(
        timeout=300
    )  # seconds on an idle machine; a process that waits for the dead one waits for ever
    assert killed.returncode == 1
    assert said.splitlines()[-1].startswith("error: process 1 of 2 ended (SIGKILL)")
    assert "Traceback" not in said

    interrupted = start("--gpus", "2", "--resume")
    until_step(interrupted, 25)
    interrupted.send_signal(signal.SIGINT)
    _, said = interrupted.communicate(timeout=300)
    assert interrupted.returncode == 130, said
    lines = said.splitlines()
    assert lines[-1].startswith("interrupted: stopped after step")
    assert (
        sum("continue with the same command" in line for line in lines) == 1
    )  # the first process says it, and nobody again
    assert "Traceback" not in said

    last = run("train", several, *steps, "training.per_device_train_batch_size=4", "--resume")
    assert last.exit_code == 0
    assert "rows a step stay 8" in last.stderr
    ours, expected = (load_file(tmp_path / folder / "run" / "model.safetensors") for folder in ("several", "alone"))
    for name, weight in expected.items():
        torch.testing.assert_close(ours[name], weight, rtol=0, atol=1e-5)
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 61))
    assert {row["rows_per_step"] for row in rows} == {8}
