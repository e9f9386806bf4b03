"""Single operators against what could stand in their place, at the shapes of a model's layers.

The scan against causal attention of the same width, its own quadratic form and transformers' Mamba-2 scan; the loss without
logits against the loss with them; norm, gate and linear layer against torch's.

Letters: b batch, t time, h heads, g groups, p head_dim, n state size, d head_dim of attention, f width of the feed-forward
network.
"""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from transxssm.inspection import attention_flops, mean_keys, scan_flops
from transxssm.inspection.costs import TRAINING_PER_FORWARD
from transxssm.models import TransXSSMConfig
from transxssm.models.baselines import MAMBA2_CHUNK_SIZE
from transxssm.ops import (
    linear,
    linear_cross_entropy,
    rms_norm,
    rotary_cos_sin,
    rotary_frequencies,
    ssd_chunk_scan,
    swiglu,
)
from transxssm.ops.ssd import DEFAULT_CHUNK_SIZE, ssd_dual_form
from transxssm_lab.benchmarking.benchmark_run import BenchmarkRun, Budget
from transxssm_lab.benchmarking.comparison import Group, Notify
from transxssm_lab.benchmarking.contenders import SEED
from transxssm_lab.benchmarking.steps import Entry, Step
from transxssm_lab.benchmarking.workers import Setup

NAME = "ops"
REFERENCES = {
    "mixer": "scan",
    "loss": "linear-cross-entropy",
    "norm": "rms-norm",
    "gate": "swiglu",
    "linear": "linear",
}
# The alternatives to each reference other than the scan.
RIVALS = {
    "linear-cross-entropy": "full-logits",
    "rms-norm": "torch-rms-norm",
    "swiglu": "torch-swiglu",
    "linear": "torch-linear",
}
CHUNK_SIZES = (32, 64, 128, 256)
DIRECTIONS = ("forward", "forward+backward")
LONGEST_DUAL_FORM = 2048  # it forms t × t scores for every head
COMPILED_SCAN = "scan-compiled"
_MAMBA2 = "transformers.models.mamba2.modeling_mamba2"
# The kernel of mamba_ssm where it is installed, else a reference in PyTorch.
_MAMBA2_SCAN = "mamba2_chunk_scan"  # left out if the version of transformers has no such function


@dataclass(frozen=True)
class OpsSettings:
    """The settings of the benchmark.

    Args:
        preset: a preset of `TransXSSMConfig`, from whose layers the operators take their shapes.
        lengths: tokens in a sequence, each ≥ 1.
        batch: number of sequences.
        dtype: dtype of the operands: "float32", "bfloat16" or "float16".

    Raises:
        ValueError: less than one token or sequence.
    """

    preset: str = "small"
    lengths: tuple[int, ...] = (1024, 4096)
    batch: int = 1
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ValueError(f"batch must be at least 1 sequence: got {self.batch}")
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError(f"lengths must be 1 token or more: got {list(self.lengths)}")

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def model_config(self) -> TransXSSMConfig:
        """The configuration from which the shapes are taken."""
        return TransXSSMConfig.from_preset(self.preset)


def run_ops(
    settings: OpsSettings, folder: Path, *, setup: Setup, budget: Budget, notify: Notify = lambda what, done: None
) -> dict[str, Any]:
    """Measures, writes ops.json (after every group), .md and .png into the folder, and returns the results.

    Raises:
        ValueError: the folder holds other results.
        KeyboardInterrupt: after what was measured has been written.
    """
    config = settings.model_config()
    run = BenchmarkRun(NAME, folder, asdict(settings), setup=setup, budget=budget, notify=notify)
    status = "interrupted"
    try:
        run.measure_peak(config, settings.batch * max(settings.lengths), settings.torch_dtype)
        run.measure(plan(settings, config, setup.device))
        status = "complete"
    finally:
        run.finish(status)
    return run.results


