"""Measurements for `transxssm plan --measure`: how fast this machine's GPUs train a model's layers, and how fast they communicate."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from transxssm.inspection import TRAINING_PER_FORWARD, flops_per_token
from transxssm.models import TransXSSMConfig, TransXSSMForCausalLM
from transxssm.training.sharding import compile_layers

MEASURED_LAYERS = 8  # one module of seven SSD layers and one attention layer
REPEATS = 5
LINK_BYTES = 2**28  # bytes of each process, about those of a layer of 1.3b in float32


def measured_flops_per_second(
    config: TransXSSMConfig, *, length: int, rows: int, device: torch.device, repeats: int = REPEATS
) -> float:
    """FLOPs of `flops_per_token` per second, forward and backward in bfloat16, on rows of random tokens. On a GPU layers are compiled.

    Args:
        config: configuration of which the first layers are used.
        length: tokens in a row.
    """
    layers = min(config.num_hidden_layers, MEASURED_LAYERS)
    fields = config.to_dict() | {"num_hidden_layers": layers, "layer_types": config.layer_types[:layers]}
    short = TransXSSMConfig(**fields)
    with device:
        model = TransXSSMForCausalLM(short).train()
        ids = torch.randint(1, short.vocab_size, (rows, length))
    if device.type == "cuda":
        compile_layers(model)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(ids, labels=ids, skip_logits=True, use_cache=False).loss
        loss.backward()
        model.zero_grad(set_to_none=True)

    for _ in range(2):
        step()
    seconds = _seconds(step, device, repeats)
    return TRAINING_PER_FORWARD * flops_per_token(short, length).total * rows * length / seconds


def measured_link_bytes_per_second(processes: int, device_type: str, *, size: int = LINK_BYTES) -> float:
    """Bytes per second that each process sends to the next one in an all-gather.

    Args:
        processes: number of processes on this machine, one for each GPU. On the CPU they communicate through gloo.
        size: bytes that each process contributes.
    """
    with tempfile.TemporaryDirectory(prefix="transxssm-") as folder:
        spawn(_exchange, (processes, device_type, size, folder), nprocs=processes)
        return float(Path(folder, "rate").read_text(encoding="utf-8"))


def _exchange(rank: int, processes: int, device_type: str, size: int, folder: str) -> None:
    device = torch.device(device_type, rank) if device_type == "cuda" else torch.device(device_type)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/meeting", rank=rank, world_size=processes)
    own = torch.zeros(size, dtype=torch.uint8, device=device)
    everyone = torch.zeros(processes * size, dtype=torch.uint8, device=device)

    def gather() -> None:
        dist.all_gather_into_tensor(everyone, own)

    gather()
    seconds = _seconds(gather, device, REPEATS)
    if rank == 0:
        Path(folder, "rate").write_text(str((processes - 1) * size / seconds), encoding="utf-8")
    dist.destroy_process_group()


def _seconds(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Mean seconds of a call."""
    _wait(device)
    started = time.perf_counter()
    for _ in range(repeats):
        run()
    _wait(device)
    return (time.perf_counter() - started) / repeats


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
