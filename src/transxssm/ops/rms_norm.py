"""Root-mean-square normalisation that keeps its input and one number a token for the backward pass.

Letters: n tokens, d hidden size.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from transxssm.ops.csrc import kernels_for
from transxssm.ops.row_blocks import ELEMENTS_PER_BLOCK, row_blocks


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) ∘ weight over the last axis (Zhang and Sennrich 2019), in float32 (float64 for float64 inputs).

    On a CPU torch composes its own of six operators, and keeps most of what they form: fine for a decoded token, slow in
    training. Accelerators and the compiler have fused kernels: there this is `torch.nn.functional.rms_norm`. On a CPU not twice
    differentiable.

    Args:
        x: (…, d). weight: (d,).
        eps: added to the mean square.

    Returns:
        (…, d) in x's dtype, rounded once.

    Raises:
        ValueError: the weight is not as wide as x.
    """
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight must have shape {tuple(x.shape[-1:])}, as wide as x: got {tuple(weight.shape)}")
    needs_grad = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    is_small = not needs_grad and x.numel() <= ELEMENTS_PER_BLOCK  # a decoded token: what counts is the number of calls
    if is_small or x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), eps)
    return _RMSNorm.apply(x, weight, eps) if needs_grad else _forward(x, weight, eps)[0]


def _forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The result and (n, 1) 1 / root mean square of each token."""
    accumulate = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    inputs, outputs = x.reshape(-1, x.shape[-1]), y.view(-1, x.shape[-1])
    scales = inputs.new_empty(inputs.shape[0], 1, dtype=accumulate)
    if kernels := kernels_for(x, weight):
        kernels.on_rows("rms_norm", inputs, float(eps), inputs.contiguous(), weight.float().contiguous(), y, scales)
        return y, scales
    for rows in row_blocks(inputs):
        block = inputs[rows].to(accumulate)
        mean_square = torch.linalg.vector_norm(block, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        torch.rsqrt(mean_square.add_(eps), out=scales[rows])
        torch.mul(block * scales[rows], weight, out=outputs[rows])
    return y, scales


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, scales = _forward(x, weight, eps)
        ctx.save_for_backward(x, weight, scales)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scales = ctx.saved_tensors
        width, accumulate = x.shape[-1], scales.dtype
        grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
        inputs, grads, grad_inputs = x.reshape(-1, width), grad.reshape(-1, width), grad_x.view(-1, width)
        wide_weight, grad_weight = weight.to(accumulate), torch.zeros_like(weight, dtype=accumulate)
        if x.dtype == grad.dtype and (kernels := kernels_for(x, weight, scales, grad)):
            sums = grad_weight.new_empty(kernels.num_tasks(len(inputs)), width)
            given = (inputs.contiguous(), wide_weight.contiguous(), scales, grads.contiguous())
            kernels.on_rows("rms_norm_backward", inputs, *given, grad_x, sums)
            return grad_x, sums.sum(0).to(weight.dtype), None
        for rows in row_blocks(inputs):
            block = grads[rows].to(accumulate)
            normed = inputs[rows].to(accumulate) * scales[rows]
            products = block * normed
            grad_weight += products.sum(0)
            along = (products @ wide_weight).div_(width)[:, None]  # the part along x that the norm takes out
            block = torch.addcmul(block * wide_weight, normed, along, value=-1)
            torch.mul(block, scales[rows], out=grad_inputs[rows])
        return grad_x, grad_weight.to(weight.dtype), None