def plan(settings: OpsSettings, config: TransXSSMConfig, device: torch.device) -> list[Group]:
    """The groups, from the shortest length on. Each operator has one for its forward pass and one with its backward pass."""
    groups = []
    for length in sorted(set(settings.lengths)):
        for operator in REFERENCES:
            for direction in DIRECTIONS:
                factor = 1 if direction == "forward" else TRAINING_PER_FORWARD
                entries = tuple(
                    Entry(
                        variant,
                        build_step,
                        (variant, direction, config, length, settings.batch, settings.torch_dtype),
                        num_tokens=settings.batch * length,
                        flops=factor * settings.batch * length * _flops_per_token(variant, config, length, device)
                        or None,
                    )
                    for variant in variants(operator, length, device)
                )
                groups.append(Group(f"{operator}, {direction}", length, entries, REFERENCES[operator]))
    return groups


def variants(operator: str, length: int, device: torch.device) -> list[str]:
    """Names of what is compared. The quadratic form is compared only up to `LONGEST_DUAL_FORM` tokens.

    The compiled scan is compared only where the compiler traces into it. On a CPU the scan is an opaque operator.
    """
    if (reference := REFERENCES[operator]) in RIVALS:
        return [reference, RIVALS[reference]]
    names = ["scan", *(f"scan-{size}" for size in CHUNK_SIZES), "sdpa"]
    if device.type != "cpu":
        names.insert(1, COMPILED_SCAN)
    if length <= LONGEST_DUAL_FORM:
        names.append("dual-form")
    if hasattr(importlib.import_module(_MAMBA2), _MAMBA2_SCAN):
        names.append("mamba2-scan")
    return names


def build_step(
    variant: str,
    direction: str,
    config: TransXSSMConfig,
    length: int,
    batch: int,
    dtype: torch.dtype,
    *,
    device: torch.device,
) -> Step:
    """Builds an operator with random operands, ready to be timed. The backward pass forms the gradients of all operands."""
    torch.manual_seed(SEED)
    if variant == "sdpa":
        call, operands = _attention(config, length, batch, dtype, device)
    elif variant in ("linear-cross-entropy", "full-logits"):
        call, operands = _loss(variant, config, length, batch, dtype, device)
    elif variant in ELEMENTWISE_AND_LINEAR:
        call, operands = _layer_part(variant, config, length, batch, dtype, device)
    else:
        call, operands = _scan(variant, config, length, batch, dtype, device)
    if direction == "forward":
        return Step(torch.no_grad()(lambda: call(*operands)))
    for operand in operands:
        operand.requires_grad_()
    with torch.no_grad():
        grad_output = torch.randn_like(call(*operands))

    def clean() -> None:
        for operand in operands:
            operand.grad = None

    return Step(lambda: call(*operands).backward(grad_output), clean)


_Call = Callable[..., Tensor]


def _scan(
    variant: str, config: TransXSSMConfig, length: int, batch: int, dtype: torch.dtype, device: torch.device
) -> tuple[_Call, list[Tensor]]:
    """A scan that rotates as in the model, except for transformers' scan, which has no rotation."""
    h, g, p, n = config.ssd_num_heads, config.ssd_num_groups, config.ssd_head_dim, config.ssd_state_size
    x = torch.randn(batch, length, h, p, device=device).to(dtype)
    B, C = (torch.randn(batch, length, g, n, device=device).to(dtype) for _ in range(2))
    dt = torch.rand(batch, length, h, device=device) * config.ssd_dt_max
    A = -torch.empty(h, device=device).uniform_(config.ssd_A_min, config.ssd_A_max)
    if variant == "mamba2-scan":
        mamba2_scan = getattr(importlib.import_module(_MAMBA2), _MAMBA2_SCAN)
        return lambda x, dt, A, B, C: mamba2_scan(x, dt, A, B, C, MAMBA2_CHUNK_SIZE), [x, dt, A, B, C]
    rotary = rotary_cos_sin(torch.arange(length, device=device)[None], rotary_frequencies(n).to(device))
    if variant == "dual-form":
        return lambda *operands: ssd_dual_form(*operands, rotary=rotary)[0], [x, dt, A, B, C]
    chunk_size = _chunk_size(variant, config)
    scan = torch.compile(ssd_chunk_scan, fullgraph=True) if variant == COMPILED_SCAN else ssd_chunk_scan
    return lambda *operands: scan(*operands, rotary=rotary, chunk_size=chunk_size)[0], [x, dt, A, B, C]


