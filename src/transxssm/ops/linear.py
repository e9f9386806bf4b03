"""A linear layer that is fast in half precision on a CPU: for decoded tokens, and where the CPU has no such matrix products.

Letters: n tokens, i input width, o output width.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from transxssm.ops.csrc import kernels_of
from transxssm.ops.devices import has_fast_products
from transxssm.ops.dispatch import COMPILED, ON_CPU, Backend, Op, cpp_shortfall, eager_cpp_refusal

# torch's own product reads a half-precision weight once, while upcasting the weight would read and write it more often.
_FEW_TOKENS = 7
_TOKENS_BY_KERNEL = 4
BLOCK_TOKENS = 512  # enough for a product at full speed, few enough that no large tensor is upcast as a whole


def linear(x: Tensor, weight: Tensor, *, backend: str | None = None) -> Tensor:
    """x · weightᵀ, without a bias.

    Backends, in order of preference:
        "cpp": one to four bfloat16 tokens without gradients, on a CPU: reads the weight at the speed of the memory, more than twice as
            fast as torch, with float32 sums.
        "upcast": half precision on a CPU without such products, where torch reaches a seventh of float32's speed. Operands are upcast
            to float32 on their way into the product, in blocks of tokens, and the result is rounded once. Not twice differentiable.
        "torch": `torch.nn.functional.linear`, everywhere else and in a compiled graph.

    Args:
        x: (…, i). weight: (o, i). Under autocast both are cast to its dtype first.
        backend: one of the names above. Defaults to the first that takes the call.

    Returns:
        (…, o) in their dtype.

    Raises:
        ValueError: the requested backend does not take the call.
    """
    output: Tensor = LINEAR.choose(backend, x, weight).forward(x, weight)
    return output


def _kernel_refusal(x: Tensor, weight: Tensor) -> str | None:
    if x.device.type != "cpu":
        return ON_CPU
    if torch.compiler.is_compiling():  # before sizes, which may be symbols
        return COMPILED
    if not 0 < x.numel() <= _TOKENS_BY_KERNEL * x.shape[-1]:
        return f"it is for 1 to {_TOKENS_BY_KERNEL} tokens"
    if not (x.dtype == weight.dtype == torch.bfloat16):
        return "it is for bfloat16"
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return "it has no gradients"
    if torch.is_autocast_enabled("cpu"):
        return "it does not know autocast"
    if not weight.is_contiguous():
        return "it takes a contiguous weight"
    return eager_cpp_refusal(x, weight)


def _by_kernel(x: Tensor, weight: Tensor) -> Tensor:
    output = x.new_empty(*x.shape[:-1], weight.shape[0])
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    kernels = kernels_of(x.dtype)
    call = kernels.structure(
        "Projections",
        rows=rows.shape[0],
        width=rows.shape[1],
        threads=torch.get_num_threads(),
        x=rows,
        weight_0=weight,
        width_0=weight.shape[0],
        output=output,
    )
    kernels.run("project", call)
    return output


def _autocast_dtype(x: Tensor) -> torch.dtype:
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


def _upcast_refusal(x: Tensor, weight: Tensor) -> str | None:
    if x.device.type != "cpu":
        return ON_CPU
    if torch.compiler.is_compiling():
        return COMPILED
    if x.numel() <= _FEW_TOKENS * x.shape[-1]:
        return f"it is for more than {_FEW_TOKENS} tokens"
    if x.dtype == torch.float64 or has_fast_products("cpu", _autocast_dtype(x)):
        return "this CPU multiplies the dtype fast"
    return None


def _by_upcasting(x: Tensor, weight: Tensor) -> Tensor:
    dtype = _autocast_dtype(x)
    x, weight = x.to(dtype), weight.to(dtype)
    with torch.autocast("cpu", enabled=False):
        output: Tensor = _UpcastLinear.apply(x, weight)
        return output


def _blocks(rows: Tensor) -> Iterator[slice]:
    for start in range(0, rows.shape[0], BLOCK_TOKENS):
        yield slice(start, start + BLOCK_TOKENS)


class _UpcastLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        output = x.new_empty(*x.shape[:-1], weight.shape[0])
        inputs, outputs, upcast = x.reshape(-1, x.shape[-1]), output.view(-1, weight.shape[0]), weight.float()
        for rows in _blocks(inputs):
            outputs[rows] = inputs[rows].float() @ upcast.T
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad
        inputs, grads, upcast = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1]), weight.float()
        grad_inputs = torch.empty_like(inputs) if needs_x else None
        grad_weight = torch.zeros_like(upcast) if needs_weight else None
        for rows in _blocks(inputs):
            block = grads[rows].float()
            if grad_inputs is not None:
                grad_inputs[rows] = block @ upcast
            if grad_weight is not None:
                grad_weight.addmm_(block.T, inputs[rows].float())
        return (
            None if grad_inputs is None else grad_inputs.view(x.shape),
            None if grad_weight is None else grad_weight.to(weight.dtype),
        )


LINEAR = Op(
    "linear",
    (
        Backend("cpp", _by_kernel, refusal=_kernel_refusal, shortfall=cpp_shortfall),
        Backend("upcast", _by_upcasting, refusal=_upcast_refusal),
        Backend("torch", F.linear),
    ),
)
