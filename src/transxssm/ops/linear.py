"""A linear layer that is fast in half precision on a CPU: for a token that is decoded, and where there are no such products.

Letters: n tokens, i input width, o output width.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from transxssm.ops.csrc import kernels_for
from transxssm.ops.precision import has_fast_products

_FEW_TOKENS = (
    7  # torch's own product reads a half-precision weight once; raising the weight first would read and write it more
)
_TOKENS_BY_KERNEL = 4
BLOCK_TOKENS = 512  # enough for a product at full speed, few enough that no large tensor is raised whole


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x · weightᵀ, without a bias.

    Where the CPU has no bfloat16 (float16) products, torch's reach a seventh of float32's speed, backward less. There, operands
    are raised to float32 on their way into the product, blocks of tokens at a time, and the result is rounded once: sums are as
    exact as in hardware. One to four bfloat16 tokens without gradients take a kernel that reads the weight at the speed of the memory,
    where torch's reaches less than half of it; its sums are float32. Everywhere else, and in a compiled graph, this is
    `torch.nn.functional.linear`. In the raised form not twice differentiable.

    Args:
        x: (…, i). weight: (o, i). Under autocast both are cast to its type first.

    Returns:
        (…, o) in their dtype.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.linear(x, weight)
    if x.numel() <= _FEW_TOKENS * x.shape[-1]:
        output = _of_few_tokens(x, weight)
        return F.linear(x, weight) if output is None else output
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    if x.dtype == torch.float64 or has_fast_products("cpu", dtype):
        return F.linear(x, weight)
    x, weight = x.to(dtype), weight.to(dtype)
    with torch.autocast("cpu", enabled=False):
        return _RaisedLinear.apply(x, weight)


def _of_few_tokens(x: Tensor, weight: Tensor) -> Tensor | None:
    """By the kernel, where there is one and it is the faster one."""
    needs_grad = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    is_fit = x.dtype == weight.dtype == torch.bfloat16 and 0 < x.numel() <= _TOKENS_BY_KERNEL * x.shape[-1]
    if not is_fit or needs_grad or torch.is_autocast_enabled("cpu") or not weight.is_contiguous():
        return None
    kernels = kernels_for(x, weight)
    if kernels is None:
        return None
    output = x.new_empty(*x.shape[:-1], weight.shape[0])
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    kernels.on_rows("multiply_few", rows, weight.shape[0], rows, weight, output)
    return output


def _blocks(rows: Tensor) -> Iterator[slice]:
    for start in range(0, rows.shape[0], BLOCK_TOKENS):
        yield slice(start, start + BLOCK_TOKENS)


class _RaisedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        output = x.new_empty(*x.shape[:-1], weight.shape[0])
        inputs, outputs, raised = x.reshape(-1, x.shape[-1]), output.view(-1, weight.shape[0]), weight.float()
        for rows in _blocks(inputs):
            outputs[rows] = inputs[rows].float() @ raised.T
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad
        inputs, grads, raised = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1]), weight.float()
        grad_inputs = torch.empty_like(inputs) if needs_x else None
        grad_weight = torch.zeros_like(raised) if needs_weight else None
        for rows in _blocks(inputs):
            block = grads[rows].float()
            if grad_inputs is not None:
                grad_inputs[rows] = block @ raised
            if grad_weight is not None:
                grad_weight.addmm_(block.T, inputs[rows].float())
        return (
            None if grad_inputs is None else grad_inputs.view(x.shape),
            None if grad_weight is None else grad_weight.to(weight.dtype),
        )
