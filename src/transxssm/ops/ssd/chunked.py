"""The chunked SSD scan: matrix products inside chunks, a short recurrence over the chunks' states (Mamba-2, Section 6).

Letters: b batch, t time, c chunk, q and k positions in a chunk, h heads, g groups, r = h/g heads of a group, p head_dim, n state size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from transxssm.ops.rotary import apply_rotary


def ssd_chunked(
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
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """The scan of `transxssm.ops.ssd.ssd_chunk_scan` in chunks of `chunk_size` tokens, differentiated by autograd.

    Matrix operands keep x's dtype; time steps, decays, cumulative sums and states are float32 (float64 for float64 inputs).
    """
    batch, length, heads, head_dim = x.shape
    groups, state_size = B.shape[2:]
    heads_per_group = heads // groups
    accumulate = torch.float64 if x.dtype == torch.float64 else torch.float32
    if rotary is not None:
        B, C = apply_rotary(B, *rotary), apply_rotary(C, *rotary)
    B, C, dt = B.to(x.dtype), C.to(x.dtype), dt.to(accumulate)

    chunk_size = min(chunk_size, length)
    padding = -length % chunk_size
    if padding:  # dt = 0 leaves the state alone
        x_padded, B, C = (F.pad(tensor, (0, 0, 0, 0, 0, padding)) for tensor in (x, B, C))
        dt = F.pad(dt, (0, 0, 0, padding))
        if seq_idx is not None:
            seq_idx = torch.cat((seq_idx, seq_idx[:, -1:].expand(-1, padding)), dim=1)
    else:
        x_padded = x
    chunks = (length + padding) // chunk_size

    # Axes are ordered (b, c, g, …) so that the heads of a group share one matrix product wherever they share B or C.
    grouped = (batch, chunks, chunk_size, groups)
    B = B.view(*grouped, state_size).transpose(2, 3)  # (b, c, g, q, n)
    C = C.view(*grouped, state_size).transpose(2, 3)  # (b, c, g, q, n)
    log_decay = (
        (dt * A.to(accumulate)).view(*grouped, heads_per_group).permute(0, 1, 3, 4, 2).cumsum(-1)
    )  # (b, c, g, r, q)
    x_dt = (x_padded * dt[..., None]).to(x.dtype)
    x_dt = x_dt.view(*grouped, heads_per_group, head_dim).permute(0, 1, 3, 4, 2, 5)  # (b, c, g, r, q, p)

    documents = _DocumentMasks(seq_idx, batch, chunks, chunk_size, x.device)

    # Inside a chunk: (L ∘ C B^T) (dt x), Eq. 6. Only masked differences ≤ 0 are exponentiated.
    exponents = log_decay[..., :, None] - log_decay[..., None, :]  # (b, c, g, r, q, k)
    L = exponents.masked_fill(~documents.visible, -torch.inf).exp()
    scores = C @ B.transpose(-1, -2)  # (b, c, g, q, k)
    y = ((scores[:, :, :, None] * L).to(x.dtype) @ x_dt).to(accumulate)  # (b, c, g, r, q, p)

    # What each chunk adds to the state, and the recurrence over chunks.
    to_end = (log_decay[..., -1:] - log_decay).exp() * documents.reaches_end  # (b, c, g, r, q)
    x_to_end = (x_dt * to_end[..., None]).to(x.dtype)  # (b, c, g, r, q, p)
    updates = (x_to_end.transpose(-1, -2) @ B[:, :, :, None]).to(accumulate)  # (b, c, g, r, p, n)
    chunk_decay = (log_decay[..., -1].exp() * documents.carries)[..., None, None]  # (b, c, g, r, 1, 1)
    state = (
        updates.new_zeros(batch, groups, heads_per_group, head_dim, state_size)
        if initial_state is None
        else initial_state.to(accumulate).view(batch, groups, heads_per_group, head_dim, state_size)
    )
    incoming = []
    for decay, update in zip(chunk_decay.unbind(1), updates.unbind(1), strict=True):
        incoming.append(state)
        state = decay * state + update

    # From the state that a chunk starts with.
    states = torch.stack(incoming, dim=1).to(x.dtype)  # (b, c, g, r, p, n)
    from_start = log_decay.exp() * documents.sees_start  # (b, c, g, r, q)
    y = y + from_start[..., None] * (C[:, :, :, None] @ states.transpose(-1, -2))

    y = y.permute(0, 1, 4, 2, 3, 5).reshape(batch, length + padding, heads, head_dim)[:, :length]
    if D is not None:
        y = y + D.to(accumulate)[:, None] * x
    return y.to(x.dtype), state.reshape(batch, heads, head_dim, state_size)


class _DocumentMasks:
    """Which tokens see which, where documents are packed (all true inside the causal triangle where they aren't)."""

    def __init__(self, seq_idx: Tensor | None, batch: int, chunks: int, chunk_size: int, device: torch.device) -> None:
        self.visible = torch.ones(
            chunk_size, chunk_size, dtype=torch.bool, device=device
        ).tril()  # (q, k), or (b, c, 1, 1, q, k)
        self.reaches_end: Tensor | float = 1.0  # (b, c, 1, 1, q): the token's document is the chunk's last
        self.sees_start: Tensor | float = 1.0  # (b, c, 1, 1, q): the token's document is that of the incoming state
        self.carries: Tensor | float = 1.0  # (b, c, 1, 1): the incoming state's document is the chunk's last
        if seq_idx is None:
            return
        seq_idx = seq_idx.view(batch, chunks, chunk_size)
        last = seq_idx[:, :, -1]  # (b, c)
        incoming = torch.cat((seq_idx[:, :1, 0], last[:, :-1]), dim=1)  # (b, c)
        self.visible = self.visible & (seq_idx[..., :, None] == seq_idx[..., None, :])[:, :, None, None]
        self.reaches_end = (seq_idx == last[..., None])[:, :, None, None]
        self.sees_start = (seq_idx == incoming[..., None])[:, :, None, None]
        self.carries = (last == incoming)[:, :, None, None]
