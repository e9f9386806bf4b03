"""Estimates a run on many GPUs from measured rates: memory of a GPU by kind, seconds of a step, and days.

A step is computed at the rate at which the model of 1.3B parameters trains on one GPU, and communicates over links at rates that are
assumed (`Links`); or at rates that are measured where the run will be. Communication counts in full: it goes on beside computing, but by
measurement on two GPUs slows it by as much.
"""

from dataclasses import dataclass
from typing import NamedTuple

from transxssm.inspection.costs import TRAINING_PER_FORWARD, count_parameters, flops_per_token
from transxssm.models import TransXSSMConfig

FLOAT32, BFLOAT16 = 4, 2  # bytes
# results/gpu/throughput.json, kernels-train-4k-batch-4: 63,371 tokens per second of 1.3b, compiled, rows of 4096 tokens, on an H100.
MEASURED_RATE = 520e12  # FLOPs of `flops_per_token` per second, forward and backward
# Memory bandwidth of the data sheet, and the share of it that AdamW reaches.
HBM_BYTES_PER_SECOND = 3.35e12 * 0.8
ADAMW_BYTES = 7 * FLOAT32  # per parameter: weight and two moments are read and written, and the gradient is read
# Numbers that a layer saves for each token for the backward pass, fitted to that measurement: 35.6 bytes for each of 24 × 2048.
KEPT_HIDDEN, KEPT_INTERMEDIATE = 10, 3  # times hidden_size and intermediate_size
# CUDA's context, NCCL's buffers, what the allocator cannot use.
RESERVED_BYTES = 3e9
GPU_BYTES = {"h100": 85.0e9, "h200": 150.0e9}
GPUS_OF_A_MACHINE = 8


@dataclass(frozen=True)
class Links:
    """Bytes per second that a GPU sends to others: the rates that NCCL reaches on NVLink (450 GB/s) and a 400 Gb/s adapter for each GPU."""

    inside: float = 300e9
    between: float = 40e9

    def of(self, gpus: int) -> float:
        """The rate of a collective over so many GPUs, which is that of its slowest link."""
        return self.inside if gpus <= GPUS_OF_A_MACHINE else self.between


class MemoryPlan(NamedTuple):
    """Bytes of a GPU at a step's peak, between the forward and the backward pass."""

    weights: float  # float32
    optimizer: float  # AdamW's moments
    gathered: float  # weights gathered from other GPUs, for the time of a layer or a step
    activations: float  # or the gradients, which replace them, and those of a layer
    reserved: float = RESERVED_BYTES

    @property
    def total(self) -> float:
        return sum(self)


@dataclass(frozen=True)
class TrainingPlan:
    """A run with one of the parallelisms of `training.parallelism`.

    Args:
        data: "ddp", "fsdp" or "hsdp".
        is_checkpointing: whether layers are recomputed in the backward pass.
        fits: whether a GPU has enough memory.
        step_seconds: time of a step, of which `communication_seconds` are communication.
    """

    data: str
    is_checkpointing: bool
    memory: MemoryPlan
    fits: bool
    step_seconds: float
    communication_seconds: float
    tokens_per_second: float
    days: float
    gpu_hours: float


def plan_training(
    config: TransXSSMConfig,
    *,
    gpus: int,
    num_tokens: float,
    length: int,
    rows: int,
    cp: int = 1,
    gpu: str = "h100",
    links: Links | None = None,
    rate: float = MEASURED_RATE,
) -> list[TrainingPlan]:
    """Plans of all ways to train, beginning with the fastest that fits.

    Args:
        gpus: number of all GPUs, `GPUS_OF_A_MACHINE` in each machine.
        num_tokens: tokens of the run.
        length: tokens in a row.
        rows: rows in a step of each GPU, or of the `cp` GPUs that share a row.
        cp: GPUs that share each row.
        gpu: "h100" or "h200".
        links: rates of the links between GPUs. Defaults to assumed rates.
        rate: FLOPs of `flops_per_token` per second, forward and backward. Defaults to the rate measured on an H100.

    Raises:
        ValueError: a number is below 1, cp does not divide the number of GPUs or of tokens in a row, or the GPU is unknown.
    """
    for name, number in {"gpus": gpus, "tokens": num_tokens, "length": length, "rows": rows, "cp": cp}.items():
        if number < 1:
            raise ValueError(f"{name}: got {number}, expected 1 or more")
    if gpus % cp or length % cp:
        raise ValueError(f"cp={cp} must divide the GPUs and the tokens of a row: got {gpus} and {length}")
    if gpu not in GPU_BYTES:
        raise ValueError(f"gpu: got {gpu!r}, expected one of {', '.join(GPU_BYTES)}")
    ways = ["ddp"]
    if gpus > 1:
        ways.append("fsdp")
    if gpus > GPUS_OF_A_MACHINE and gpus % GPUS_OF_A_MACHINE == 0:
        ways.append("hsdp")
    plans = [
        _plan(config, way, is_checkpointing, gpus, num_tokens, length, rows, cp, gpu, links or Links(), rate)
        for way in ways
        for is_checkpointing in (False, True)
    ]
    return sorted(plans, key=lambda plan: (not plan.fits, plan.step_seconds))


