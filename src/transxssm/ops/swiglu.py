"""The gate of a SwiGLU feed-forward network, which keeps its two inputs for the backward pass and nothing else.

Letters: n tokens, f width of the feed-forward network.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from transxssm.ops.csrc import kernels_for
from transxssm.ops.row_blocks import ELEMENTS_PER_BLOCK, row_blocks


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) ∘ up (Shazeer, "GLU variants improve Transformer"), formed again in the backward pass instead of kept.

    Not twice differentiable.

    Args:
        gate, up: (…, f), one shape and dtype.

    Returns:
        (…, f) in their dtype; computed in float32 at least and rounded once, or after each of the two factors where torch's kernels do it.

    Raises:
        ValueError: the shapes differ.
    """
    if gate.shape != up.shape:
        raise ValueError(f"gate and up must have one shape: got {tuple(gate.shape)} and {tuple(up.shape)}")
    if torch.compiler.is_compiling():  # which fuses better than blocks do, and decides itself what to keep
        return F.silu(gate) * up
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        return _SwiGLU.apply(gate, up)
    return _forward(gate, up)


def _forward(gate: Tensor, up: Tensor) -> Tensor:
    if gate.numel() <= ELEMENTS_PER_BLOCK:  # a decoded token: what counts is the number of calls
        return F.silu(gate) * up
    output = torch.empty_like(gate, memory_format=torch.contiguous_format)
    if gate.dtype == up.dtype and (kernels := kernels_for(gate, up)):
        gate, up = gate.contiguous(), up.contiguous()
        kernels.on_rows("swiglu", output.view(-1, gate.shape[-1]), gate, up, output)
        return output
    gates, ups, outputs = (tensor.reshape(-1, gate.shape[-1]) for tensor in (gate, up, output))
    for rows in row_blocks(gates):
        torch.mul(F.silu(gates[rows]), ups[rows], out=outputs[rows])
    return output


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _forward(gate, up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grad_gate, grad_up = (torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (gate, up))
        width = gate.shape[-1]
        if gate.dtype == up.dtype == grad.dtype and (kernels := kernels_for(gate, up, grad)):
            given = (tensor.contiguous() for tensor in (gate, up, grad))
            kernels.on_rows("swiglu_backward", grad_gate.view(-1, width), *given, grad_gate, grad_up)
            return grad_gate, grad_up
        gates, ups, grads = (tensor.reshape(-1, width) for tensor in (gate, up, grad))
        grad_gates, grad_ups = grad_gate.view(-1, width), grad_up.view(-1, width)
        for rows in row_blocks(gates):
            block = F.silu(gates[rows])
            torch.mul(grads[rows], block, out=grad_ups[rows])
            torch.mul(grads[rows], ups[rows], out=block)
            torch.ops.aten.silu_backward(block, gates[rows], grad_input=grad_gates[rows])
        return grad_gate, grad_up
