"""`transxssm plan`: a table for a reader, JSON for a program, a line for a mistake."""

import json

import pytest

from transxssm_cli.plan import parse_tokens


def test_table_and_json_say_the_same(run):
    arguments = ("plan", "1.3b", "--gpus", "8", "--tokens", "100B")
    found = json.loads(run(*arguments, "--json").stdout)
    best = found["plans"][0]
    assert found["tokens"] == 1e11
    assert best["fits"]
    assert best["memory"]["total"] == pytest.approx(sum(v for k, v in best["memory"].items() if k != "total"))
    text = run(*arguments).stdout
    assert f"{best['gpu_hours']:,.0f}" in text
    assert "training.per_device_train_batch_size=4" in text


def test_what_fits_nowhere_says_what_to_do(run):
    assert "take more GPUs" in run("plan", "1.3b", "--gpus", "1", "--length", "1048576").stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["1.3b", "--tokens", "many"], "--tokens: got 'many'"),
        (["1.3b", "--tokens", "0"], "--tokens: got '0'"),
        (["1.4b"], "did you mean 1.3b?"),
        (["1.3b", "--gpus", "0"], "gpus: got 0"),
        (["1.3b", "--link", "0"], "expected more than 0"),
        (["1.3b", "--cp", "3"], "cp=3 must divide"),
    ],
)
def test_mistakes(error_of, arguments, words):
    assert words in error_of("plan", *arguments)


def test_numbers_of_tokens():
    assert [parse_tokens(text) for text in ("100B", "2.5t", "7")] == [1e11, 2.5e12, 7]