def _plan(
    config: TransXSSMConfig,
    data: str,
    is_checkpointing: bool,
    gpus: int,
    num_tokens: float,
    length: int,
    rows: int,
    cp: int,
    gpu: str,
    links: Links,
    rate: float,
) -> TrainingPlan:
    shards = {"ddp": 1, "fsdp": gpus, "hsdp": min(gpus, GPUS_OF_A_MACHINE)}[data]
    local_tokens = rows * length / cp
    memory = memory_plan(config, local_tokens, shards=shards, is_checkpointing=is_checkpointing)
    parameters = sum(count_parameters(config).values())
    passes = TRAINING_PER_FORWARD + is_checkpointing
    compute = passes * flops_per_token(config, length).total * local_tokens / rate
    optimizer = ADAMW_BYTES * parameters / shards / HBM_BYTES_PER_SECOND
    communication = _communication_seconds(FLOAT32 * parameters, data, gpus, shards, links)
    step = compute + optimizer + communication
    speed = gpus * local_tokens / step
    seconds = num_tokens / speed
    return TrainingPlan(
        data=data,
        is_checkpointing=is_checkpointing,
        memory=memory,
        fits=memory.total <= GPU_BYTES[gpu],
        step_seconds=step,
        communication_seconds=communication,
        tokens_per_second=speed,
        days=seconds / 86400,
        gpu_hours=gpus * seconds / 3600,
    )


def memory_plan(
    config: TransXSSMConfig, tokens: float, *, shards: int, is_checkpointing: bool, weight_bytes: int = FLOAT32
) -> MemoryPlan:
    """A GPU's memory at the peak of a step of AdamW.

    Args:
        tokens: tokens that the GPU computes.
        shards: number of GPUs that share weights, gradients and the optimizer's state.
        weight_bytes: bytes of a parameter, and of its gradient.
    """
    counts = count_parameters(config)
    parameters = sum(counts.values())
    hidden, layers = config.hidden_size, config.num_hidden_layers
    kept = BFLOAT16 * (KEPT_HIDDEN * hidden + KEPT_INTERMEDIATE * config.intermediate_size)  # for each token in a layer
    # What a layer gets has the type of the weights, since the embeddings do.
    activations = tokens * (layers * weight_bytes * hidden + kept if is_checkpointing else layers * kept)
    gathered = 0.0
    if shards > 1:
        whole_step = counts["embeddings"] + counts["head"]  # with their gradient; and two layers, one on its way
        gathered = weight_bytes * (2 * whole_step + 2 * (parameters - whole_step) / layers)
    return MemoryPlan(
        weights=weight_bytes * parameters / shards,
        optimizer=2 * FLOAT32 * parameters / shards,
        gathered=gathered,
        activations=max(activations, weight_bytes * parameters / shards + tokens * kept),
    )


def _communication_seconds(weight_bytes: float, data: str, gpus: int, shards: int, links: Links) -> float:
    """Seconds of communication in a step. FSDP gathers all weights twice and reduce-scatters gradients, DDP all-reduces them, HSDP both."""
    seconds = 0.0
    if shards > 1:
        seconds += 3 * weight_bytes * (shards - 1) / shards / links.of(shards)
    replicas = gpus // shards
    if replicas > 1:
        seconds += 2 * weight_bytes / shards * (replicas - 1) / replicas / links.of(gpus)
    return seconds
