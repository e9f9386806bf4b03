"""`transxssm train`: the recipe and its overrides, the way to resume, and every mistake in one line."""

import json
import os
import shlex
import shutil
import signal
import time

import pytest

from tests import processes
from transxssm.data import corpus as corpora
from transxssm.data.corpus import is_held_out
from transxssm.training import SaveError
from transxssm_cli import training
from transxssm_cli.places import split_arguments


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], ("tiny", [])),
        (["small"], ("small", [])),
        (["small", "training.seed=1"], ("small", ["training.seed=1"])),
        (["training.seed=1", "data.seed=2"], ("tiny", ["training.seed=1", "data.seed=2"])),
    ],
    ids=str,
)
def test_arguments_are_a_recipe_and_overrides(arguments, expected):
    assert split_arguments(arguments) == expected


def test_a_file_may_have_an_equals_sign_in_its_name(tmp_path):
    path = tmp_path / "width=64.yaml"
    assert split_arguments([str(path)])[0] == "tiny"
    path.touch()
    assert split_arguments([str(path), "a.b=1"]) == (str(path), ["a.b=1"])


def test_a_run_can_be_resumed_generated_from_and_described(run, recipe, tmp_path):
    folder = tmp_path / "run"
    result = run("train", recipe, "training.max_steps=2")
    assert result.exit_code == 0
    summary = json.loads((folder / "summary.json").read_text())
    assert f"{summary['bits_per_byte']:.4f} bits per byte after 128 tokens" in result.stdout
    assert result.stderr.count("\n") == len(result.stderr.splitlines())  # no bars, which rewrite their line
    assert "step 2/2" in result.stderr

    result = run("train", recipe, "--resume")  # to the recipe's own four steps
    assert result.exit_code == 0
    assert "resuming from" in result.stderr
    assert json.loads((folder / "summary.json").read_text())["steps"] == 4

    assert run("generate", folder, "--prompt", "def ", "--max-new-tokens", "5").exit_code == 0
    assert json.loads(run("info", folder, "--json").stdout)["parameters"]["total"] == summary["parameters"]


def test_one_process_of_several_speaks(run, recipe, monkeypatch):
    summary = {"eval_loss": 1.0, "perplexity": 2.7, "bits_per_byte": 1.4, "train_tokens": 10}
    monkeypatch.setattr(training, "train", lambda recipe, resume: summary)
    monkeypatch.setenv("RANK", "1")
    assert run("train", recipe).stdout == ""
    monkeypatch.setenv("RANK", "0")
    assert "1.4000 bits per byte" in run("train", recipe).stdout


def test_ctrl_c_ends_it_with_a_line_on_how_to_go_on(recipe, tmp_path):
    folder = tmp_path / "run"
    output = tmp_path / "said"
    arguments = ["train", recipe, "training.max_steps=1000000"]
    process = processes.start(processes.command, *arguments, output=output)
    try:
        while "\nstep 3/" not in processes.said(output):
            assert process.is_alive(), processes.said(output)
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGINT)
        process.join()
    finally:
        process.kill()
    stderr = processes.said(output)
    assert (process.exitcode, processes.said(output, "stdout")) == (130, "")
    last = stderr.splitlines()[-1]
    assert last.startswith("interrupted: stopped after step ")
    assert "--resume" in last
    assert "Traceback" not in stderr
    assert list(folder.glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["training.max_stepss=3"], "did you mean training.max_steps?"),
        (["trainin.max_steps=3"], "trainin"),
        (["training.learning_rate=fast"], "training.learning_rate"),
        (["data.sequence_length=1.5"], "data.sequence_length"),
        (["data.sequence_length=0"], "data.sequence_length must be at least 2"),
        (["data.tokenizer=bpe", "data.vocab_size=100"], "data.vocab_size must be at least 258"),
        (["model.num_attention_heads=3"], "hidden_size must be a multiple of num_attention_heads"),
        (["model.ssd_state_size=20"], "must be even, one a multiple of the other"),
        (["model.rope_parameters={rope_type: dynamic, rope_theta: 10000.0}"], "cannot be rotated again"),
        (["model.preset=huge"], "got 'huge'"),
        (["max_steps"], "expected section.key=value"),
        (["data.corpus=no-such-corpus"], "no corpus 'no-such-corpus'"),
    ],
    ids=str,
)
def test_bad_settings(error_of, recipe, tmp_path, overrides, words):
    assert words in error_of("train", recipe, *overrides)
    assert not (tmp_path / "run").exists()


