"""The machine's peak: the fastest matrix product that torch does here in a dtype, which every FLOP floor is measured against."""

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from transxssm.models.baselines import language_model_on_meta
from transxssm_lab.benchmarking.processes import Send
from transxssm_lab.benchmarking.steps import Step, seconds_of
from transxssm_lab.benchmarking.workers import Setup

Shape = tuple[int, int, int]  # rows, inner width, columns
SQUARE = {"cpu": 2048, "cuda": 8192}
SECONDS_PER_SHAPE = 0.5
_LEAST_PRODUCTS, _MOST_PRODUCTS = 3, 50  # of each shape, whatever time they take


def product_shapes(config: PreTrainedConfig, num_tokens: int, device: torch.device) -> list[Shape]:
    """The products of a model's linear layers over `num_tokens` tokens, each once, and a large square one."""
    model = language_model_on_meta(config)
    layers = {(m.in_features, m.out_features) for m in model.modules() if isinstance(m, nn.Linear)}
    side = SQUARE.get(device.type, SQUARE["cuda"])
    return [(side, side, side), *((num_tokens, *sizes) for sizes in sorted(layers))]


def measure_peak(send: Send, setup: Setup, shapes: Sequence[Shape], dtype: torch.dtype) -> dict[str, Any]:
    """In a child process: FLOPs per second of the fastest repetition of each product, and the best of them."""
    setup.apply()
    rates, products = [], []
    for rows, inner, columns in shapes:
        left = torch.randn(rows, inner, device=setup.device).to(dtype)
        right = torch.randn(columns, inner, device=setup.device).to(dtype).T  # as a linear layer holds its weight
        out = torch.empty(rows, columns, device=setup.device, dtype=dtype)
        step = Step(lambda left=left, right=right, out=out: torch.matmul(left, right, out=out))  # type: ignore[misc]
        seconds_of(step, setup.device)
        best, count, ends = float("inf"), 0, time.monotonic() + SECONDS_PER_SHAPE
        while count < _LEAST_PRODUCTS or (count < _MOST_PRODUCTS and time.monotonic() < ends):
            best, count = min(best, seconds_of(step, setup.device)), count + 1
        rates.append(2 * rows * inner * columns / best)
        products.append({"shape": [rows, inner, columns], "flops_per_second": rates[-1]})
    return {"flops_per_second": max(rates), "products": products}
