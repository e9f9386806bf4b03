"""`transxssm kernels`: which implementation of each op a model takes on this machine."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from transxssm.machine import device_name
from transxssm.models import TransXSSMConfig, read_causal_lm_config
from transxssm.models.checkpoint import read_device, read_dtype
from transxssm.models.configuration_transxssm import SSD_LAYER_TYPE
from transxssm.ops import explain
from transxssm.ops.dispatch import Choice, cpp_shortfall, triton_shortfall
from transxssm.ops.explain import OPS
from transxssm_cli.tables import show, table_of

SITUATIONS = ("training", "prefill", "decoding")


def choices(config: TransXSSMConfig, dtype: torch.dtype, device: torch.device, length: int) -> dict[str, list[Choice]]:
    """The backend of each op of a model in every situation. Nothing is computed.

    Args:
        config: configuration of the model.
        dtype: dtype of weights and activations.
        device: a device of this machine.
        length: tokens in the row in training and prefill, and tokens in the cache in decoding.
    """
    result = {}
    for situation in SITUATIONS:
        is_training = situation == "training"
        with torch.set_grad_enabled(is_training):
            calls = _calls(config, dtype, device, length, needs_grad=is_training, is_decoding=situation == "decoding")
            result[situation] = [explain(name, *arguments, **options) for name, arguments, options in calls]
    return result


def show_kernels(model: str, folder: Path | None, *, dtype_name: str, device_name: str, length: int) -> None:
    """Prints the tables.

    Args:
        model: name of a preset or of the folder.
        folder: folder of a checkpoint of this package's model, or None for a preset.

    Raises:
        ValueError: the dtype is unknown, the machine has no such device, or the checkpoint is of another model.
    """
    dtype, device = read_dtype(dtype_name), read_device(device_name)
    config = TransXSSMConfig.from_preset(model) if folder is None else read_causal_lm_config(folder)
    if not isinstance(config, TransXSSMConfig):
        raise ValueError(
            f"{model} is no TransXSSM model: got model_type {config.model_type!r}; its layers are transformers' own"
        )
    show(*tables(config, f"{model} in {dtype_name}", dtype, device, length))


def tables(
    config: TransXSSMConfig, title: str, dtype: torch.dtype, device: torch.device, length: int
) -> Iterator[str | Table]:
    """The tables of the command: the machine, its implementations, and those that a model uses."""
    yield f"{title} on {device_name(device)}, rows of {length:,} tokens"
    if device.type == "cpu":
        yield f"C++ kernels: {cpp_shortfall() or 'compiled'}"
    else:
        yield f"Triton kernels: {triton_shortfall(torch.empty(0, device=device)) or 'available'}"
    yield table_of(
        ("op", "implementations, in order of preference"),
        [(name, ", ".join(str(backend.name) for backend in op.backends)) for name, op in OPS.items()],
        num_names=2,
    )
    rows = [
        (
            situation if index == 0 else "",
            choice.op,
            choice.backend,
            "\n".join(_refusals_before(choice)),
        )
        for situation, found in choices(config, dtype, device, length).items()
        for index, choice in enumerate(found)
    ]
    table = table_of(("for", "op", "takes", "since faster ones refuse"), rows, num_names=3)
    table.columns[-1].justify = "left"
    yield table


def _refusals_before(choice: Choice) -> list[str]:
    """A line for each preferred backend that refuses, with its reason."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in choice.refusals.items():
        if name == choice.backend:
            break
        if reason is not None:
            by_reason.setdefault(reason, []).append(name)
    return [f"{', '.join(names)}: {reason}" for reason, names in by_reason.items()]


def _calls(
    config: TransXSSMConfig,
    dtype: torch.dtype,
    device: torch.device,
    length: int,
    *,
    needs_grad: bool,
    is_decoding: bool,
) -> Iterator[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    """The calls that a layer of each kind makes, with tensors of the right shapes and arbitrary values."""
    time = (1, 1) if is_decoding else (1, length)

    def made(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=of, device=device, requires_grad=needs_grad and of.is_floating_point)

    hidden = made(*time, config.hidden_size)
    weight = made(config.intermediate_size, config.hidden_size)
    if SSD_LAYER_TYPE in config.layer_types:
        of_scan = torch.float32 if config.ssd_scan_in_fp32 else dtype
        x = made(*time, config.ssd_num_heads, config.ssd_head_dim, of=of_scan)
        dt = made(*time, config.ssd_num_heads, of=torch.float32)
        A = made(config.ssd_num_heads, of=torch.float32)
        B, C = (made(*time, config.ssd_num_groups, config.ssd_state_size, of=of_scan) for _ in range(2))
        if is_decoding:
            state = made(1, *x.shape[2:], config.ssd_state_size, of=torch.float32)
            yield "ssd_step_", (state, x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0]), {}
        else:
            yield "ssd_chunk_scan", (x, dt, A, B, C), {}
        if config.ssd_conv_kernel_size:
            width = x[0, 0].numel() + 2 * B[0, 0].numel()
            yield "short_convolution", (made(*time, width), made(width, config.ssd_conv_kernel_size)), {}
    if config.has_attention:
        q = made(1, config.num_attention_heads, time[1], config.head_dim)
        k, v = (made(1, config.num_key_value_heads, length, config.head_dim) for _ in range(2))
        name = "single_query_attention" if is_decoding else "causal_attention"
        yield name, (q, k, v), {}
    if is_decoding:
        norm, square, down = (
            made(config.hidden_size),
            made(*[config.hidden_size] * 2),
            made(config.hidden_size, config.intermediate_size),
        )
        yield "layer_start", (hidden, norm, config.rms_norm_eps, (square,)), {}
        yield "layer_end", (hidden, hidden, square, norm, config.rms_norm_eps, weight, weight, down), {}
    yield "linear", (hidden, weight), {}
    yield "rms_norm", (hidden, made(config.hidden_size), config.rms_norm_eps), {}
    if not is_decoding:
        yield "swiglu", tuple(made(*time, config.intermediate_size) for _ in range(2)), {}
    if needs_grad:
        labels = torch.zeros(length, dtype=torch.int64, device=device)
        yield "linear_cross_entropy", (hidden[0], made(config.vocab_size, config.hidden_size), labels), {}
