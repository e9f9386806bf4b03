"""`transxssm benchmark serving`: our model and a Llama with as many parameters, each in a vLLM of its own, under the same load.

Both servers are up all the time, and take turns: while one is asked the other sleeps. transformers' `generate` of one batch is the floor.
"""

import asyncio
import itertools
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken
from transformers import PreTrainedModel

from transxssm.data import Corpus, DataArguments, build_tokenizer
from transxssm.machine import run_metadata
from transxssm.models import TransXSSMConfig
from transxssm.models.baselines import llama_config, new_language_model
from transxssm.plotting import draw_line, label_lines, looks_of, picture, set_ticks, short_ticks
from transxssm.wording import format_length
from transxssm_lab.benchmarking.report import Report, Table, write_json, write_report

NAME = "serving"
CONTENDERS = ("transxssm", "llama")
START_SECONDS = 900
CONCURRENCY = re.compile(r"Maximum concurrency for [\d,]+ tokens per request: ([\d.,]+)x")
KILL_AFTER_SECONDS = 30
FIRST_TOKEN = 300  # of random prompts, behind the special ones
HEADERS = (
    "load",
    "clients",
    "contender",
    "tokens/s",
    "first token, s",
    "between tokens, ms",
    "× llama",
    "× one client",
)


@dataclass(frozen=True)
class ServingSettings:
    """What is measured.

    Args:
        preset, dtype: sizes and precision of both models, whose weights are random.
        clients: numbers of requests at once, with short prompts.
        prompt, new: tokens of a short prompt, and tokens that follow any.
        long_prompt, long_clients, long_new: the same of long ones.
        repeats: timed turns of each load; short ones are warmed up by one more.
        cache_gigabytes: of each server's cache.

    Raises:
        ValueError: a number that is not at least 1.
    """

    preset: str = "small"
    dtype: str = "float32"
    clients: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    prompt: int = 64
    new: int = 64
    long_prompt: int = 4096
    long_clients: int = 16
    long_new: int = 128
    repeats: int = 3
    cache_gigabytes: float = 2.0

    def __post_init__(self) -> None:
        numbers = {name: value for name, value in asdict(self).items() if isinstance(value, int)}
        for name, value in [*numbers.items(), *(("clients", number) for number in self.clients)]:
            if value < 1:
                raise ValueError(f"{name} must be at least 1: got {value}")
        if self.cache_gigabytes <= 0:
            raise ValueError(f"cache-gb must be more than 0: got {self.cache_gigabytes:g}")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype must be float32 or bfloat16: got {self.dtype!r}")


@dataclass
class Load:
    """A load on the server: a number of clients, each of which sends one request at the same time.

    Args:
        name: the name of this kind of load in tables.
        clients: number of concurrent requests.
        prompt, new: number of prompt tokens and of generated tokens of each request.
        shared: number of tokens that all prompts begin with and that are in the prefix cache. Defaults to 0.
    """

    name: str
    clients: int
    prompt: int
    new: int
    shared: int = 0


def loads_of(settings: ServingSettings) -> list[Load]:
    """All of them, short ones first."""
    short = [Load("short", clients, settings.prompt, settings.new) for clients in settings.clients]
    long = Load("long", settings.long_clients, settings.long_prompt, settings.long_new)
    alone = Load("prefix not cached", 1, settings.long_prompt, 1)
    cached = Load("prefix cached", 1, settings.long_prompt, 1, shared=settings.long_prompt - settings.prompt)
    shared = Load("long, shared prefix", settings.long_clients, settings.long_prompt, settings.long_new, cached.shared)
    return [*short, alone, cached, long, shared]


