"""`transxssm plan`: a table for a reader, JSON for a program, a line for a mistake."""

import json

import pytest
import torch

from transxssm import TransXSSMConfig
from transxssm_cli import plan
from transxssm_cli.plan import parse_tokens
from transxssm_cli.plan_rates import measured_flops_per_second, measured_link_bytes_per_second


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
        (["1.3b", "--measure"], "--measure: torch sees no GPU here"),
    ],
)
def test_mistakes(error_of, monkeypatch, arguments, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert words in error_of("plan", *arguments)


def test_numbers_of_tokens():
    assert [parse_tokens(text) for text in ("100B", "2.5t", "7")] == [1e11, 2.5e12, 7]


def test_rates_that_are_measured_take_the_place_of_those_that_are_assumed(run, monkeypatch):
    arguments = ("plan", "1.3b", "--gpus", "2", "--json")
    assumed = json.loads(run(*arguments).stdout)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    asked = []
    half = assumed["flops_per_second"] / 2
    monkeypatch.setattr(plan, "measured_flops_per_second", lambda config, **sizes: asked.append(sizes) or half)
    monkeypatch.setattr(plan, "measured_link_bytes_per_second", lambda gpus, kind: 100e9)
    measured = json.loads(run(*arguments, "--measure").stdout)
    assert asked == [{"length": 4096, "rows": 4, "device": torch.device("cuda")}]
    communication = {
        name: next(p for p in found["plans"] if p["data"] == "fsdp" and not p["is_checkpointing"])[
            "communication_seconds"
        ]
        for name, found in {"assumed": assumed, "measured": measured}.items()
    }
    assert communication["measured"] == pytest.approx(3 * communication["assumed"])
    assert measured["plans"][0]["step_seconds"] > 1.8 * assumed["plans"][0]["step_seconds"]
    given = json.loads(run(*arguments, "--measure", "--link", "300").stdout)
    assert given["link_bytes_per_second"] == 300e9
    assert "measured on a GPU. Its 2 GPUs exchange at 100 GB/s" in run(*arguments[:-1], "--measure").stdout.replace(
        "\n", " "
    )


def test_a_rate_is_measured_on_the_first_layers():
    config = TransXSSMConfig.from_preset("tiny", num_hidden_layers=1, layer_types=["linear_attention"])
    rate = measured_flops_per_second(config, length=64, rows=2, device=torch.device("cpu"), repeats=1)
    assert 1e6 < rate < 1e13


@pytest.mark.slow
def test_processes_exchange():
    assert 1e5 < measured_link_bytes_per_second(2, "cpu", size=2**16) < 1e12
