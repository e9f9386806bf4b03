#!/usr/bin/env python3
"""Where a step's time goes: its kernels and layers by time, beside what its FLOPs and, in decoding, its bytes alone would take.

    profile_step.py FOLDER [--mode decode] [--contender transxssm-compiled] [--preset 1.3b] [--length 4K] [--batch 1] …

Contenders and modes are those of `transxssm benchmark`; a step of decoding is `DECODE_TOKENS` tokens, and its figures are those of
one. On a GPU kernels are listed, on a CPU operators. Written: profile.json and profile.md.
"""

import argparse
import contextlib
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import PreTrainedConfig

from transxssm.evaluation import ResultTable
from transxssm.inspection import cache_bytes
from transxssm.inspection.costs import step_flops
from transxssm.machine import run_metadata
from transxssm.models import read_device
from transxssm.models.baselines import count_baseline_parameters, language_model_on_meta
from transxssm_cli.one_line_errors import is_users, line_of
from transxssm_lab.benchmarking import CONTENDERS, MODES, ThroughputSettings, parse_length
from transxssm_lab.benchmarking.benchmark_run import SQUARE, measure_peak
from transxssm_lab.benchmarking.contenders import build_prompt, build_step
from transxssm_lab.benchmarking.steps import DECODE_TOKENS, Step, seconds_of, synchronize
from transxssm_lab.benchmarking.workers import Setup