def run_serving(settings: ServingSettings, folder: Path, *, minutes: float, say: Any = print) -> dict[str, Any]:
    """Measures all loads, within `minutes` of wall time, and writes serving.json, serving.md and serving.png into the folder.

    Raises:
        RuntimeError: a server did not start; its log is in the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * minutes
    results: dict[str, Any] = {
        "benchmark": NAME,
        "status": "interrupted",
        "metadata": run_metadata(torch.device("cpu"), None),
        "settings": asdict(settings),
        "peak": None,
        "cells": [],
    }
    models = {name: write_checkpoint(folder / name, name, settings) for name in CONTENDERS}
    results["parameters"] = {name: model.num_parameters() for name, model in models.items()}
    results["floor"] = generate_floor(models, settings)
    del models
    rng = np.random.default_rng(0)
    vocabulary = TransXSSMConfig.from_preset(settings.preset).vocab_size
    with ExitStack() as stack:
        servers = {name: stack.enter_context(server(folder / name, settings)) for name in CONTENDERS}
        results["concurrency"] = {name: concurrency for name, (_, concurrency) in servers.items()}
        for load in loads_of(settings):
            turns: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
            warm_up = int(load.name == "short")
            for turn in range(settings.repeats + warm_up):
                if time.monotonic() > deadline:
                    break
                before, *prompts = rng.integers(FIRST_TOKEN, vocabulary, (1 + load.clients, load.prompt))
                for ids in prompts:
                    ids[: load.shared] = before[: load.shared]
                for name, (url, _) in servers.items():
                    if load.shared:
                        asyncio.run(ask_together(url, [before], 1))
                    outcome = asyncio.run(ask_together(url, prompts, load.new))
                    say(f"{load.name}, {load.clients} clients, {name}: {outcome['tokens_per_second']:,.1f} tokens/s")
                    if turn >= warm_up:
                        turns[name].append(outcome)
            for name in CONTENDERS:
                results["cells"].append(cell_of(load, name, turns[name], turns["llama"]))
            write_json(folder / f"{NAME}.json", results)
    results["status"] = "complete" if all(cell["turns"] for cell in results["cells"]) else "out of time"
    write_report(folder, NAME, results, REPORT)
    return results


def cell_of(
    load: Load, name: str, turns: Sequence[dict[str, float]], reference: Sequence[dict[str, float]]
) -> dict[str, Any]:
    """The turns of a load at one contender, with their medians, and its speed over the reference's of the same turn."""
    ratios = [
        own["tokens_per_second"] / other["tokens_per_second"] for own, other in zip(turns, reference, strict=True)
    ]
    medians = {key: statistics.median(turn[key] for turn in turns) for key in turns[0]} if turns else {}
    return {
        **asdict(load),
        "contender": name,
        "turns": list(turns),
        "tokens_per_second": medians.get("tokens_per_second"),
        "medians": medians,
        "ratio_to_llama": statistics.median(ratios) if ratios else None,
    }


def write_checkpoint(folder: Path, name: str, settings: ServingSettings) -> PreTrainedModel:
    """A model of random weights, and a tokenizer with as many tokens as it has."""
    config = TransXSSMConfig.from_preset(settings.preset)
    torch.manual_seed(0)
    model = new_language_model(
        config if name == "transxssm" else llama_config(config), dtype=getattr(torch, settings.dtype)
    )
    model.save_pretrained(folder)
    tokenizer = build_tokenizer(DataArguments(tokenizer="bytes"), Corpus(train=None, held_out=None, identity=""))
    tokenizer.add_tokens([AddedToken(f"<{number}>") for number in range(len(tokenizer), config.vocab_size)])
    tokenizer.save_pretrained(folder)
    return model.eval()


