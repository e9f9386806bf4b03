"""The operator around the scan's Triton kernels: one op to autograd, to `torch.compile` and to `torch.export`.

Letters: b batch, c chunks, h heads, p head_dim, n state size.
"""

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from transxssm.ops.dispatch import code_checksum, triton_refusal, triton_shortfall
from transxssm.ops.ssd.blocks import ScanInputs

MAX_HEAD_DIM = 128
MAX_STATE_SIZE = 256
_UNDIVIDED_HEAD_DIM = 64


def refusal(inputs: ScanInputs) -> str | None:
    """Why the kernels are not meant for this scan, or None if they are."""
    return triton_refusal(*inputs._replace(cu_seqlens=None))  # which the host reads


def shortfall(inputs: ScanInputs) -> str | None:
    """Why the kernels cannot compute a scan on a GPU, or None if they can."""
    head_dim, state_size = inputs.x.shape[-1], inputs.B.shape[-1]
    if head_dim > MAX_HEAD_DIM or (head_dim > _UNDIVIDED_HEAD_DIM and head_dim % 2):
        return (
            f"the scan's Triton kernels take a head_dim of at most {_UNDIVIDED_HEAD_DIM}, or an even one up to {MAX_HEAD_DIM}: "
            f"got {head_dim}"
        )
    if state_size > MAX_STATE_SIZE:
        return f"the scan's Triton kernels take a state size of at most {MAX_STATE_SIZE}: got {state_size}"
    return triton_shortfall(inputs.x)


def ssd_triton(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    rotary: tuple[Tensor, Tensor] | None,
    D: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_size: int | None,
) -> tuple[Tensor, Tensor]:
    """The scan of `transxssm.ops.ssd.ssd_chunk_scan` by kernels. Differentiable once, in everything but the rotary tables.

    Args:
        cu_seqlens: of sequences that are side by side in one row; they begin at multiples of the kernels' chunk.
        chunk_size: rounded up to a power of 2 from 16 to 256. Defaults to what measured best.
    """
    cos, sin = (None, None) if rotary is None else rotary
    differentiable = (x, dt, A, B, C, D, initial_state)
    keeps_states = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in differentiable)
    y, final_state, *_ = _scan(
        *(x, dt.float(), A.float(), B.to(x.dtype), C.to(x.dtype), None if D is None else D.float()),
        *(None if initial_state is None else initial_state.float(), cos, sin, seq_idx, cu_seqlens),
        *(chunk_size, keeps_states),
        code_checksum() if torch.compiler.is_compiling() else 0,
    )
    return y, final_state


def _outputs(*arguments: Any) -> tuple[Tensor, ...]:
    """y, the final state and, for the backward pass, the states that chunks begin with, (b, c, h, p, n), the decays (`decays_like`), and B
    and C as they were rotated; the last five are (0,) where no gradients are wanted, the last two where nothing is rotated."""
    from transxssm.ops.ssd.triton.launch import decays_like, tiles_of

    *tensors, chunk_size, keeps_states, _ = arguments
    inputs = ScanInputs(*tensors)
    x, state_size = inputs.x, inputs.B.shape[-1]
    batch, _, heads, head_dim = x.shape
    of_state = (heads, head_dim, state_size)
    num_chunks = -(-x.shape[1] // tiles_of(x, state_size, chunk_size).chunk)
    states = (batch, num_chunks, *of_state) if keeps_states else (0,)
    decays = decays_like(x)
    rotated = inputs.B.shape if keeps_states and inputs.cos is not None else (0,)
    return (
        torch.empty(x.shape, dtype=x.dtype, device=x.device),
        torch.empty(inputs.num_states, *of_state, dtype=torch.float32, device=x.device),
        torch.empty(states, dtype=x.dtype, device=x.device),
        *(decays if keeps_states else (decay.new_empty(0) for decay in decays)),
        *(torch.empty(rotated, dtype=x.dtype, device=x.device) for _ in range(2)),
    )


def _forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    seq_idx: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_size: int | None,
    keeps_states: bool,
    code: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    from transxssm.ops.ssd.triton.launch import forward, rotate, tiles_of

    inputs = ScanInputs(x, dt, A, B, C, D, initial_state, cos, sin, seq_idx, cu_seqlens)
    tiles = tiles_of(x, B.shape[-1], chunk_size)
    rotated_B, rotated_C = rotate(inputs)
    outputs = _outputs(*inputs._replace(cos=None, sin=None), chunk_size, True, code)
    y, final_state, states, times, sums, no_B, no_C = outputs
    forward(inputs._replace(B=rotated_B, C=rotated_C), y, final_state, states, (times, sums), tiles)
    if not keeps_states:
        return y, final_state, states.new_empty(0), times.new_empty(0), sums.new_empty(0), no_B, no_C
    if cos is None:
        return y, final_state, states, times, sums, no_B, no_C
    return y, final_state, states, times, sums, rotated_B, rotated_C


def _gradients(*arguments: Any) -> tuple[Tensor, ...]:
    inputs = ScanInputs(*arguments[: len(ScanInputs._fields)])
    x, dt, A, B, C, D = inputs[:6]
    grads = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, dt, A, B, C)]
    of_states = dt.new_empty(inputs.num_states, *x.shape[2:], B.shape[3])
    return (*grads, dt.new_empty(0 if D is None else x.shape[2]), of_states)


def _backward_of(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    seq_idx: Tensor | None,
    cu_seqlens: Tensor | None,
    grad_y: Tensor,
    grad_state: Tensor | None,
    states: Tensor,
    times: Tensor,
    sums: Tensor,
    chunk_size: int | None,
    code: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    from transxssm.ops.ssd.triton.launch import backward, tiles_of

    inputs = ScanInputs(x, dt, A, B, C, D, initial_state, cos, sin, seq_idx, cu_seqlens)
    return backward(inputs, grad_y, grad_state, states, (times, sums), tiles_of(x, B.shape[-1], chunk_size))


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.chunk_size, _, ctx.code = inputs
    given = ScanInputs(*tensors)
    if given.cos is not None:
        given = given._replace(B=output[5], C=output[6])
    ctx.save_for_backward(*given, *output[2:5])
    ctx.set_materialize_grads(False)  # a gradient of zeros for the states would be as large as they are


def _backward(ctx: Any, grad_y: Tensor | None, grad_state: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    *tensors, states, times, sums = ctx.saved_tensors
    inputs = ScanInputs(*tensors)
    if grad_y is None:
        grad_y = torch.zeros_like(inputs.x)
    *grads, grad_D, grad_initial = _scan_backward(
        *(*inputs, grad_y, grad_state, states, times, sums, ctx.chunk_size, ctx.code)
    )
    return (
        *grads,
        None if inputs.D is None else grad_D,
        None if inputs.initial_state is None else grad_initial,
        *(None,) * 7,  # cos, sin, seq_idx, cu_seqlens, chunk_size, keeps_states, code
    )


# The compiler sees and launches the kernels inside these operators. To autograd each is one operator. Where Triton is missing there are no
# kernels to see, and `triton_op` would warn of that at every import.
_operator = torch.library.triton_op if find_spec("triton") else torch.library.custom_op
_scan: Any = _operator("transxssm::ssd_triton", _forward, mutates_args=())
_scan.register_fake(_outputs)
_scan_backward: Any = _operator("transxssm::ssd_triton_backward", _backward_of, mutates_args=())
_scan_backward.register_fake(_gradients)
_scan.register_autograd(_backward, setup_context=_save_for_backward)
