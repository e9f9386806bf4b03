"""`transxssm evaluate`: tables and files, resumption, and refusals that write nothing."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from tests.serving.checkpoints import byte_tokenizer
from transxssm_cli import evaluation, launch
from transxssm_cli.evaluation import default_lengths, read_numbers, read_shares, read_sizes, read_stride

LINES = "".join(f"def function_{n}(): return {n}\n" for n in range(40))
NEEDLE = ("--lengths", "300,400", "--depths", "0,1", "--examples", "1")
RECALL = ("--sizes", "16/2,32/4", "--vocab-size", "64", "--examples", "2")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(LINES)
    return path


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("evaluate") / "llama"
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=258, max_position_embeddings=128, **sizes)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def task(tmp_path):
    data = tmp_path / "tasks" / "questions.jsonl"
    data.parent.mkdir()
    data.write_text(json.dumps({"q": "x", "choices": ["a", "b"], "answer": 0}) + "\n")
    settings = {
        "task": "local_choice",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
    }
    (data.parent / "choice.yaml").write_text(yaml.safe_dump(settings))
    return data.parent


def files_of(folder):
    return sorted(path.name for path in folder.iterdir())


def results_of(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


@pytest.mark.parametrize("kind", ["random_checkpoint", "llama"])
def test_perplexity(run, request, kind, text, out):
    checkpoint = request.getfixturevalue(kind)
    result = run("evaluate", checkpoint, "perplexity", "--text-file", text, "--lengths", "64,128", "--output-dir", out)
    assert result.exit_code == 0
    assert files_of(out) == ["perplexity.json", "perplexity.md", "perplexity.png"]
    stored = results_of(out, "perplexity")
    assert list(stored["cells"]) == ["64", "128"]
    assert stored["settings"]["text"] == "text.txt"
    for cell in stored["cells"].values():
        assert cell["bytes"] == len(LINES)
        assert f"{cell['perplexity']:.3f}" in result.stdout
        assert f"| {cell['perplexity']:.3f} |" in (out / "perplexity.md").read_text()
    assert "perplexity 128: 2 of 2" in result.stderr


def test_needle(run, random_checkpoint, text, out):
    result = run("evaluate", random_checkpoint, "needle", "--text-file", text, *NEEDLE, "--output-dir", out)
    assert result.exit_code == 0
    assert files_of(out) == ["needle.json", "needle.md", "needle.png"]
    assert list(results_of(out, "needle")["cells"]) == ["300/0", "300/1", "400/0", "400/1"]
    assert "0%" in result.stdout


def test_recall(run, random_checkpoint, out):
    result = run("evaluate", random_checkpoint, "recall", *RECALL, "--output-dir", out)
    assert result.exit_code == 0
    assert files_of(out) == ["recall.json", "recall.md", "recall.png"]
    assert list(results_of(out, "recall")["cells"]) == ["16/2", "32/4"]


def test_algorithmic(run, random_checkpoint, out):
    options = ("--task", "s3", "--lengths", "4,9", "--examples", "2", "--output-dir", out)
    result = run("evaluate", random_checkpoint, "algorithmic", *options)
    assert result.exit_code == 0
    assert files_of(out) == ["algorithmic.json", "algorithmic.md", "algorithmic.png"]
    assert list(results_of(out, "algorithmic")["cells"]) == ["s3/4", "s3/9"]


def test_without_matplotlib_the_picture_is_left_out_and_that_is_said(run, random_checkpoint, out, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = run("evaluate", random_checkpoint, "recall", *RECALL, "--output-dir", out)
    assert result.exit_code == 0
    assert files_of(out) == ["recall.json", "recall.md"]
    assert "png" not in (out / "recall.md").read_text()
    assert "recall.png is not drawn: matplotlib is not installed: pip install 'transxssm[lab]'" in result.stderr


def test_harness(run, random_checkpoint, task, out, monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("TQDM_DISABLE", "1")
    options = ("--tasks", "local_choice", "--include-path", task, "--output-dir", out)
    result = run("evaluate", random_checkpoint, "harness", *options)
    assert result.exit_code == 0
    assert files_of(out) == ["harness.json", "harness.md", "harness.png"]
    assert "local_choice" in result.stdout
    assert "acc" in results_of(out, "harness")["cells"]["local_choice"]["results"]["local_choice"]


def test_a_run_is_evaluated_on_its_own_held_out_text_into_its_own_folder(run, recipe, tmp_path):
    assert run("train", recipe).exit_code == 0
    folder = tmp_path / "run"
    result = run("evaluate", folder, "perplexity")
    assert result.exit_code == 0, result.stderr
    stored = results_of(folder / "evaluation", "perplexity")
    assert list(stored["cells"]) == ["32", "64", "128"]  # up to four times data.sequence_length
    assert stored["settings"]["text"].startswith("held out of ")
    # Resuming and finding the finished run are not disturbed by it.
    assert run("train", recipe, "--resume").exit_code == 0
    last = max(folder.glob("checkpoint-*"))
    assert run("evaluate", last, "perplexity", "--lengths", "32").exit_code == 0
    assert (folder / "evaluation" / last.name / "perplexity.json").is_file()


def test_interrupted_and_resumed_is_the_same_table(run, random_checkpoint, tmp_path, monkeypatch):
    def options(name):
        return ("evaluate", random_checkpoint, "recall", *RECALL, "--output-dir", tmp_path / name)

    whole = run(*options("whole"))
    save, saved = evaluation.Results.save, []

    def save_and_be_interrupted(results):
        save(results)
        saved.append(len(results.cells))
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(evaluation.Results, "save", save_and_be_interrupted)
        stopped = run(*options("parts"))
    assert (stopped.exit_code, stopped.stdout, saved) == (130, "", [1])
    assert "interrupted: the same command goes on from here; 1 of 2 cells are in" in stopped.stderr
    resumed = run(*options("parts"))
    assert resumed.stdout == whole.stdout
    assert "16/2" not in resumed.stderr
    assert results_of(tmp_path / "parts", "recall")["cells"] == results_of(tmp_path / "whole", "recall")["cells"]


@pytest.mark.slow
def test_two_processes_measure_what_one_does(run, random_checkpoint, text, tmp_path):
    def options(command, name, *of_command):
        return ("evaluate", random_checkpoint, command, *of_command, "--output-dir", tmp_path / name, "--device", "cpu")

    needle = ("--text-file", text, *NEEDLE)
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "transxssm", *map(str, options("needle", "two", *needle)), "--gpus", "2"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    one = run(*options("needle", "one", *needle))
    assert done.stdout == one.stdout
    assert done.stderr.count("of 4") == 4, done.stderr  # of the first process alone
    assert results_of(tmp_path / "two", "needle")["cells"] == results_of(tmp_path / "one", "needle")["cells"]


def test_what_processes_are_launched_with(run, random_checkpoint, text, out, monkeypatch):
    launched = []
    monkeypatch.setattr(launch, "launch", lambda *arguments, **options: launched.append((arguments, options)))
    command = ["evaluate", str(random_checkpoint), "perplexity", "--text-file", str(text), "--output-dir", str(out)]
    for given in (["--gpus", "2"], ["--gpus=2"]):
        arguments = [*command[:3], *given, *command[3:], "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", ["transxssm", *arguments])
        assert run(*arguments).exit_code == 0
    assert launched == [(([*command, "--device", "cpu"], 2), {"go_on": "the same command"})] * 2
    assert not out.exists()


def test_another_model_or_other_settings_do_not_go_into_the_same_folder(run, error_of, random_checkpoint, llama, out):
    assert run("evaluate", random_checkpoint, "recall", *RECALL, "--output-dir", out).exit_code == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert "seed was 0 and is 1" in error_of(
        "evaluate", random_checkpoint, "recall", *RECALL, "--seed", 1, "--output-dir", out
    )
    assert "checkpoint was " in error_of("evaluate", llama, "recall", *RECALL, "--output-dir", out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_results_of_a_saved_model_go_below_runs(run, llama, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("evaluate", llama, "recall", "--sizes", "16/2", "--vocab-size", 64, "--examples", 1).exit_code == 0
    assert (tmp_path / "runs" / "evaluation" / "llama" / "recall.json").is_file()


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (["perplexity"], "the checkpoint is no run that names a corpus: give --corpus"),
            (["perplexity", "--corpus", "a", "--recipe", "tiny"], "give one of --corpus, --recipe and --text-file"),
            (["perplexity", "--corpus", "no-such"], "no corpus 'no-such'"),
            (["perplexity", "--text-file", "absent.txt"], "absent.txt: No such file or directory"),
            (["perplexity", "--text-file", "{text}", "--lengths", "64K"], "the longest has"),
            (["perplexity", "--text-file", "{text}", "--lengths", "1"], "at least 2 tokens"),
            (
                ["perplexity", "--text-file", "{text}", "--lengths", "64", "--stride", "64"],
                "less than the window's length",
            ),
            (["perplexity", "--lengths", "12,x"], "--lengths: got 'x'"),
            (
                ["perplexity", "--text-file", "{text}", "--lengths", "64", "--stride", "x"],
                "--stride: got 'x', expected half",
            ),
            (["perplexity", "--training-length", "0"], "--training-length must be at least 1"),
            (["perplexity", "--text-file", "{text}", "--lengths", "64", "--min-tokens", "1"], "got min_tokens=1"),
            (
                ["needle", "--text-file", "{text}", "--lengths", "400", "--distractors", "2000"],
                "got 2000, expected 0 … 1023",
            ),
            (["perplexity", "--max-tokens", "0"], "--max-tokens must be at least 1"),
            (["needle", "--text-file", "{text}", "--lengths", "20"], "a needle and its question need"),
            (["needle", "--depths", "2"], "--depths: got '2'"),
            (["needle", "--decoding", "beam"], "unknown decoding 'beam': expected greedy or teacher-forced"),
            (["needle", "--examples", "0"], "--examples must be at least 1"),
            (["recall"], "vocabulary of 8192 does not fit the model's of 258"),
            (["recall", "--sizes", "64"], "--sizes: got '64'"),
            (["recall", "--sizes", "8/4"], "need at least 16 tokens"),
            (["recall", "--seed", "-1"], "--seed must not be negative"),
            (["algorithmic", "--task", "s4"], "unknown task 's4': expected one of parity"),
            (["recall", "--device", "gpu"], "unknown device 'gpu'"),
            (["recall", "--dtype", "int8"], "unknown dtype 'int8'"),
            (["recall", "--gpus", "two", "--device", "cpu"], "--gpus: got 'two', expected a number of GPUs from 1 on"),
            (["recall", "--gpus", "all", "--device", "cpu"], "--gpus all with --device cpu: expected a number"),
            (["recall", "--gpus", "2", "--device", "cuda:1"], "--gpus: got --device cuda:1, which is one"),
            (["harness", "--tasks", ","], "--tasks is empty"),
            (["harness", "--tasks", "piqa", "--limit", "0"], "--limit must be at least 1"),
            (["harness", "--tasks", "piqa", "--include-path", "absent"], "--include-path: absent: No such file"),
            (["nothing"], "No such command 'nothing'"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else "",
    )
    def test_options(self, error_of, random_checkpoint, text, tmp_path, monkeypatch, options, words):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("TQDM_DISABLE", "1")
        assert words in error_of("evaluate", random_checkpoint, *[str(text) if o == "{text}" else o for o in options])
        assert not (tmp_path / "runs").exists()

    def test_no_checkpoint(self, error_of, tmp_path):
        for task in (["recall", *RECALL], ["perplexity"]):
            assert "no checkpoint folder" in error_of("evaluate", tmp_path / "absent", *task)

    def test_a_model_without_tokenizer(self, error_of, llama, text, tmp_path):
        folder = shutil.copytree(llama, tmp_path / "model")
        for path in folder.glob("tokenizer*"):
            path.unlink()
        assert "no tokenizer in" in error_of("evaluate", folder, "needle", "--text-file", text, "--lengths", "300")


class TestOptions:
    def test_lengths(self):
        assert read_numbers("--lengths", "1K, 512,64k") == [512, 1024, 65536]
        assert default_lengths(512, 10**6) == [512, 1024, 2048]
        assert default_lengths(512, 1500) == [512, 1024]
        assert default_lengths(100, 10**6) == [100, 200, 400]
        assert default_lengths(None, 10**6)[-1] == default_lengths(32768, 10**6)[-1] == 65536
        with pytest.raises(ValueError, match=r"no text is as long .* 512 tokens: the longest has 400"):
            default_lengths(1024, 400)

    def test_strides(self):
        assert [read_stride(text, 9) for text in ("half", "rolling", "3")] == [4, 8, 3]

    def test_shares_and_sizes(self):
        assert read_shares("--depths", "1,0,0.5") == [0.0, 0.5, 1.0]
        assert read_sizes("64/4,1K/8") == [(64, 4), (1024, 8)]
