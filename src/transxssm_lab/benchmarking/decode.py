"""Decoding over the batch: how many tokens a second whole models give, up to the largest batch that fits; in tables and a picture."""

import functools
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from transxssm.models import TransXSSMConfig
from transxssm.plotting import picture
from transxssm_lab.benchmarking.batch_search import BatchSearch
from transxssm_lab.benchmarking.benchmark_run import BenchmarkRun, Budget
from transxssm_lab.benchmarking.comparison import Notify
from transxssm_lab.benchmarking.contenders import (
    CONTENDERS,
    REFERENCE,
    build_prompt,
    check_contenders,
    describe_contenders,
)
from transxssm_lab.benchmarking.report import Report, Table, draw_rates, megabytes
from transxssm_lab.benchmarking.steps import DECODE_TOKENS
from transxssm_lab.benchmarking.workers import Setup

NAME = "decode"
MODE = "decode"  # that a contender must be measurable in
DEFAULT_CONTENDERS = ("transxssm", "llama", "llama-static", "mamba2", "jamba")

HEADERS = ("contender", "batch", "ms a step", "min–max", "tokens/s", "cache MB a sequence", "peak MB")


@dataclass(frozen=True)
class DecodeSettings:
    """What to measure.

    Args:
        preset: of `TransXSSMConfig`; every contender is matched to it.
        contenders: names in `CONTENDERS`.
        length: tokens of the prompt.
        batches: sequences at once; kept sorted, each once.
        dtype: "float32", "bfloat16" or "float16": of weights.

    Raises:
        ValueError: anything unknown, or nothing that could be measured.
    """

    preset: str = "small"
    contenders: tuple[str, ...] = DEFAULT_CONTENDERS
    length: int = 1024
    batches: tuple[int, ...] = (1, 2, 4, 8)
    dtype: str = "float32"

    def __post_init__(self) -> None:
        check_contenders(self.contenders, (MODE,))
        if self.length < 1:
            raise ValueError(f"length must be 1 token or more: got {self.length}")
        if not self.batches or min(self.batches) < 1:
            raise ValueError(f"batches must be 1 sequence or more: got {list(self.batches)}")
        object.__setattr__(self, "batches", tuple(sorted(set(self.batches))))

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def model_config(self) -> TransXSSMConfig:
        """The configuration that all contenders are matched to."""
        return TransXSSMConfig.from_preset(self.preset)


def parse_batch(text: str) -> int:
    """Sequences of "64".

    Raises:
        ValueError: no such number, or less than one sequence.
    """
    if not text.strip().isdecimal() or int(text) < 1:
        raise ValueError(f"a batch is a number of sequences ≥ 1, such as 64: got {text!r}")
    return int(text)


def num_parts(settings: DecodeSettings) -> int:
    """Steps of progress of a whole benchmark: the batches of each contender, and one between two of them."""
    return len(settings.contenders) * (len(settings.batches) + 1)


def run_decode(
    settings: DecodeSettings,
    folder: Path,
    *,
    setup: Setup,
    budget: Budget,
    notify: Notify = lambda what, done: None,
) -> dict[str, Any]:
    """Measures, writes decode.json (after every batch), .md and .png into the folder, and returns the results.

    What memory or time does not allow is recorded, not raised. The same call goes on where an earlier one was stopped.

    Raises:
        ValueError: the folder holds other results; a contender cannot be matched.
        KeyboardInterrupt: after what was measured has been written.
    """
    config = settings.model_config()
    configs = {name: CONTENDERS[name].config(config) for name in settings.contenders}
    run = BenchmarkRun(NAME, folder, asdict(settings), setup=setup, budget=budget, notify=notify, report=OVER_BATCH)
    run.results["contenders"] = describe_contenders(configs, config)
    run.results["reference"] = REFERENCE if REFERENCE in configs else settings.contenders[0]
    num_new_tokens = (1 + budget.repeats) * DECODE_TOKENS  # a static cache gets room for warm-up and runs, no more
    searches = []
    for index, (name, model_config) in enumerate(configs.items()):
        build = functools.partial(
            build_prompt, name, model_config, settings.length, 1, settings.torch_dtype, num_new_tokens
        )
        num_before = index * (len(settings.batches) + 1)
        searches.append(BatchSearch(run, name, settings.batches, build, notify, num_before))
    status = "interrupted"
    try:
        for index, search in enumerate(searches):
            num_left = sum(not other.is_done for other in searches[index:])
            search.run(share=1 / max(num_left, 1))
        status = "complete"
    finally:
        run.results["summary"] = summarize(run.results)
        run.finish(status)
    return run.results


