"""`transxssm generate`."""

import io
import json
import os
import re
import shutil
import sys

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from tests import processes
from tests.serving.checkpoints import RECITED, byte_tokenizer
from transxssm.models import TransXSSMConfig
from transxssm.models.baselines import BASELINES, new_language_model
from transxssm_cli import generation

NUM_BYTES = len(RECITED.encode())
ROUND = ("--max-new-tokens", str(NUM_BYTES), "--temperature", "0")


def test_the_completion_alone_goes_to_stdout_and_timing_to_stderr(run, reciting):
    result = run("generate", reciting, "--prompt", "x =", *ROUND)
    assert (result.exit_code, result.stdout) == (0, RECITED)
    timing = r"4 prompt tokens in \d+\.\d\d s \([\d,]+/s\), 16 new tokens \([\d,.]+/s\), greedy, cpu\n"
    assert re.fullmatch(timing, result.stderr)


def test_an_empty_prompt_starts_a_document(run, reciting):
    result = run("generate", reciting, *ROUND)
    assert result.stdout == RECITED
    assert result.stderr.startswith("1 prompt tokens")


def test_the_prompt_may_come_from_stdin_or_a_file(run, reciting, tmp_path):
    text = "über:\r\n"  # nine bytes with bos; line ends stay as they are
    path = tmp_path / "prompt.txt"
    path.write_bytes(text.encode())
    for result in (
        run("generate", reciting, "--prompt", "-", *ROUND, input=text.encode()),
        run("generate", reciting, "--prompt-file", path, *ROUND),
    ):
        assert result.stdout == RECITED
        assert result.stderr.startswith("9 prompt tokens")


def test_stop_strings_are_not_printed(run, reciting):
    result = run("generate", reciting, "--stop", "😀", "--stop", "never", "--temperature", "0")
    assert result.stdout == "def(é€"
    assert "13 new tokens" in result.stderr


def test_a_seed_repeats_a_text_and_one_that_nobody_chose_is_shown(run, random_checkpoint):
    options = ("generate", random_checkpoint, "--prompt", "a", "--max-new-tokens", "30")
    first = run(*options)
    seed = re.search(r"seed (\d+)", first.stderr).group(1)
    assert run(*options, "--seed", seed).stdout == first.stdout
    assert run(*options, "--seed", int(seed) + 1).stdout != first.stdout


def test_a_terminal_shows_the_prompt_dimmed_and_ends_the_line(run, reciting):
    result = run("generate", reciting, "--prompt", "[b]x[/b]", *ROUND, env={"FORCE_COLOR": "1", "TERM": "xterm"})
    assert result.stdout == f"\x1b[2m[b]x[/b]\x1b[0m{RECITED}\n"


@pytest.mark.parametrize("architecture", ["llama", "mamba2", "jamba"])
def test_any_causal_language_model_continues_a_prompt(run, tmp_path, architecture):
    tokenizer = byte_tokenizer()
    config = TransXSSMConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_attention_heads=2, intermediate_size=48, num_hidden_layers=8
    )
    torch.manual_seed(0)
    model = new_language_model(BASELINES[architecture](config)).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    result = run("generate", tmp_path, "--prompt", "ab", "--max-new-tokens", "12", "--temperature", "0")
    prompt = torch.tensor([tokenizer("ab")["input_ids"]])
    expected = model.generate(prompt, max_new_tokens=12, do_sample=False)[0, prompt.shape[1] :]
    assert (result.exit_code, result.stdout) == (0, tokenizer.decode(expected, skip_special_tokens=True))
    assert result.stdout
    assert result.stderr.startswith("3 prompt tokens")


def test_a_baseline_that_was_trained_here_begins_a_document_as_in_training(run, tmp_path):
    """With eos, where the tokenizer has no bos and adds nothing; another's begins as its tokenizer has it."""
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = None
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A", special_tokens=[])
    tokenizer.save_pretrained(tmp_path)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=258, **sizes)).save_pretrained(tmp_path)
    command = ("generate", tmp_path, "--prompt", "ab", "--max-new-tokens", "1")
    assert run(*command).stderr.startswith("2 prompt tokens")
    (tmp_path / "recipe.yaml").touch()
    assert run(*command).stderr.startswith("3 prompt tokens")


def test_dtype(run, reciting):
    assert run("generate", reciting, "--dtype", "bfloat16", *ROUND).stdout == RECITED


def test_pieces_are_written_as_they_come(reciting, monkeypatch):
    """Character by character, not at the end."""
    pieces = []
    monkeypatch.setattr(generation, "write_now", pieces.append)
    settings = generation.GenerationSettings(max_new_tokens=NUM_BYTES, temperature=0.0)
    generation.generate_to_stdout(reciting, "", settings, dtype_name="auto", device_name="cpu")
    assert pieces == list(RECITED)