def test_a_missing_recipe(error_of, tmp_path):
    assert "no recipe 'absent.yaml'" in error_of("train", "absent.yaml")


@pytest.mark.parametrize(("content", "words"), [(None, "empty"), (b"\x00\x01binary\xff", "data.bin")])
def test_bad_corpora(error_of, recipe, tmp_path, content, words):
    corpus = tmp_path / "data.bin"
    if content is None:
        corpus = tmp_path / "empty"
        corpus.mkdir()
    else:
        corpus.write_bytes(content)
    assert words in error_of("train", recipe, f"data.corpus={corpus}")
    assert not (tmp_path / "run").exists()


def test_a_full_disk_is_told_as_it_comes(error_of, recipe, monkeypatch):
    def fail(recipe, resume):
        raise SaveError("could not save checkpoint-2: No space left on device; checkpoint-1 is whole")

    monkeypatch.setattr(training, "train", fail)
    assert error_of("train", recipe).endswith("checkpoint-1 is whole")


@pytest.mark.parametrize("overrides", [[], ["model.architecture=llama"]], ids=str)
@pytest.mark.parametrize(
    ("text", "prompt"),
    [
        ("  Es war einmal ein König, der hatte\n", "'Es war einmal'"),
        ("-- it's here\n\nand there", "'it'\"'\"'s here'"),
        ("short " + "long" * 9 + " gone\n", "'short'"),
        ("一二三四五六七八九十" * 9, "'" + "一二三四五六七八九十" * 4 + "'"),
    ],
    ids=["words", "quotes", "long words", "no spaces"],
)
def test_a_finished_run_says_what_can_be_done_with_it(run, recipe, tmp_path, monkeypatch, overrides, text, prompt):
    summary = {"eval_loss": 1.0, "perplexity": 2.7, "bits_per_byte": 1.4, "train_tokens": 10}
    monkeypatch.setattr(training, "train", lambda recipe, resume: summary)
    (tmp_path / "train.txt").write_text("something else")
    (tmp_path / "held_out.txt").write_text(text)
    corpus = [f"data.corpus={tmp_path / 'train.txt'}", f"data.validation={tmp_path / 'held_out.txt'}"]
    line = run("train", recipe, *corpus, *overrides).stdout.splitlines()[-1]
    assert line.startswith(f"try it: transxssm generate {tmp_path / 'run'} --prompt ")
    assert shlex.split(line)[-1] == shlex.split(prompt)[0]


def test_without_a_text_at_hand_the_prompt_is_left_out(run, recipe, tmp_path, monkeypatch):
    summary = {"eval_loss": 1.0, "perplexity": 2.7, "bits_per_byte": 1.4, "train_tokens": 10}
    monkeypatch.setattr(training, "train", lambda recipe, resume: summary)
    (tmp_path / "emptied").mkdir()  # while the model was trained
    for overrides in (["data.corpus=owner/name", "data.streaming=true"], [f"data.corpus={tmp_path / 'emptied'}"]):
        assert run("train", recipe, *overrides).stdout.endswith(f"try it: transxssm generate {tmp_path / 'run'}\n")


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("training.learning_rate=-1", "training.learning_rate: got -1, expected 0 or more"),
        ("training.max_steps=-5", "training.max_steps: got -5, expected at least 1, or -1 to train for"),
        (
            "training.logging_steps=0",
            "training.logging_steps: got 0, expected a whole number of steps from 1 on, or a share",
        ),
        ("training.optim=galore_adamw", "the training section asks for what is not installed here: "),
    ],
    ids=str,
)
def test_settings_that_transformers_would_stumble_over(error_of, recipe, tmp_path, setting, words):
    assert words in error_of("train", recipe, setting)
    assert not (tmp_path / "run").exists()


