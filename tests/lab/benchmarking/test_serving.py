"""The load on two servers: what is asked, what is timed, what is shown. A few lines of aiohttp stand in for vLLM."""

import asyncio
import json

import numpy as np
import pytest
from aiohttp import web

from transxssm.models import TransXSSMConfig
from transxssm.models.baselines import llama_config
from transxssm_cli.app import app
from transxssm_lab.benchmarking import serving
from transxssm_lab.benchmarking.serving import Load, ServingSettings, ask_together, cell_of, loads_of

SETTINGS = ServingSettings(
    preset="tiny", clients=(1, 2), prompt=8, new=4, long_prompt=32, long_clients=2, long_new=2, repeats=1
)


async def answered(prompts, new: int, *, missing: int = 0, status: int = 200):
    """What `ask_together` gets of a server that sends so many tokens, two at a time, and what the server was asked."""
    bodies = []

    async def complete(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        bodies.append(body)
        response = web.StreamResponse(status=status)
        await response.prepare(request)
        for begin in range(0, body["max_tokens"] - missing, 2):
            ids = list(range(begin, min(begin + 2, body["max_tokens"] - missing)))
            await response.write(f"data: {json.dumps({'choices': [{'token_ids': ids}]})}\n\n".encode())
            await asyncio.sleep(0.01)
        await response.write(b"data: [DONE]\n\n")
        return response

    application = web.Application()
    application.router.add_post("/v1/completions", complete)
    runner = web.AppRunner(application)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0]
    try:
        return await ask_together(f"http://{host}:{port}", prompts, new), bodies
    finally:
        await runner.cleanup()


def test_every_token_of_every_client_is_counted():
    prompts = np.arange(12).reshape(3, 4)
    outcome, bodies = asyncio.run(answered(prompts, 5))
    assert sorted(body["prompt"] for body in bodies) == prompts.tolist()
    assert {(body["max_tokens"], body["ignore_eos"]) for body in bodies} == {(5, True)}
    assert 0 < outcome["tokens_per_second"] < 3 * 5 / 0.02  # three pauses of 10 ms
    assert 0 < outcome["first_p50"] <= outcome["first_p95"]
    assert outcome["between_p95"] > 0.005


@pytest.mark.parametrize(
    ("options", "expected"), [({"missing": 1}, "sent 4 tokens: expected 5"), ({"status": 500}, "answered 500")]
)
def test_a_server_that_fails_is_no_result(options, expected):
    with pytest.raises(RuntimeError, match=expected):
        asyncio.run(answered(np.ones((1, 3), dtype=int), 5, **options))


def test_loads():
    names = [(load.name, load.clients, load.shared) for load in loads_of(SETTINGS)]
    assert names == [
        ("short", 1, 0),
        ("short", 2, 0),
        ("prefix not cached", 1, 0),
        ("prefix cached", 1, 24),
        ("long", 2, 0),
        ("long, shared prefix", 2, 24),
    ]


def turn(rate: float, first: float) -> dict[str, float]:
    return {"tokens_per_second": rate, "first_p50": first, "first_p95": first, "between_p50": 0.01, "between_p95": 0.02}


def test_report_has_ratios_of_the_same_turns(tmp_path):
    turns = {"transxssm": [turn(20, 1.0), turn(60, 0.5)], "llama": [turn(10, 2.0), turn(10, 4.0)]}
    loads = [
        Load("short", 1, 8, 4),
        Load("short", 2, 8, 4),
        Load("prefix not cached", 1, 32, 1),
        Load("prefix cached", 1, 32, 1, 24),
    ]
    cells = [cell_of(load, name, turns[name], turns["llama"]) for load in loads for name in turns]
    cells[-2]["medians"] = cells[-2]["medians"] | {"first_p50": 0.075}
    assert cells[0]["ratio_to_llama"] == 4.0  # the median of 2 and 6
    results = {
        "cells": cells,
        "parameters": {"transxssm": 10, "llama": 11},
        "floor": {"transxssm": 5.0, "llama": 6.0},
        "concurrency": {"transxssm": 12.0, "llama": None},
    }
    both, lines = serving.tables(results)
    assert [row["first token, cached over not"] for row in both.rows] == ["10.0%", "100.0%"]
    assert lines.rows[0]["× llama"] == "4.00"
    serving.plot(tmp_path / "picture.png", results)
    assert (tmp_path / "picture.png").stat().st_size > 0


def test_checkpoints_have_a_tokenizer_of_their_size(tmp_path):
    config = TransXSSMConfig.from_preset("tiny")
    for name in serving.CONTENDERS:
        model = serving.write_checkpoint(tmp_path / name, name, SETTINGS)
        assert len(json.loads((tmp_path / name / "tokenizer.json").read_text())["model"]["vocab"]) <= config.vocab_size
        assert model.config.vocab_size == config.vocab_size
    assert model.config.num_hidden_layers == llama_config(config).num_hidden_layers


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"repeats": 0}, "repeats must be at least 1"),
        ({"clients": (0,)}, "clients must be"),
        ({"dtype": "int8"}, "float32 or bfloat16"),
    ],
)
def test_wrong_settings(options, expected):
    with pytest.raises(ValueError, match=expected):
        ServingSettings(**options)


def test_without_vllm_one_line(capsys, monkeypatch):
    from transxssm.serving.vllm import plugin

    monkeypatch.setattr(plugin, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as ended:
        app(["benchmark", "serving"])
    assert ended.value.code == 2
    assert "install transxssm[vllm]" in capsys.readouterr().err
