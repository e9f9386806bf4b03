"""Cells of a study in processes beside each other: which go together, where they run, how they end."""

import shlex
import signal
import subprocess
import sys
import time

import pytest

from transxssm_lab.studies import load_study
from transxssm_lab.studies.spread import jobs_of, logs_of, spread

COMMAND = [sys.executable, "-m", "transxssm", "study"]


@pytest.fixture
def mini(tmp_path):
    """A study of two cells that would train for hours."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for index in range(8):
        (corpus / f"{index}.py").write_text(f"value = {index}\n" * 200)
    study = tmp_path / "mini.yaml"
    study.write_text(
        "cells: {one: {}, two: {}}\n"
        f"grid: {{output_dir: {tmp_path / 'out'}}}\n"
        "model: {hidden_size: 16, intermediate_size: 24, num_hidden_layers: 1, num_attention_heads: 2}\n"
        f"data: {{corpus: {corpus}, tokenizer: bytes, sequence_length: 32, held_out_fraction: 0.25, cache_dir: {tmp_path / 'cache'}}}\n"
        "training: {max_steps: 100000, per_device_train_batch_size: 1, logging_steps: 1, use_cpu: true, bf16: false, eval_steps: 100000}\n"
    )
    return study


def test_cells_go_with_the_one_whose_weights_they_borrow():
    length, table = load_study("length-gpu"), load_study("table2-gpu")
    (together,) = (job.cells for job in jobs_of(length, []) if "rope" in job.cells)
    assert {"log-length", "yarn"} < {*together}
    assert "nope" not in together
    assert [job.cells for job in jobs_of(table, ["ssd-rope"])] == [("ssd-rope",)]
    with pytest.raises(ValueError, match="hybrid-rop"):
        jobs_of(table, ["hybrid-rop"])


def test_jobs_are_spread_over_gpus(mini, tmp_path, monkeypatch):
    """A python that notes its GPU and its cell, and leaves what a run leaves when it trains."""
    study = load_study(mini)
    noting = tmp_path / "python3"
    note = (
        "import os, pathlib, sys, time; cell = sys.argv[-1]; folder = pathlib.Path(sys.argv[1]) / cell; folder.mkdir(parents=True); "
        "(folder / 'metrics.jsonl').write_text('x'); (folder / 'gpu').write_text(os.environ['CUDA_VISIBLE_DEVICES']); time.sleep(2)"
    )
    noting.write_text(f'#!/bin/sh\nexec {shlex.join([sys.executable, "-c", note, str(study.output_dir)])} "$@"\n')
    noting.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(noting))
    spread(study, [str(mini)], jobs_of(study, []), gpus=["4", "7"], jobs_per_gpu=1)
    assert {(study.output_dir / cell / "gpu").read_text() for cell in ("one", "two")} == {"4", "7"}
    assert (logs_of(study) / "two.txt").exists()


def test_a_failure_names_its_cell_and_log(mini, tmp_path, monkeypatch):
    study = load_study(mini)
    failing = tmp_path / "python3"
    failing.write_text("#!/bin/sh\necho 'error: no such thing' >&2\nexit 2\n")
    failing.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(failing))
    with pytest.raises(ValueError, match=r"2 of 2 processes failed; one: no such thing \(all of it: .*one.txt\)"):
        spread(study, [str(mini)], jobs_of(study, []), gpus=[""], jobs_per_gpu=2)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpus", "2", "training.use_cpu=false"], "torch sees no GPU here"),
        (["--gpus", "two"], "expected a number of GPUs"),
        (["--gpus", "2", "--budget-minutes", "1"], "leave out it or --gpus"),
        (["--gpus", "2", "--only", "three"], "three"),
    ],
)
def test_mistakes(mini, error_of, monkeypatch, arguments, words):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert words in error_of("study", mini, *arguments)


@pytest.mark.slow
def test_ctrl_c_reaches_every_process(mini, tmp_path):
    """The second waits for the first one's data; both are gone, and the run that had begun can be resumed."""
    ignoring = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a job that a shell has put into the background
    try:
        running = subprocess.Popen([*COMMAND, mini, "--gpus", "2"])
    finally:
        signal.signal(signal.SIGINT, ignoring)
    folder = tmp_path / "out"
    with running:
        while len(list(folder.rglob("metrics.jsonl"))) < 2:
            assert running.poll() is None
            time.sleep(0.2)
        running.send_signal(signal.SIGINT)
        try:
            assert running.wait() == 130
        finally:
            running.terminate()  # or it would be waited for
    assert len(list(folder.rglob("checkpoint-*"))) == 2