COPIED_BYTES = {"cpu": 2**28, "cuda": 2**31}  # what a copy of which says how fast memory is
NUM_TURNS, NUM_LISTED = 5, 25
PART = "layers: "


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--contender", default="transxssm-compiled", help=", ".join(CONTENDERS))
    parser.add_argument("--mode", default="decode", choices=[mode for mode in MODES if mode != "optimizer"])
    parser.add_argument("--preset", default="1.3b")
    parser.add_argument("--length", default="4K", help="tokens of a sequence, such as 4K; of the prompt in decoding")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:1, …")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    options = parser.parse_args(arguments)
    try:
        result = measured(options)
    except Exception as error:
        if not is_users(error):
            raise
        parser.error(line_of(error))
    page = as_markdown(result)
    (options.folder / "profile.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (options.folder / "profile.md").write_text(page, encoding="utf-8")
    sys.stdout.write(page)
    return 0


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """What profile.json holds.

    Raises:
        ValueError: an option that is unknown or impossible, before anything is made.
        OSError: the folder can't be made.
    """
    length, device = parse_length(options.length), read_device(options.device)
    settings = ThroughputSettings(
        options.preset, (options.contender,), (options.mode,), (length,), options.batch, options.dtype
    )
    config = CONTENDERS[options.contender].config(settings.model_config())
    options.folder.mkdir(parents=True, exist_ok=True)
    return {
        "metadata": run_metadata(device, None),
        "settings": {name: str(value) for name, value in vars(options).items()},
        **profile_step(config, settings, device),
    }


def profile_step(config: PreTrainedConfig, settings: ThroughputSettings, device: torch.device) -> dict[str, Any]:
    """Milliseconds of a step (of a token in decoding) by the clock; its kernels and layers under the profiler; its floors."""
    (contender,), (mode,), (length,) = settings.contenders, settings.modes, settings.lengths
    batch, dtype = settings.batch, settings.torch_dtype
    is_decoding = mode == "decode"
    per_step = DECODE_TOKENS if is_decoding else 1
    if is_decoding:
        room = (NUM_TURNS + 3) * DECODE_TOKENS
        prompt = build_prompt(contender, config, length, 1, dtype, room, device=device)
        step = prompt.repeated(batch).step()
        del prompt
    else:
        step = build_step(contender, config, mode, length, batch, dtype, device=device)
    with ranges_around_layers(config):
        for _ in range(2):  # one to compile, one for what follows the first
            seconds_of(step, device)
        seconds = [seconds_of(step, device) / per_step for _ in range(NUM_TURNS)]
        kernels, parts = under_profiler(step, device)
    busy = sum(kernel["milliseconds"] for kernel in kernels) / per_step
    median = statistics.median(seconds)
    result: dict[str, Any] = {
        "milliseconds": {"median": 1e3 * median, "min": 1e3 * min(seconds), "max": 1e3 * max(seconds)},
        "kernel_milliseconds": busy,
        "floors": floors(config, mode, length, batch, dtype, device),
        "layers": [
            {"layer": name, "milliseconds": milliseconds / per_step} for name, milliseconds in sorted(parts.items())
        ],
        "kernels": [
            kernel | {"milliseconds": kernel["milliseconds"] / per_step, "calls": kernel["calls"] / per_step}
            for kernel in kernels
        ],
    }
    for floor in result["floors"]:
        floor["achieved"] = floor["amount"] / median
    return result


def under_profiler(step: Step, device: torch.device) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Of one run: kernels (a CPU's operators) with calls and milliseconds, longest first; milliseconds of the layers by kind."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
    with profile(activities=activities) as profiler:
        step.run()
        synchronize(device)
    step.clean()
    calls: dict[str, int] = defaultdict(int)
    milliseconds: dict[str, float] = defaultdict(float)
    parts: dict[str, float] = defaultdict(float)
    for event in profiler.events():
        if event.name.startswith(PART):  # a range shows up on the GPU too, where its time is no kernel's
            if event.device_type == DeviceType.CPU:
                time_us = event.device_time_total if on_gpu else event.cpu_time_total
                parts[event.name.removeprefix(PART)] += time_us / 1e3
        elif on_gpu == (event.device_type == DeviceType.CUDA):
            calls[event.name] += 1
            milliseconds[event.name] += (event.device_time_total if on_gpu else event.self_cpu_time_total) / 1e3
    names = sorted(milliseconds, key=lambda name: -milliseconds[name])
    return [{"kernel": n, "calls": calls[n], "milliseconds": milliseconds[n]} for n in names], dict(parts)


@contextlib.contextmanager
def ranges_around_layers(config: PreTrainedConfig) -> Iterator[None]:
    """Names the calls of decoder layers for the profiler, outside of what is compiled."""
    layers = list(language_model_on_meta(config).base_model.layers)
    originals = {kind: kind.__dict__.get("__call__") for kind in {type(layer) for layer in layers}}

    def ranged(kind: type[nn.Module]) -> Any:
        call = kind.__call__

        def named(layer: nn.Module, *arguments: Any, **keywords: Any) -> Any:
            with record_function(PART + kind_of(layer)):
                return call(layer, *arguments, **keywords)

        return named

    for kind in originals:
        kind.__call__ = ranged(kind)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for kind, original in originals.items():
            if original is None:
                del kind.__call__
            else:
                kind.__call__ = original


def kind_of(layer: nn.Module) -> str:
    if hasattr(layer, "is_ssd"):
        return "SSD" if layer.is_ssd else "attention"
    return str(getattr(layer, "layer_type", type(layer).__name__))


def floors(
    config: PreTrainedConfig, mode: str, length: int, batch: int, dtype: torch.dtype, device: torch.device
) -> list[dict[str, Any]]:
    """What has to be computed and, in decoding, moved for a step (a token), with the rate of this device and the time that it takes."""
    side = SQUARE.get(device.type, SQUARE["cuda"])
    setup = Setup(device=device, num_threads=None)
    peak = measure_peak(lambda *_: None, setup, [(side, side, side)], dtype)["flops_per_second"]
    amounts = [("FLOPs", step_flops(config, mode, length, batch).total, peak)]
    if mode == "decode":
        cache = cache_bytes(config, length, dtype)
        weights = count_baseline_parameters(config) * dtype.itemsize
        moved = weights + batch * (cache.kv + 2 * cache.state)
        amounts.append(("bytes", moved, copied_bytes_per_second(device)))
    return [
        {"of": what, "amount": amount, "per_second": rate, "milliseconds": 1e3 * amount / rate}
        for what, amount, rate in amounts
    ]


def copied_bytes_per_second(device: torch.device) -> float:
    """Bytes read and written by the fastest of some copies of a large tensor."""
    source = torch.zeros(COPIED_BYTES.get(device.type, COPIED_BYTES["cuda"]), dtype=torch.uint8, device=device)
    target, best = torch.empty_like(source), float("inf")
    for _ in range(10):
        synchronize(device)
        started = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * source.numel() / best


def as_markdown(result: dict[str, Any]) -> str:
    settings, spread, busy = result["settings"], result["milliseconds"], result["kernel_milliseconds"]
    unit = "token" if settings["mode"] == "decode" else "step"
    tables = {
        "Floors": ResultTable(
            ("of", "amount", "rate a second", "ms", "achieved a second", "times the floor"),
            [
                (
                    row["of"],
                    *(f"{row[name]:.3g}" for name in ("amount", "per_second", "milliseconds", "achieved")),
                    f"{spread['median'] / row['milliseconds']:.1f}",
                )
                for row in result["floors"]
            ],
        ),
        "Layers, forward": ResultTable(
            ("layers", "ms"), [(row["layer"], f"{row['milliseconds']:.3f}") for row in result["layers"]]
        ),
        "Kernels": ResultTable(
            ("kernel", "calls", "ms", "share"),
            [
                (
                    row["kernel"][:120].replace("|", "\\|"),
                    f"{row['calls']:g}",
                    f"{row['milliseconds']:.3f}",
                    f"{row['milliseconds'] / busy:.1%}",
                )
                for row in result["kernels"][:NUM_LISTED]
            ],
        ),
        "Where": ResultTable(("", ""), [(name, str(value)) for name, value in result["metadata"].items()]),
    }
    title = ("contender", "mode", "preset", "length", "batch", "dtype")
    words = [
        f"# {', '.join(settings[name] for name in title)}",
        f"{spread['median']:.2f} ms a {unit} ({spread['min']:.2f} to {spread['max']:.2f} in {NUM_TURNS} turns) by the clock; "
        f"{busy:.2f} ms in all kernels, under the profiler. In decoding the length is the prompt's.",
    ]
    return (
        "\n\n".join([*words, *(f"## {name}\n\n{table.to_markdown()}".rstrip() for name, table in tables.items())])
        + "\n"
    )


if __name__ == "__main__":
    sys.exit(main())
