"""Root-mean-square normalisation that saves only its input and one number for each token for the backward pass.

Letters: n tokens, d hidden size.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from transxssm.ops.csrc import kernels_of
from transxssm.ops.devices import ELEMENTS_PER_BLOCK, row_blocks
from transxssm.ops.dispatch import (
    COMPILED,
    FEW,
    ON_CPU,
    TRANSFORMED,
    Backend,
    Op,
    cpp_shortfall,
    eager_cpp_refusal,
    is_transformed,
)


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, backend: str | None = None) -> Tensor:
    """x / sqrt(mean(x²) + eps) ∘ weight over the last axis (Zhang and Sennrich 2019), in float32 (float64 for float64 inputs).

    Backends, in order of preference:
        "cpp": float32 and bfloat16 on a CPU, one pass over the memory each way.
        "blocks": on a CPU, in blocks that stay in its cache. Neither is twice differentiable.
        "torch": `torch.nn.functional.rms_norm`, for which accelerators and the compiler have fused kernels. On a CPU it is six
            operations, which is right for a decoded token, where the number of calls counts.

    Args:
        x: (…, d). weight: (d,).
        eps: added to the mean square.
        backend: one of the names above. Defaults to the first that takes the call.

    Returns:
        (…, d) in x's dtype, rounded once.

    Raises:
        ValueError: the weight is not as wide as x, or the requested backend does not take the call.
    """
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight must have shape {tuple(x.shape[-1:])}, as wide as x: got {tuple(weight.shape)}")
    output: Tensor = RMS_NORM.choose(backend, x, weight).forward(x, weight, eps)
    return output


def _needs_grad(x: Tensor, weight: Tensor) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)


def _blocks_refusal(x: Tensor, weight: Tensor, *backward: Tensor) -> str | None:
    """The backward pass calls this, too, with the scales and the gradient. It accepts what the forward pass saved."""
    if backward:
        return None
    if torch.compiler.is_compiling():  # before sizes, which may be symbols
        return COMPILED
    if x.numel() <= ELEMENTS_PER_BLOCK and not _needs_grad(x, weight):
        return FEW
    if x.device.type != "cpu":
        return ON_CPU
    return TRANSFORMED if is_transformed() else None


def _kernel_refusal(x: Tensor, weight: Tensor, *backward: Tensor) -> str | None:
    reason = _blocks_refusal(x, weight, *backward)
    if reason is not None:
        return reason
    if backward and backward[-1].dtype != x.dtype:
        return "it takes a gradient of x's dtype"
    return eager_cpp_refusal(x, weight, *backward)


def _forward(backend: str, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if _needs_grad(x, weight):
        output: Tensor = _RMSNorm.apply(x, weight, eps, backend)
        return output
    return _with_scales(backend, x, weight, eps)[0]


def _with_scales(backend: str, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The result and (n, 1) 1 / root mean square of each token."""
    accumulate = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    inputs, outputs = x.reshape(-1, x.shape[-1]), y.view(-1, x.shape[-1])
    scales = inputs.new_empty(inputs.shape[0], 1, dtype=accumulate)
    if backend == "cpp":
        given = (inputs.contiguous(), weight.float().contiguous(), y, scales)
        kernels_of(x.dtype).on_rows("rms_norm", inputs, float(eps), *given)
        return y, scales
    for rows in row_blocks(inputs):
        block = inputs[rows].to(accumulate)
        mean_square = torch.linalg.vector_norm(block, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        torch.rsqrt(mean_square.add_(eps), out=scales[rows])
        torch.mul(block * scales[rows], weight, out=outputs[rows])
    return y, scales


def _by_torch(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, backend: str) -> Tensor:
        y, scales = _with_scales(backend, x, weight, eps)
        ctx.save_for_backward(x, weight, scales)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight, scales = ctx.saved_tensors
        # "cpp" and "blocks" save the same tensors. The choice is made again, since vmap may have batched the gradient alone.
        differentiate: Any = RMS_NORM.choose(None, x, weight, scales, grad).backward
        return *differentiate(x, weight, scales, grad), None, None


def _backward_by_kernel(x: Tensor, weight: Tensor, scales: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    width = x.shape[-1]
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    inputs, grads = x.reshape(-1, width), grad.reshape(-1, width)
    kernels = kernels_of(x.dtype)
    sums = scales.new_empty(kernels.num_tasks(len(inputs)), width)
    given = (inputs.contiguous(), weight.to(scales.dtype).contiguous(), scales, grads.contiguous())
    kernels.on_rows("rms_norm_backward", inputs, *given, grad_x, sums)
    return grad_x, sums.sum(0).to(weight.dtype)


def _backward_in_blocks(x: Tensor, weight: Tensor, scales: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    width, accumulate = x.shape[-1], scales.dtype
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    inputs, grads, grad_inputs = x.reshape(-1, width), grad.reshape(-1, width), grad_x.view(-1, width)
    wide_weight, grad_weight = weight.to(accumulate), torch.zeros_like(weight, dtype=accumulate)
    for rows in row_blocks(inputs):
        block = grads[rows].to(accumulate)
        normed = inputs[rows].to(accumulate) * scales[rows]
        products = block * normed
        grad_weight += products.sum(0)
        along = (products @ wide_weight).div_(width)[:, None]  # the component along x, which normalisation removes
        block = torch.addcmul(block * wide_weight, normed, along, value=-1)
        torch.mul(block, scales[rows], out=grad_inputs[rows])
    return grad_x, grad_weight.to(weight.dtype)


RMS_NORM = Op(
    "rms_norm",
    (
        Backend("cpp", partial(_forward, "cpp"), _backward_by_kernel, _kernel_refusal, cpp_shortfall),
        Backend("blocks", partial(_forward, "blocks"), _backward_in_blocks, _blocks_refusal),
        Backend("torch", _by_torch),
    ),
    call=lambda x, weight, *others, **options: (x, weight),
)
