"""What a command line names is looked for before torch is imported, and a missing thing names the nearest."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest

from tests.serving.checkpoints import RECITED
from transxssm.data.corpus import EMBEDDED_CORPORA
from transxssm.models import PRESETS
from transxssm.training import bundled_recipes
from transxssm_cli import places
from transxssm_cli.places import read_prompt, read_prompts
from transxssm_lab.studies import bundled_studies

# Runs each command line in one process, and says what each answered and whether torch had been imported by then.
ANSWERS = """
import json, sys
from typer.testing import CliRunner
from transxssm_cli import app
for line in json.load(sys.stdin):
    result = CliRunner().invoke(app.app, line)
    slow = sorted({"torch", "transformers", "datasets", "transxssm", "numpy"} & set(sys.modules))
    print(json.dumps([result.exit_code, result.stderr, slow]))
"""
NOTHING = "no checkpoint folder {}: found nothing there"
MISTYPED = [
    (["generate", "runs/tinny"], NOTHING.format("runs/tinny") + " (did you mean runs/tiny?)"),
    (["generate", "rums/tiny"], "no checkpoint folder rums/tiny: found nothing there (did you mean runs/tiny?)"),
    (["generate", "notes.txt"], "no checkpoint folder notes.txt: found a file there"),
    (["generate", "runs/tiny", "--prompt-file", "note.txt"], "note.txt: No such file or directory (did you mean notes.txt?)"),
    (["generate", "runs/tiny", "--prompts", "absent.txt"], "--prompts: absent.txt: No such file or directory"),
    (["generate", "runs/tiny", "--prompts", "notes.txt", "-p", "a"], "give one of --prompt, --prompt-file and --prompts"),
    (["info", "tini"], "nor a checkpoint folder (did you mean tiny?)"),
    (["info", "./runs/tinny"], NOTHING.format("./runs/tinny") + " (did you mean runs/tiny?)"),
    (["evaluate", "runs/tinny", "perplexity"], NOTHING.format("runs/tinny")),
    (["evaluate", "runs/tinny", "recall"], NOTHING.format("runs/tinny")),
    (["evaluate", "runs/tiny", "needle", "--text-file", "note.txt"], "--text-file: note.txt: No such file"),
    (["evaluate", "runs/tiny", "perplexity", "--recipe", "tinny"], "no recipe 'tinny': did you mean tiny?"),
    (["evaluate", "runs/tiny", "harness", "--tasks", "a", "--include-path", "absent"], "--include-path: absent"),
    (["train", "smal"], "no recipe 'smal': did you mean small?"),
    (["train", "my.yaml"], "no recipe 'my.yaml': Expected a YAML file, or one of chat, laptop, small, "),
    (["train", "small", "data.corpus=text/"], "no corpus 'text/' (did you mean texts?)"),
    (["train", "small", "data.corpus=python-stlib"], "no corpus 'python-stlib' (did you mean python-stdlib?)"),
    (["train", "tiny", "data.validation=noets.txt"], "no data.validation 'noets.txt' (did you mean notes.txt?): expected a"),
    (["train", "own.yaml"], "no corpus './absent'"),
    (["train", "tiny", "--resume", "training.output_dir=runs/tinny"], "it does not exist (did you mean runs/tiny?)"),
    (["train", "smaller.yaml", "--resume"], "no recipe 'smaller.yaml'"),
    (["train", "small", "--resume"], "nothing to resume in runs/small: it does not exist; leave out --resume"),
    (["demo", "--recipe", "tinny"], "no recipe 'tinny': did you mean tiny?"),
    (["study", "tabel2-cpu", "--list"], "no study 'tabel2-cpu': did you mean table2-cpu?"),
]  # fmt: skip

ROUND = ("--max-new-tokens", str(len(RECITED.encode())), "--temperature", "0")


def test_a_mistyped_path_is_answered_without_torch(tmp_path):
    (tmp_path / "runs" / "tiny").mkdir(parents=True)
    (tmp_path / "texts").mkdir()
    (tmp_path / "notes.txt").touch()
    (tmp_path / "own.yaml").write_text("data:\n  corpus: ./absent\n")
    done = subprocess.run(
        [sys.executable, "-c", ANSWERS],
        input=json.dumps([arguments for arguments, _ in MISTYPED]),
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answers) == len(MISTYPED)
    for (arguments, words), (code, said, slow) in zip(MISTYPED, answers, strict=True):
        assert code == 2, arguments
        assert words in said
        assert said.startswith("error: ")
        assert said.count("\n") == 1
        assert slow == [], arguments


def test_names_that_are_repeated_here_are_the_librarys():
    assert list(places.PRESETS) == list(PRESETS)
    assert places.CORPORA == EMBEDDED_CORPORA
    assert places._bundled("recipe") == bundled_recipes()
    assert places._bundled("study") == sorted(bundled_studies())


def test_the_last_override_goes_before_the_recipe(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("data: {corpus: mine}\ntraining:\n")
    assert places.setting(str(path), [], "data.corpus") == "mine"
    assert places.setting(str(path), ["data.corpus=a", "data.corpus='b c'"], "data.corpus") == "b c"
    assert places.setting(str(path), [], "training.output_dir") is None
    path.write_text("data: [")
    assert places.setting(str(path), [], "data.corpus") is None


@pytest.mark.parametrize("corpus", ["python-stdlib", "owner/name", "owner/name-v1.5", "here"])
def test_what_may_be_a_corpus_is_left_to_the_library(tmp_path, monkeypatch, corpus):
    monkeypatch.chdir(tmp_path)
    Path("here").mkdir()
    places.require_recipe("recipe", "tiny", [f"data.corpus={corpus}"])


class TestHub:
    @pytest.fixture
    def cached(self, reciting, monkeypatch, tmp_path):
        """A model in the hub's cache, as a download leaves it."""
        monkeypatch.chdir(tmp_path)
        repository = Path(huggingface_hub.constants.HF_HUB_CACHE) / "models--owner--reciting"
        snapshot = repository / "snapshots" / ("0" * 40)
        shutil.copytree(reciting, snapshot)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("0" * 40)
        yield snapshot
        shutil.rmtree(repository)

    def test_a_name_on_the_hub_stands_for_the_model(self, run, cached):
        command = ("generate", "owner/reciting", "-p", "x", "--max-new-tokens", "4", "--temperature", "0")
        assert run(*command).stdout == "def("
        assert json.loads(run("info", "owner/reciting", "--json").stdout)["model"] == "owner/reciting"
        result = run("evaluate", "owner/reciting", "recall", "--sizes", "16/2", "--examples", "1", "--vocab-size", "64")
        assert result.exit_code == 0
        assert Path("runs/evaluation/owner--reciting/recall.json").is_file()

    def test_a_folder_goes_before_the_hub(self, reciting, cached):
        shutil.copytree(reciting, "owner/reciting")
        assert places.checkpoint_folder("owner/reciting") == Path("owner/reciting")

    def test_without_a_network(self, error_of, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        words = error_of("generate", "owner/absent")
        assert words.startswith(
            "owner/absent: found no folder of this path, and the hub of models cannot be asked for it"
        )
        assert words.endswith("go online, or give a folder")

    def test_weights_that_could_run_code_are_not_taken(self, cached):
        (cached / "model.safetensors").unlink()
        (cached / "pytorch_model.bin").touch()
        with pytest.raises(ValueError, match="has no weights in safetensors"):
            places.checkpoint_folder("owner/reciting")
        (cached / "config.json").unlink()
        with pytest.raises(ValueError, match=r"config\.json is missing"):
            places.checkpoint_folder("owner/reciting", weights=False)


class TestPipes:
    @pytest.fixture
    def stdin(self, monkeypatch):
        """Makes a file descriptor the standard input."""
        opened = []

        def replace(descriptor):
            opened.append(os.fdopen(descriptor, encoding="utf-8"))
            monkeypatch.setattr(sys, "stdin", opened[-1])

        yield replace
        for file in opened:
            file.close()

    def test_what_is_piped_in_is_the_prompt(self, stdin):
        reader, writer = os.pipe()
        os.write(writer, "über(\n".encode())
        os.close(writer)
        stdin(reader)
        assert read_prompt(None, None) == "über(\n"

    def test_a_file_that_is_put_in(self, stdin, tmp_path):
        path = tmp_path / "prompt"
        path.write_text("def ")
        stdin(os.open(path, os.O_RDONLY))
        assert read_prompt(None, None) == "def "

    def test_a_prompt_that_is_given_leaves_the_pipe_alone(self, stdin, tmp_path):
        reader, writer = os.pipe()  # which nobody ends: reading it would hang
        stdin(reader)
        assert read_prompt("given", None) == "given"
        assert read_prompt("", None) == ""
        path = tmp_path / "prompt"
        path.write_text("of a file")
        assert read_prompt(None, path) == "of a file"
        os.close(writer)

    def test_a_terminal_is_not_waited_for(self, stdin):
        master, terminal = os.openpty()
        stdin(terminal)
        assert read_prompt(None, None) == ""
        os.close(master)

    def test_nothing_is_nothing(self, stdin, monkeypatch):
        stdin(os.open(os.devnull, os.O_RDONLY))
        assert read_prompt(None, None) == ""
        monkeypatch.setattr(sys, "stdin", None)
        assert read_prompt(None, None) == ""

    def test_the_command_reads_it(self, run, reciting):
        result = run("generate", reciting, *ROUND, input=b"x =")
        assert (result.exit_code, result.stdout) == (0, RECITED)
        assert result.stderr.startswith("4 prompt tokens")


class TestPromptsOfAFile:
    @pytest.mark.parametrize(
        ("name", "content", "prompts"),
        [
            ("a.txt", "def f(\nimport ", ["def f(", "import "]),
            ("a.txt", "a\r\n\r\n\tb\n", ["a", "", "\tb"]),
            ("a.md", '{"prompt": "a"}\n', ['{"prompt": "a"}']),
            ("a.jsonl", '{"prompt": "a\\nb", "id": 7}\n"c"\n', ["a\nb", "c"]),
            ("a.NDJSON", '"über"', ["über"]),
        ],
    )
    def test_each_line_is_one(self, tmp_path, name, content, prompts):
        path = tmp_path / name
        path.write_bytes(content.encode())
        assert read_prompts(path) == prompts

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            (b"", "is empty: expected a prompt in each line"),
            (b'"a"\n{"text": "b"}\n', 'line 2: got {"text": "b"}, expected a string or {"prompt": "\u2026"}'),
            (b'"a"\nb\n', "line 2 is not JSON"),
            (b'"a"\n\n', "line 2 is not JSON"),
            (b"\xff", "is not UTF-8 text: byte 0 is 0xff"),
        ],
    )
    def test_refusals(self, tmp_path, content, words):
        path = tmp_path / "a.jsonl"
        path.write_bytes(content)
        with pytest.raises(ValueError) as refusal:  # noqa: PT011 (the words are compared below)
            read_prompts(path)
        assert words in str(refusal.value)

    def test_a_line_for_each_as_if_it_were_alone(self, run, random_checkpoint, tmp_path):
        path = tmp_path / "prompts.jsonl"
        prompts = ["a", "ü\n", "", "a"]
        path.write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
        options = ("--max-new-tokens", "12", "--seed", "3")
        result = run("generate", random_checkpoint, "--prompts", path, *options)
        assert result.exit_code == 0
        records = [json.loads(line) for line in io.StringIO(result.stdout)]
        assert [record["prompt"] for record in records] == prompts
        for record in records:
            alone = run("generate", random_checkpoint, "--prompt", record["prompt"], *options).stdout
            assert record["completion"] == alone
        assert result.stderr.count("seed 3") == 4