def summarize(results: dict[str, Any]) -> dict[str, Any]:
    """By contender with a measured batch: its largest, its fastest, the first that did not fit, and how the reference compares.

    `reference_over_this` is the reference's most tokens per second, at whatever batch it has them, over the contender's.
    """
    best_of = {}
    for name in results["contenders"]:
        fits = _cells(results, name, "ok")
        if fits:
            best_of[name] = max(fits, key=lambda cell: cell["tokens_per_second"])
    reference = best_of.get(results["reference"])
    summary = {}
    for name, best in best_of.items():
        largest = max(_cells(results, name, "ok"), key=lambda cell: cell["batch"])
        too_large = [cell["batch"] for cell in _cells(results, name, "out of memory")]
        summary[name] = {
            "largest_batch": largest["batch"],
            "out_of_memory_batch": min(too_large, default=None),
            "largest_batch_tokens_per_second": largest["tokens_per_second"],
            "best_batch": best["batch"],
            "best_tokens_per_second": best["tokens_per_second"],
            "reference_over_this": reference and reference["tokens_per_second"] / best["tokens_per_second"],
        }
    return summary


def tables(results: dict[str, Any]) -> list[Table]:
    """All batches, and the summary."""
    ratio = f"{results['reference']} ÷ this"
    headers = ("contender", "largest batch", "does not fit", "tokens/s there", "most tokens/s", "at batch", ratio)
    summary_rows = [
        {
            "contender": name,
            "largest batch": str(of["largest_batch"]),
            "does not fit": str(of["out_of_memory_batch"] or "–"),
            "tokens/s there": f"{of['largest_batch_tokens_per_second']:,.0f}",
            "most tokens/s": f"{of['best_tokens_per_second']:,.0f}",
            "at batch": str(of["best_batch"]),
            ratio: f"{of['reference_over_this']:.2f}" if of["reference_over_this"] else "–",
        }
        for name, of in results["summary"].items()
    ]
    return [
        Table("decode", HEADERS, list(rows(results))),
        Table("largest batch", headers, summary_rows),
    ]


def rows(results: dict[str, Any]) -> Iterator[dict[str, str]]:
    """For each cell what stands under each of `HEADERS`; where nothing was timed, why."""
    for cell in results["cells"]:
        row = dict.fromkeys(HEADERS, "–") | {"contender": cell["contender"], "batch": str(cell["batch"])}
        if cell["status"] != "ok":
            yield row | {"ms a step": cell["status"], "min–max": cell["detail"]}
            continue
        ms = {name: f"{value:,.1f}" for name, value in cell["milliseconds_per_step"].items()}
        yield row | {
            "ms a step": ms["median"],
            "min–max": f"{ms['min']}–{ms['max']}",
            "tokens/s": f"{cell['tokens_per_second']:,.0f}",
            "cache MB a sequence": f"{cell['cache_bytes_per_sequence'] / 1e6:,.2f}",
            "peak MB": megabytes(cell["peak_bytes"]),
        }


def plot(path: Path, results: dict[str, Any]) -> None:
    """Tokens per second over the batch on a logarithmic plane, a line for each contender."""
    with picture(path) as panel:
        draw_rates(panel, [cell for cell in results["cells"] if cell["tokens_per_second"]], "batch")
        panel.set_title(f"Decoding after {results['settings']['length']:,} tokens")
        panel.set_xlabel("batch (sequences)")


OVER_BATCH = Report(tables, plot)


def _cells(results: dict[str, Any], contender: str, status: str) -> list[dict[str, Any]]:
    return [cell for cell in results["cells"] if (cell["contender"], cell["status"]) == (contender, status)]