def generate_floor(models: dict[str, PreTrainedModel], settings: ServingSettings) -> dict[str, float]:
    """Tokens a second of transformers' `generate` for a batch of as many short prompts as the long load has clients."""
    rates = {}
    for name, model in models.items():
        ids = torch.randint(FIRST_TOKEN, model.config.vocab_size, (settings.long_clients, settings.prompt))
        options = {"max_new_tokens": settings.new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        with torch.inference_mode():
            model.generate(ids, **(options | {"max_new_tokens": 2}))
            started = time.perf_counter()
            model.generate(ids, **options)
        rates[name] = ids.shape[0] * settings.new / (time.perf_counter() - started)
    return rates


@contextmanager
def server(folder: Path, settings: ServingSettings) -> Iterator[tuple[str, float | None]]:
    """A vLLM that serves a folder: its address, and how many long requests its cache holds at once."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url, log = f"http://127.0.0.1:{port}", folder.with_suffix(".log")
    length = settings.long_prompt + settings.long_new
    flags = ["--host", "127.0.0.1", "--port", str(port), "--dtype", settings.dtype, "--max-model-len", str(length)]
    flags += [
        "--enforce-eager",
        "--enable-prefix-caching",
        "--disable-uvicorn-access-log",
        "--distributed-executor-backend",
        "uni",
    ]
    flags += ["--kv-cache-memory-bytes", str(int(settings.cache_gigabytes * 10**9)), "--max-num-seqs", "64"]
    command = [
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(folder),
        "--served-model-name",
        "model",
    ]
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            [*command, *flags], stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        while not _is_up(url):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server of {folder.name} did not start: see {log}")
            time.sleep(0.5)
        found = CONCURRENCY.search(log.read_text(encoding="utf-8"))
        yield url, float(found[1].replace(",", "")) if found else None
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(KILL_AFTER_SECONDS)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # what it started and left


def _is_up(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as response:
            return response.status == 200
    except OSError:
        return False


async def ask_together(url: str, prompts: Sequence[np.ndarray], new: int) -> dict[str, float]:
    """Sends prompts, (tokens,) ids each, at once and waits for all answers.

    Returns:
        `tokens_per_second` of all new tokens over the wall time; of the clients the median and the 95th percentile of the seconds to the
        first token, and between two tokens.
    """
    import aiohttp

    async def ask(session: Any, prompt: list[int]) -> list[float]:
        body = {
            "model": "model",
            "prompt": prompt,
            "max_tokens": new,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
        times = [time.perf_counter()]
        async with session.post(f"{url}/v1/completions", json=body | {"return_token_ids": True}) as response:
            if response.status != 200:
                raise RuntimeError(f"the server answered {response.status}: {await response.text()}")
            async for line in response.content:
                if line.startswith(b"data: {"):
                    choices = json.loads(line[6:])["choices"]
                    times += [time.perf_counter()] * sum(len(choice.get("token_ids") or ()) for choice in choices)
        if len(times) != new + 1:
            raise RuntimeError(f"the server sent {len(times) - 1} tokens: expected {new}")
        return times

    unlimited = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(timeout=unlimited, connector=aiohttp.TCPConnector(limit=0)) as session:
        started = time.perf_counter()
        all_times = await asyncio.gather(*(ask(session, prompt.tolist()) for prompt in prompts))
        seconds = time.perf_counter() - started
    first = [times[1] - times[0] for times in all_times]
    between = [after - before for times in all_times for before, after in itertools.pairwise(times[1:])] or [0.0]
    return {
        "tokens_per_second": len(prompts) * new / seconds,
        "first_p50": float(np.percentile(first, 50)),
        "first_p95": float(np.percentile(first, 95)),
        "between_p50": float(np.percentile(between, 50)),
        "between_p95": float(np.percentile(between, 95)),
    }


def tables(results: dict[str, Any]) -> list[Table]:
    """The loads, and what they say together."""
    cells = [cell for cell in results["cells"] if cell["turns"]]
    alone = {cell["contender"]: cell for cell in cells if cell["name"] == "short" and cell["clients"] == 1}
    rows = []
    for cell in cells:
        medians, base = cell["medians"], alone.get(cell["contender"])
        is_short = cell["name"] == "short" and base is not None
        rows.append(
            dict(
                zip(
                    HEADERS,
                    (
                        f"{cell['name']}, {format_length(cell['prompt'])} + {cell['new']}",
                        str(cell["clients"]),
                        cell["contender"],
                        f"{medians['tokens_per_second']:,.1f}",
                        f"{medians['first_p50']:.2f} (p95 {medians['first_p95']:.2f})",
                        f"{1e3 * medians['between_p50']:.0f} (p95 {1e3 * medians['between_p95']:.0f})",
                        f"{cell['ratio_to_llama']:.2f}",
                        f"{medians['tokens_per_second'] / base['tokens_per_second']:.2f}" if is_short and base else "–",
                    ),
                    strict=True,
                )
            )
        )
    summary = [
        {
            "contender": name,
            "parameters": f"{results['parameters'][name]:,}",
            "generate, one batch, tokens/s": f"{results['floor'][name]:,.1f}",
            "long requests in the cache": "–"
            if results["concurrency"][name] is None
            else f"{results['concurrency'][name]:,.1f}",
            "first token, cached over not": _cached_share(cells, name),
        }
        for name in CONTENDERS
    ]
    return [Table("Both", tuple(summary[0]), summary), Table("Loads", HEADERS, rows)]


def _cached_share(cells: Sequence[dict[str, Any]], contender: str) -> str:
    first = {cell["name"]: cell["medians"]["first_p50"] for cell in cells if cell["contender"] == contender}
    if not {"prefix cached", "prefix not cached"} <= first.keys():
        return "–"
    return f"{first['prefix cached'] / first['prefix not cached']:.1%}"


def plot(path: Path, results: dict[str, Any]) -> None:
    """Tokens a second over the clients, of short prompts."""
    timed = [cell for cell in results["cells"] if cell["name"] == "short" and cell["turns"]]
    with picture(path, 1, 1, width=6, height=4) as panel:
        for name, look in looks_of(cell["contender"] for cell in timed).items():
            own = [cell for cell in timed if cell["contender"] == name]
            rates = [[turn["tokens_per_second"] for turn in cell["turns"]] for cell in own]
            medians, slow, fast = np.median(rates, axis=1), np.min(rates, axis=1), np.max(rates, axis=1)
            draw_line(panel, look, [cell["clients"] for cell in own], medians.tolist(), slow.tolist(), fast.tolist())
        set_ticks(panel, [cell["clients"] for cell in timed])
        panel.set_yscale("log")
        short_ticks(panel, "y")
        panel.set_xlabel("clients at once")
        panel.set_ylabel("tokens per second")
        label_lines(panel)


REPORT = Report(tables, plot)
