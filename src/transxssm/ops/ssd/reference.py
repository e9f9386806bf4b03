"""The references that every other backend is tested against: the token-by-token recurrence and the quadratic dual form.

Letters: b batch, t time, h heads, g groups, r = h/g heads of a group, p head_dim, n state size.
"""

import torch
from torch import Tensor

from transxssm.ops.rotary import apply_rotary


def ssd_recurrence(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    rotary: tuple[Tensor, Tensor] | None = None,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """S_t = exp(dt_t A) S_{t−1} + dt_t x_t (R_t B_t)^T,  y_t = S_t (R_t C_t) + D x_t, one token after the other (Appendix A).

    Arguments, results and errors: `transxssm.ops.ssd.ssd_chunk_scan`.
    """
    x_acc, dt, A, B, C, D = _prepare(x, dt, A, B, C, rotary, D)
    batch, length, heads, head_dim = x.shape
    state = (
        x_acc.new_zeros(batch, heads, head_dim, B.shape[-1]) if initial_state is None else initial_state.to(x_acc.dtype)
    )
    outputs = []
    for t in range(length):
        if seq_idx is not None and t > 0:  # a new document starts from a zero state
            same_document = seq_idx[:, t] == seq_idx[:, t - 1]
            state = state * same_document[:, None, None, None]
        decay = torch.exp(dt[:, t] * A)  # (b, h)
        update = (dt[:, t, :, None] * x_acc[:, t])[..., None] * B[:, t, :, None, :]  # (b, h, p, n)
        state = decay[..., None, None] * state + update
        outputs.append((state * C[:, t, :, None, :]).sum(-1))  # (b, h, p)
    y = torch.stack(outputs, dim=1) + D[:, None] * x_acc
    return y.to(x.dtype), state


def ssd_dual_form(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    rotary: tuple[Tensor, Tensor] | None = None,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y = (L ∘ C B^T) (dt x) with L_ij = exp(Σ_{k=j+1..i} dt_k A) for i ≥ j (Eq. 6, Appendix A): attention's quadratic form.

    Arguments, results and errors: `transxssm.ops.ssd.ssd_chunk_scan`.
    """
    x_acc, dt, A, B, C, D = _prepare(x, dt, A, B, C, rotary, D)
    length = x.shape[1]
    log_decay = (dt * A).cumsum(1).transpose(1, 2)  # (b, h, t)
    visible = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
    from_start = torch.ones(x.shape[0], length, dtype=torch.bool, device=x.device)  # tokens that see the initial state
    if seq_idx is not None:
        visible = visible & (seq_idx[:, :, None] == seq_idx[:, None, :])[:, None]
        from_start = seq_idx == seq_idx[:, :1]
    exponents = log_decay[..., :, None] - log_decay[..., None, :]  # (b, h, t, t)
    L = exponents.masked_fill(~visible, -torch.inf).exp()
    scores = torch.einsum("bihn,bjhn->bhij", C, B)
    weighted_x = dt[..., None] * x_acc
    y = torch.einsum("bhij,bjhp->bihp", scores * L, weighted_x) + D[:, None] * x_acc
    state = torch.einsum("bhj,bjhp,bjhn->bhpn", L[..., -1, :], weighted_x, B)
    if initial_state is not None:
        from_initial = log_decay.exp() * from_start[:, None]  # (b, h, t)
        y = y + torch.einsum("bht,bthn,bhpn->bthp", from_initial, C, initial_state.to(y.dtype))
        state = state + from_initial[..., -1, None, None] * initial_state
    return y.to(x.dtype), state


def _prepare(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, rotary: tuple[Tensor, Tensor] | None, D: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Upcasts all inputs to the accumulation precision, and rotates B and C and repeats them for the heads of their group."""
    accumulate = torch.float64 if x.dtype == torch.float64 else torch.float32
    B, C = B.to(accumulate), C.to(accumulate)
    if rotary is not None:
        B, C = apply_rotary(B, *rotary), apply_rotary(C, *rotary)
    heads_per_group = x.shape[2] // B.shape[2]
    B = B.repeat_interleave(heads_per_group, dim=2)
    C = C.repeat_interleave(heads_per_group, dim=2)
    D = x.new_zeros(x.shape[2], dtype=accumulate) if D is None else D.to(accumulate)
    return x.to(accumulate), dt.to(accumulate), A.to(accumulate), B, C, D
