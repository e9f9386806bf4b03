"""A sequence in parts that are scanned separately. Everything before a part enters through one state.

The recurrence is linear in the state, so that the scan of a part from zero lacks only the share of the state S before it, which is added:
y_t += exp(A Σ_{s ≤ t} dt_s) S (R_t C_t). Parts exchange their final states and the sums of their time steps, and nothing else.

Letters: b batch, r parts, t time of a part, h heads, g groups, p head_dim, n state size.
"""

import torch
from torch import Tensor

from transxssm.ops.rotary import apply_rotary


def state_before_part(final_states: Tensor, sums_of_dt: Tensor, A: Tensor, joins: Tensor, part: int) -> Tensor:
    """The state before the first token of a part: Σ_j joins_j exp(A Σ_{j < i < part} sums_of_dt_i) final_states_j.

    Args:
        final_states: (b, r, h, p, n), of every part scanned from zero.
        sums_of_dt: (b, r, h), of every part.
        A: (h,) decay rates < 0.
        joins: (b or 1, r), 1 where an earlier part ends in the document in which this part begins, else 0.
        part: the number of this part.

    Returns:
        (b, h, p, n), zeros for the first part.
    """
    num_parts = sums_of_dt.shape[1]
    numbers = torch.arange(num_parts, device=sums_of_dt.device)
    between = sums_of_dt * (numbers < part).to(sums_of_dt.dtype)[:, None]
    behind = between.flip(1).cumsum(1).flip(1) - between  # (b, r, h) of the parts behind each and before this one
    shares = torch.exp(A * behind.clamp(min=0)) * joins[..., None].to(behind.dtype)
    return (shares[..., None, None] * final_states).sum(1)


def add_state_before(
    y: Tensor,
    state: Tensor,
    dt: Tensor,
    A: Tensor,
    C: Tensor,
    *,
    rotary: tuple[Tensor, Tensor] | None = None,
    seq_idx: Tensor | None = None,
) -> Tensor:
    """The output of a part that was scanned from zero, with the share of the state before it.

    Args:
        y: (b, t, h, p), of `ssd_chunk_scan` on the part.
        state: (b, h, p, n), that of the document of the part's first token.
        dt, A, C, rotary, seq_idx: as `ssd_chunk_scan` had them for the part.

    Returns:
        (b, t, h, p) in y's dtype.
    """
    with torch.autocast(device_type=y.device.type, enabled=False):
        # Along the last axis, where a GPU sums a long row by many threads.
        decays = torch.exp(A[:, None] * dt.transpose(1, 2).contiguous().cumsum(-1)).transpose(1, 2)  # (b, t, h)
        if seq_idx is not None:
            decays = decays * (seq_idx == seq_idx[:, :1])[..., None].to(decays.dtype)
        rotated = C if rotary is None else apply_rotary(C, *rotary)
        by_group = state.to(C.dtype).unflatten(1, (C.shape[2], -1))  # (b, g, h/g, p, n)
        reads = torch.einsum("btgn,bgkpn->btgkp", rotated, by_group).flatten(2, 3)
        return (y + reads * decays[..., None]).to(y.dtype)
