"""Decoding over the batch: how many tokens a second whole models give, up to the largest batch that fits."""

import functools
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from transxssm.models import TransXSSMConfig
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
from transxssm_lab.benchmarking.decode_report import OVER_BATCH, summarize
from transxssm_lab.benchmarking.decoding import DECODE_TOKENS
from transxssm_lab.benchmarking.workers import Setup

NAME = "decode"
MODE = "decode"  # that a contender must be measurable in
DEFAULT_CONTENDERS = ("transxssm", "llama", "llama-static", "mamba2", "jamba")


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
