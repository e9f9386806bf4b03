"""The "triton" backend of `ssd_step_`, S ← exp(dt A) S + dt x (R B)ᵀ and y = S (R C) + D x, which reads and writes the state once.

Letters: b batch, h heads, g groups, p head_dim, n state size.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from transxssm.ops.devices import launched_on, power_of_2

# Numbers of the state that a program holds at once: 64 for each of its 128 threads.
_ELEMENTS = 8192


def step_over_state(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    rotary: tuple[Tensor, Tensor] | None,
    D: Tensor | None,
    state_indices: Tensor | None = None,
) -> Tensor:
    """Writes the new state over the old one and returns y (b, h, p) in x's dtype.

    Args:
        state: (slots, h, p, n) float32, each slot contiguous.
        state_indices: (b,) the slot of each row. Defaults to row i's being number i.
    """
    batch, heads, head_dim = x.shape
    groups, state_size = B.shape[1:]
    x, B, C = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (x, B, C))
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    cos, sin = A, A  # placeholders for pointers that are not read
    if rotary is not None:
        cos, sin = (table.contiguous() for table in torch.broadcast_tensors(*rotary))
    block_n = power_of_2(state_size)
    block_p = min(power_of_2(head_dim), max(1, _ELEMENTS // block_n))
    if batch == 0:
        return y
    with launched_on(x.device):
        _step[(batch * heads, triton.cdiv(head_dim, block_p))](
            *(x, dt, A.contiguous(), B, C, cos, sin, A if D is None else D.contiguous(), state, y),
            A if state_indices is None else state_indices.contiguous(),
            state.stride(0),
            *(*x.stride()[:2], *dt.stride(), *B.stride()[:2], *C.stride()[:2]),
            0 if cos.shape[0] == 1 else state_size // 2,
            heads=heads,
            heads_per_group=heads // groups,
            head_dim=head_dim,
            state_size=state_size,
            has_rotary=rotary is not None,
            has_D=D is not None,
            has_slots=state_indices is not None,
            block_p=block_p,
            block_n=block_n,
        )
    return y


@triton.jit
def _turned(row, places, is_inside, cos, sin, half: tl.constexpr, has_rotary: tl.constexpr):
    """The numbers of a row at `places`, rotated by pairs (i, half + i), in float32."""
    numbers = tl.load(row + places, mask=is_inside, other=0.0).to(tl.float32)
    if has_rotary:
        is_first = places < half
        other = tl.load(row + tl.where(is_first, places + half, places - half), mask=is_inside, other=0.0)
        angle = tl.where(is_first, places, places - half)
        cosine = tl.load(cos + angle, mask=is_inside, other=0.0).to(tl.float32)
        sine = tl.load(sin + angle, mask=is_inside, other=0.0).to(tl.float32)
        numbers = numbers * cosine + tl.where(is_first, -sine, sine) * other.to(tl.float32)
    return numbers


@triton.jit
def _step(
    x,
    dt,
    A,
    B,
    C,
    cos,
    sin,
    D,
    state,
    y,
    slots,
    state_slot,
    x_row,
    x_head,
    dt_row,
    dt_head,
    B_row,
    B_group,
    C_row,
    C_group,
    rotary_row,
    heads: tl.constexpr,
    heads_per_group: tl.constexpr,
    head_dim: tl.constexpr,
    state_size: tl.constexpr,
    has_rotary: tl.constexpr,
    has_D: tl.constexpr,
    has_slots: tl.constexpr,
    block_p: tl.constexpr,
    block_n: tl.constexpr,
):
    """A program holds block_p rows of one head's state, (block_p, n)."""
    place = tl.program_id(0).to(tl.int64)  # of a head in a row of the batch; the state outgrows 32 bits
    row, head = place // heads, place % heads
    slot = row
    if has_slots:
        slot = tl.load(slots + row).to(tl.int64)
    group = head // heads_per_group
    p = tl.program_id(1) * block_p + tl.arange(0, block_p)
    n = tl.arange(0, block_n)
    in_p, in_n = p < head_dim, n < state_size
    inside = in_p[:, None] & in_n[None, :]
    half: tl.constexpr = state_size // 2

    numbers = state + slot * state_slot + (head * head_dim + p[:, None]) * state_size + n[None, :]
    old = tl.load(numbers, mask=inside, other=0.0)
    turned_B = _turned(
        B + row * B_row + group * B_group, n, in_n, cos + row * rotary_row, sin + row * rotary_row, half, has_rotary
    )
    turned_C = _turned(
        C + row * C_row + group * C_group, n, in_n, cos + row * rotary_row, sin + row * rotary_row, half, has_rotary
    )
    step = tl.load(dt + row * dt_row + head * dt_head).to(tl.float32)
    decay = tl.exp(step * tl.load(A + head).to(tl.float32))
    given = tl.load(x + row * x_row + head * x_head + p, mask=in_p, other=0.0).to(tl.float32)
    new = decay * old + (step * given)[:, None] * turned_B[None, :]
    tl.store(numbers, new, mask=inside)
    read = tl.sum(new * turned_C[None, :], axis=1)
    if has_D:
        read += tl.load(D + head).to(tl.float32) * given
    tl.store(y + place * head_dim + p, read.to(y.dtype.element_ty), mask=in_p)
