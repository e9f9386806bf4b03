"""One token of the recurrence (selective state update): in torch's operations, and over the old state in one pass by kernels.

Letters: b batch, h heads, g groups, r = h/g heads of a group, p head_dim, n state size. Contracts: `transxssm.ops.ssd.ssd_step`.
The state is (b, h, p, n), or a cache (slots, h, p, n) of which `TokenInputs.state_indices` names a row's slot.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from transxssm.ops.csrc import kernels_of
from transxssm.ops.dispatch import (
    Backend,
    Op,
    cpp_shortfall,
    eager_cpp_refusal,
    eager_triton_refusal,
    triton_shortfall,
)
from transxssm.ops.rotary import apply_rotary
from transxssm.ops.sequences import has_dense_slots

Rotary = tuple[Tensor, Tensor]


class TokenInputs(NamedTuple):
    """The inputs of one token, after their shapes have been checked."""

    x: Tensor  # (b, h, p)
    dt: Tensor  # (b, h)
    A: Tensor  # (h,)
    B: Tensor  # (b, g, n)
    C: Tensor  # (b, g, n)
    rotary: Rotary | None  # cos, sin (b or 1, n/2)
    D: Tensor | None  # (h,)
    state_indices: Tensor | None = None  # (b,) the slot of each row's state, or None for slot i in row i

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """All tensors, in no particular order."""
        return (*self[:5], self.D, self.state_indices, *(self.rotary or ()))

    @property
    def accumulate(self) -> torch.dtype:
        """The dtype of the state and of the computation."""
        return torch.float64 if self.x.dtype == torch.float64 else torch.float32


def step(state: Tensor, token: TokenInputs) -> tuple[Tensor, Tensor]:
    """y and the new state, in new memory."""
    decay, x_dt, B, C = _operands(token)
    grouped = state.to(token.accumulate).view(*x_dt.shape[:-1], state.shape[-1])
    new_state = torch.addcmul(decay * grouped, x_dt, B)
    return _finished(_read(new_state, C), token), new_state.view_as(state)


def step_in_place(state: Tensor, token: TokenInputs) -> Tensor:
    """Overwrites the state by the new one and returns y. Not differentiable."""
    if token.state_indices is not None:
        own = state.index_select(0, token.state_indices)
        y = step_in_place(own, token._replace(state_indices=None))
        state.index_copy_(0, token.state_indices.long(), own)
        return y
    decay, x_dt, B, C = _operands(token)
    grouped = state.view(*x_dt.shape[:-1], state.shape[-1])
    if torch.compiler.is_compiling():
        # y is computed from the old state: if it read the new one, the compiler would allocate that and copy it over the old one.
        y = decay * (grouped * C).sum(-1, keepdim=True) + x_dt * (B * C).sum(-1, keepdim=True)
        grouped.mul_(decay).addcmul_(x_dt, B)
    else:
        grouped.mul_(decay).addcmul_(x_dt, B)
        y = _read(grouped, C)
    return _finished(y, token)


def _operands(token: TokenInputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """exp(dt A) (b, g, r, 1, 1), dt x (b, g, r, p, 1), B and C rotated, (b, g, 1, 1, n)."""
    batch, heads, head_dim = token.x.shape
    groups = token.B.shape[1]
    B_and_C = torch.stack((token.B, token.C), dim=1).to(token.accumulate)  # (b, 2, g, n): one rotation for both
    if token.rotary is not None:
        B_and_C = apply_rotary(B_and_C, *(table[:, None] for table in token.rotary))
    B, C = B_and_C.unbind(1)
    dt = token.dt.to(token.accumulate)
    decay = torch.exp(dt * token.A.to(token.accumulate)).view(batch, groups, heads // groups, 1, 1)
    x_dt = (dt[..., None] * token.x).view(batch, groups, heads // groups, head_dim, 1)
    return decay, x_dt, B[:, :, None, None], C[:, :, None, None]


def _read(state: Tensor, C: Tensor) -> Tensor:
    """S C: (b, g, r p, 1)."""
    return state.flatten(2, 3) @ C[:, :, 0].mT


def _finished(y: Tensor, token: TokenInputs) -> Tensor:
    y = y.reshape(token.x.shape)
    if token.D is not None:
        y = y + token.D.to(token.accumulate)[:, None] * token.x
    return y.to(token.x.dtype)


def _kernel_refusal(state: Tensor, token: TokenInputs) -> str | None:
    if not token.x.dtype == token.B.dtype == token.C.dtype:
        return "it takes x, B and C of one dtype"
    if state.dtype != torch.float32 or not has_dense_slots(state):
        return "it takes float32 states, each of them contiguous"
    return eager_cpp_refusal(token.x, state, *token.tensors)


def _by_kernel(state: Tensor, token: TokenInputs) -> Tensor:
    y = torch.empty_like(token.x, memory_format=torch.contiguous_format)
    cos, sin = (None, None) if token.rotary is None else torch.broadcast_tensors(*token.rotary)
    numbers = {"dt": token.dt, "A": token.A, "D": token.D, "cos": cos, "sin": sin}
    tensors = {"x": token.x, "B": token.B, "C": token.C}
    tensors |= {name: tensor.float() for name, tensor in numbers.items() if tensor is not None}
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    if token.state_indices is not None:
        tensors["slots"] = token.state_indices.long().contiguous()
    batch, heads, head_dim = token.x.shape
    kernels = kernels_of(token.x.dtype)
    call = kernels.structure(
        "Step",
        batch=batch,
        heads=heads,
        groups=token.B.shape[1],
        head_dim=head_dim,
        state_size=state.shape[-1],
        state_slot=state.stride(0),
        rotary_rows=1 if cos is None else cos.shape[0],
        threads=torch.get_num_threads(),
        state=state,
        y=y,
        **tensors,
    )
    kernels.run("step", call)
    torch.autograd.graph.increment_version(state)  # as torch's own operations in place do
    return y


def _triton_refusal(state: Tensor, token: TokenInputs) -> str | None:
    if not has_dense_slots(state):
        return "the kernel takes states, each of them contiguous"
    return eager_triton_refusal(state, *token.tensors)


def _by_triton(state: Tensor, token: TokenInputs) -> Tensor:
    from transxssm.ops.ssd.triton.step import step_over_state  # which imports Triton

    y = step_over_state(state, *token)
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(state)  # as torch's own operations in place do
    return y


def _call(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    rotary: Rotary | None = None,
    D: Tensor | None = None,
    state_indices: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, TokenInputs]:
    return state, TokenInputs(x, dt, A, B, C, rotary, D, state_indices)


SSD_STEP = Op("ssd_step", (Backend("torch", step),), call=_call)
SSD_STEP_ = Op(
    "ssd_step_",
    (
        Backend("triton", _by_triton, refusal=_triton_refusal, shortfall=lambda state, _: triton_shortfall(state)),
        Backend("cpp", _by_kernel, refusal=_kernel_refusal, shortfall=cpp_shortfall),
        Backend("torch", step_in_place),
    ),
    call=_call,
)
