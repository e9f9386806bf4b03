"""What is continued: an option's text, a file's, what is piped in, or each line of a file."""

import io
import json
import os
import sys

import pytest

from tests.serving.checkpoints import RECITED
from transxssm_cli.prompts import read_prompt, read_prompts

ROUND = ("--max-new-tokens", str(len(RECITED.encode())), "--temperature", "0")


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