def _attention(
    config: TransXSSMConfig, length: int, batch: int, dtype: torch.dtype, device: torch.device
) -> tuple[_Call, list[Tensor]]:
    """Attention with the number and width of heads of the model's attention layers."""
    shape = (batch, config.num_attention_heads, length, config.head_dim)  # (b, h, t, d)
    q, k, v = (torch.randn(shape, device=device).to(dtype) for _ in range(3))
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), [q, k, v]


def _loss(
    variant: str, config: TransXSSMConfig, length: int, batch: int, dtype: torch.dtype, device: torch.device
) -> tuple[_Call, list[Tensor]]:
    """The language-model head and its loss. Where logits are formed, they are upcast to float32, as in transformers' models."""
    hidden = torch.randn(batch * length, config.hidden_size, device=device).to(dtype)
    weight = (config.initializer_range * torch.randn(config.vocab_size, config.hidden_size, device=device)).to(dtype)
    labels = torch.randint(config.vocab_size, (batch * length,), device=device)
    if variant == "linear-cross-entropy":
        return lambda hidden, weight: linear_cross_entropy(hidden, weight, labels), [hidden, weight]
    return lambda hidden, weight: F.cross_entropy((hidden @ weight.T).float(), labels), [hidden, weight]


ELEMENTWISE_AND_LINEAR: dict[str, _Call] = {
    "rms-norm": lambda x, weight: rms_norm(x, weight, 1e-6),
    "torch-rms-norm": lambda x, weight: F.rms_norm(x, weight.shape, weight, 1e-6),
    "swiglu": swiglu,
    "torch-swiglu": lambda gate, up: F.silu(gate) * up,
    "linear": linear,
    "torch-linear": F.linear,
}


def _layer_part(
    variant: str, config: TransXSSMConfig, length: int, batch: int, dtype: torch.dtype, device: torch.device
) -> tuple[_Call, list[Tensor]]:
    """A norm over the hidden size, the gate of the feed-forward network, or its first linear layer."""
    hidden, wide = config.hidden_size, config.intermediate_size
    shapes: dict[str, list[tuple[int, ...]]] = {
        "norm": [(batch, length, hidden), (hidden,)],
        "swiglu": [(batch, length, wide)] * 2,
        "linear": [(batch, length, hidden), (wide, hidden)],
    }
    operands = [torch.randn(shape, device=device).to(dtype) for shape in shapes[variant.rsplit("-", 1)[-1]]]
    return ELEMENTWISE_AND_LINEAR[variant], operands


def _flops_per_token(variant: str, config: TransXSSMConfig, length: int, device: torch.device) -> float:
    """FLOPs of a forward pass's matrix products, per token. Only the causal half of the quadratic form and of attention counts."""
    h, g, p, n = config.ssd_num_heads, config.ssd_num_groups, config.ssd_head_dim, config.ssd_state_size
    if variant == "sdpa":
        return attention_flops(config.num_attention_heads, config.head_dim, mean_keys(length))
    if variant in ("linear-cross-entropy", "full-logits"):
        return 2 * config.hidden_size * config.vocab_size
    if variant in ("linear", "torch-linear"):
        return 2 * config.hidden_size * config.intermediate_size
    if variant in ELEMENTWISE_AND_LINEAR:
        return 0
    if variant == "dual-form":
        return mean_keys(length) * (2 * g * n + 2 * h * p)
    default = DEFAULT_CHUNK_SIZE.get(device.type, DEFAULT_CHUNK_SIZE["cuda"])
    chunk_size = MAMBA2_CHUNK_SIZE if variant == "mamba2-scan" else _chunk_size(variant, config) or default
    return scan_flops(chunk_size=min(chunk_size, length), num_heads=h, num_groups=g, head_dim=p, state_size=n)


def _chunk_size(variant: str, config: TransXSSMConfig) -> int | None:
    """The chunk size of a variant: 64 for "scan-64", and the model's own for "scan" and "scan-compiled"."""
    return config.ssd_chunk_size if variant in ("scan", COMPILED_SCAN) else int(variant.removeprefix("scan-"))


def num_parts(settings: OpsSettings, device: torch.device) -> int:
    """Number of steps of progress of a whole benchmark."""
    lengths: Sequence[int] = sorted(set(settings.lengths))
    return 1 + sum(
        len(DIRECTIONS) * (len(variants(operator, length, device)) + 1) for length in lengths for operator in REFERENCES
    )
