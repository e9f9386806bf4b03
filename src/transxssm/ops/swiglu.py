"""The gate of a SwiGLU feed-forward network, which saves only its two inputs for the backward pass.

Letters: n tokens, f width of the feed-forward network.
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


def swiglu(gate: Tensor, up: Tensor, *, backend: str | None = None) -> Tensor:
    """silu(gate) ∘ up (Shazeer, "GLU variants improve Transformer"), recomputed in the backward pass instead of saved.

    Backends, in order of preference:
        "cpp": float32 and bfloat16 on a CPU, one pass over the memory each way.
        "blocks": any device, in blocks that stay in a CPU's cache. Neither is twice differentiable.
        "torch": `silu(gate) * up` of torch, which the compiler fuses. It is right for a decoded token, where the number of calls counts.

    Args:
        gate, up: (…, f), one shape and dtype.
        backend: one of the names above. Defaults to the first that takes the call.

    Returns:
        (…, f) in their dtype; computed in float32 at least, and rounded once or, by torch's operations, after each of the two factors.

    Raises:
        ValueError: the shapes differ, or the requested backend does not take the call.
    """
    if gate.shape != up.shape:
        raise ValueError(f"gate and up must have one shape: got {tuple(gate.shape)} and {tuple(up.shape)}")
    output: Tensor = SWIGLU.choose(backend, gate, up).forward(gate, up)
    return output


def _needs_grad(gate: Tensor, up: Tensor) -> bool:
    return torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad)


def _blocks_refusal(gate: Tensor, up: Tensor, *grad: Tensor) -> str | None:
    """The backward pass calls this, too, with the gradient. It accepts what the forward pass saved."""
    if grad:
        return None
    if torch.compiler.is_compiling():  # before sizes, which may be symbols
        return COMPILED
    if gate.numel() <= ELEMENTS_PER_BLOCK and not _needs_grad(gate, up):
        return FEW
    return TRANSFORMED if is_transformed() else None


def _kernel_refusal(gate: Tensor, up: Tensor, *grad: Tensor) -> str | None:
    reason = _blocks_refusal(gate, up, *grad)
    if reason is not None:
        return reason
    if gate.device.type != "cpu":
        return ON_CPU
    if any(each.dtype != gate.dtype for each in (up, *grad)):
        return "it takes one dtype"
    return eager_cpp_refusal(gate, up, *grad)


def _by_torch(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def _forward(backend: str, gate: Tensor, up: Tensor) -> Tensor:
    if _needs_grad(gate, up):
        output: Tensor = _SwiGLU.apply(gate, up, backend)
        return output
    return _gated(backend, gate, up)


def _gated(backend: str, gate: Tensor, up: Tensor) -> Tensor:
    if gate.numel() <= ELEMENTS_PER_BLOCK:
        return _by_torch(gate, up)
    output = torch.empty_like(gate, memory_format=torch.contiguous_format)
    if backend == "cpp":
        gate, up = gate.contiguous(), up.contiguous()
        kernels_of(gate.dtype).on_rows("swiglu", output.view(-1, gate.shape[-1]), gate, up, output)
        return output
    gates, ups, outputs = (tensor.reshape(-1, gate.shape[-1]) for tensor in (gate, up, output))
    for rows in row_blocks(gates):
        torch.mul(F.silu(gates[rows]), ups[rows], out=outputs[rows])
    return output


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, backend: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _gated(backend, gate, up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        # "cpp" and "blocks" save the same tensors. The choice is made again, since vmap may have batched the gradient alone.
        differentiate: Any = SWIGLU.choose(None, gate, up, grad).backward
        return *differentiate(gate, up, grad), None


def _backward_by_kernel(gate: Tensor, up: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    grad_gate, grad_up = (torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (gate, up))
    given = (tensor.contiguous() for tensor in (gate, up, grad))
    rows = grad_gate.view(-1, gate.shape[-1])
    kernels_of(gate.dtype).on_rows("swiglu_backward", rows, *given, grad_gate, grad_up)
    return grad_gate, grad_up


def _backward_in_blocks(gate: Tensor, up: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    grad_gate, grad_up = (torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (gate, up))
    width = gate.shape[-1]
    gates, ups, grads = (tensor.reshape(-1, width) for tensor in (gate, up, grad))
    grad_gates, grad_ups = grad_gate.view(-1, width), grad_up.view(-1, width)
    for rows in row_blocks(gates):
        block = F.silu(gates[rows])
        torch.mul(grads[rows], block, out=grad_ups[rows])
        torch.mul(grads[rows], ups[rows], out=block)
        torch.ops.aten.silu_backward(block, gates[rows], grad_input=grad_gates[rows])
    return grad_gate, grad_up


SWIGLU = Op(
    "swiglu",
    (
        Backend("cpp", partial(_forward, "cpp"), _backward_by_kernel, _kernel_refusal, cpp_shortfall),
        Backend("blocks", partial(_forward, "blocks"), _backward_in_blocks, _blocks_refusal),
        Backend("torch", _by_torch),
    ),
)