def test_a_mistyped_folder_is_not_resumed(error_of, recipe, tmp_path):
    """Neither one that is missing nor one without a run in it; the nearest run is named."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").touch()
    (tmp_path / "rum").mkdir()
    for name in ("runn", "rum"):
        words = error_of("train", recipe, "--resume", f"training.output_dir={tmp_path / name}")
        assert words.startswith(f"nothing to resume in {tmp_path / name}: it ")
        assert f"(did you mean {tmp_path / 'run'}?)" in words
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recipe.yaml", "rum", "run"]


@pytest.fixture
def begun(run, recipe, corpus, tmp_path):
    """A run of two steps on a copy of the corpus, and the arguments by which it goes on to four."""
    own = tmp_path / "own"
    shutil.copytree(corpus, own)
    arguments = ["train", recipe, f"data.corpus={own}"]
    assert run(*arguments, "training.max_steps=2").exit_code == 0
    return own, [*arguments, "--resume"]


def test_a_run_goes_on_with_the_same_text_wherever_and_whenever_it_was_written(run, begun):
    own, arguments = begun
    for path in own.iterdir():
        os.utime(path, (0, 0))
    result = run(*arguments)
    assert result.exit_code == 0
    assert "data.json" not in result.stderr


@pytest.mark.parametrize("split", ["held out", "trained on"])
def test_a_run_whose_files_have_changed_does_not_go_on(run, begun, tmp_path, split):
    """One file of one split has other text of the same length; the error names that split and no other."""
    own, arguments = begun
    held_out = {name for name in (path.name for path in own.iterdir()) if is_held_out(name, 0.25)}
    changed = min(path for path in own.iterdir() if (path.name in held_out) == (split == "held out"))
    before, record = changed.read_text(), tmp_path / "run" / "data.json"
    changed.write_text(before.swapcase())
    recorded = json.loads(record.read_text())
    words = run(*arguments)
    assert (words.exit_code, words.stdout) == (2, "")
    (line,) = [line for line in words.stderr.splitlines() if line.startswith("error: ")]
    other = ({*recorded} - {split}).pop()
    assert f"the text {split} was {recorded[split]} and is " in line
    assert f"the text {other} was" not in line
    assert f"remove {record} to go on" in line
    assert json.loads(record.read_text()) == recorded

    changed.write_text(before)
    assert run(*arguments).exit_code == 0


def test_another_way_to_cut_a_text_is_noticed(run, recipe, tmp_path, monkeypatch):
    text = tmp_path / "one.txt"
    text.write_text("\n".join(f"line {index} of a single file" for index in range(4000)))
    arguments = ["train", recipe, f"data.corpus={text}"]
    assert run(*arguments, "training.max_steps=2").exit_code == 0
    monkeypatch.setattr(corpora, "PIECES", 2)
    result = run(*arguments, "--resume")
    assert result.exit_code == 2
    assert "the text held out was " in result.stderr
    assert "the text trained on was " in result.stderr


def test_a_run_without_a_record_of_its_text_is_warned_of(run, begun, tmp_path):
    """As earlier versions left it, or as somebody removed it."""
    _, arguments = begun
    record = tmp_path / "run" / "data.json"
    record.unlink()
    result = run(*arguments)
    assert result.exit_code == 0
    (line,) = [line for line in result.stderr.splitlines() if "data.json" in line]
    assert "losses before and after cannot be compared" in line
    assert not record.exists()


def test_the_corrected_command_needs_no_other_folder(run, error_of, recipe, tmp_path):
    assert error_of("train", recipe, "training.optim=galore_adamw")
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    assert error_of("train", recipe, "training.optim=galore_adamw")
    assert not any((tmp_path / "run").iterdir())  # a folder that was there stays
    (tmp_path / "run" / "recipe.yaml").write_text("a user's own")
    assert "is not empty" in error_of("train", recipe)
    (tmp_path / "run" / "recipe.yaml").unlink()
    assert run("train", recipe).exit_code == 0
    assert "is not empty" in error_of("train", recipe)