def test_a_piece_does_not_wait_for_a_full_line(monkeypatch):
    received = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(received, encoding="utf-8"))
    generation.write_now("é")
    assert received.getvalue() == "é".encode()


def test_a_reader_that_has_seen_enough_ends_it_quietly(reciting, tmp_path):
    os.mkfifo(tmp_path / "stdout")
    arguments = ["generate", reciting, "--max-new-tokens", 100000]
    process = processes.start(processes.command, *arguments, output=tmp_path)
    with (tmp_path / "stdout").open("rb") as reader:
        assert reader.read(4) == b"def("
    assert processes.exit_codes([process]) == [1]
    assert processes.said(tmp_path) == ""


class TestRefusals:
    def test_no_folder(self, error_of, tmp_path):
        assert "no checkpoint folder" in error_of("generate", tmp_path / "absent")

    def test_no_model_in_it(self, error_of, tmp_path):
        assert "config.json is missing" in error_of("generate", tmp_path)

    def test_weights_cut_short(self, error_of, reciting, tmp_path):
        folder = shutil.copytree(reciting, tmp_path / "run")
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
        assert "model.safetensors is truncated or damaged" in error_of("generate", folder)

    def test_a_prompt_that_memory_does_not_hold(self, error_of, reciting, monkeypatch):
        monkeypatch.setattr(generation, "available_bytes", lambda device: 2_500_000)
        words = error_of("generate", reciting, "--prompt", "x" * 999, "--max-new-tokens", "24")
        # The cache alone would fit.
        assert words.startswith("a prompt of 1,000 tokens and 24 new ones need about")
        # One attention layer keeps 1024 · 2 · 264 floats; one SSD layer four heads of 66 × 132.
        assert f"cache {(1024 * 2 * 264 + 264 * 132) * 4 / 1e6:,.1f} MB" in words
        assert "cpu has 2.5 MB left: shorten the prompt" in words

    def test_more_text_than_a_table_of_positions_has(self, error_of, tmp_path):
        GPT2LMHeadModel(
            GPT2Config(
                vocab_size=258, bos_token_id=256, eos_token_id=256, n_positions=16, n_embd=16, n_layer=1, n_head=2
            )
        ).save_pretrained(tmp_path)
        byte_tokenizer().save_pretrained(tmp_path)
        words = error_of("generate", tmp_path, "--prompt", "abcde", "--max-new-tokens", "12")
        assert words.startswith("the model has 16 positions: got a prompt of 6 tokens and 12 new ones")

    def test_a_tokenizer_of_another_model(self, error_of, reciting, tmp_path):
        folder = shutil.copytree(reciting, tmp_path / "run")
        tokenizer = byte_tokenizer()
        tokenizer.add_tokens(["one more"])
        tokenizer.save_pretrained(folder)
        assert "token ids up to 258, expected less than vocab_size=258" in error_of("generate", folder)

    def test_sizes_that_do_not_fit(self, error_of, reciting, tmp_path):
        path = tmp_path / "config.json"
        path.write_text(json.dumps(json.loads((reciting / "config.json").read_text()) | {"head_dim": 100}))
        assert "must be even, one a multiple of the other" in error_of("generate", tmp_path)

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (["--device", "gpu"], "unknown device 'gpu'"),
            (["--device", "cuda:99"], "device 'cuda:99' cannot be used here"),
            (["--dtype", "int8"], "unknown dtype 'int8': expected one of auto, float32"),
            (["--max-new-tokens", "0"], "max-new-tokens must be at least 1"),
            (["--temperature", "-1"], "temperature must be 0 (greedy) or more"),
            (["--top-p", "0"], "top-p must be more than 0"),
            (["--seed", "-1"], "seed must be at least 0"),
            (["--stop", ""], "a stop string must not be empty"),
            (["--prompt", "a", "--prompt-file", "b"], "give one of --prompt, --prompt-file and --prompts"),
            (["--prompt-file", "absent.txt"], "absent.txt: No such file or directory"),
        ],
        ids=str,
    )
    def test_options(self, error_of, reciting, options, words):
        assert words in error_of("generate", reciting, *options)

    def test_a_prompt_that_is_no_text(self, error_of, reciting, tmp_path):
        path = tmp_path / "prompt.bin"
        path.write_bytes(b"ab\xff")
        assert "is not UTF-8 text: byte 2 is 0xff" in error_of("generate", reciting, "--prompt-file", path)
        assert "standard input is not UTF-8 text" in error_of("generate", reciting, "-p", "-", input=b"\xff")
