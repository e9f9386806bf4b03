"""The chunked SSD scan: matrix products inside chunks, a short recurrence over the chunks' states (Mamba-2, Section 6).

One custom operator with its own backward. Both walk over chunks with views of the inputs, so that what they form fits the
cache, rotate B and C as they load them, fold the heads that share B and C into one matrix product, and keep only the state that each
chunk began with; the rest is formed again in the backward pass.

Letters: b batch, t time, c chunk, q and k positions in a chunk, h heads, g groups, r = h/g heads of a group, p head_dim, n state size.
"""

from typing import Any, NamedTuple

import torch
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
    """The scan of `transxssm.ops.ssd.ssd_chunk_scan` in chunks of `chunk_size` tokens.

    Matrix operands keep x's dtype; time steps, decays, cumulative sums and states are float32 (float64 for float64 inputs).
    Differentiable once, in everything but the rotary tables.
    """
    accumulate = torch.float64 if x.dtype == torch.float64 else torch.float32
    cos, sin = (None, None) if rotary is None else rotary
    y, final_state, _ = _scan(
        x,
        dt.to(accumulate),
        A.to(accumulate),
        B.to(x.dtype),
        C.to(x.dtype),
        cos,
        sin,
        None if D is None else D.to(accumulate),
        None if initial_state is None else initial_state.to(accumulate),
        seq_idx,
        chunk_size,
    )
    return y, final_state


@torch.library.custom_op("transxssm::ssd_chunked", mutates_args=())
def _scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    D: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, heads, head_dim = x.shape
    groups, state_size = B.shape[2:]
    rows = heads // groups * head_dim
    num_chunks = -(-length // chunk_size)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    states = x.new_empty(num_chunks, batch, groups, rows, state_size)
    state = (
        dt.new_zeros(batch, groups, rows, state_size)
        if initial_state is None
        else initial_state.reshape(batch, groups, rows, state_size).clone()
    )
    for c in range(num_chunks):
        chunk = _load(c, x, dt, A, B, C, cos, sin, seq_idx, chunk_size)
        states[c] = state
        scores = chunk.C @ chunk.B.mT  # (b, g, q, k)
        weights = (scores[:, :, None] * chunk.L).mul_(chunk.dt[..., None, :]).to(x.dtype)  # (b, g, r, q, k)
        inside = (weights @ chunk.x).to(dt.dtype)  # (b, g, r, q, p)
        from_start = chunk.C @ states[c].mT  # (b, g, q, r p)
        from_start = from_start.unflatten(-1, (-1, head_dim)).transpose(2, 3)  # (b, g, r, q, p)
        inside.addcmul_(from_start.to(dt.dtype), chunk.from_start[..., None])
        if D is not None:
            inside.addcmul_(chunk.x.to(dt.dtype), D.view(groups, -1, 1, 1))
        y[:, chunk.tokens] = inside.flatten(1, 2).transpose(1, 2)
        weighted_x = (chunk.x * (chunk.dt * chunk.to_end)[..., None]).to(x.dtype)  # (b, g, r, q, p)
        update = _rows(weighted_x).mT @ chunk.B  # (b, g, r p, n)
        state = _scale_rows(state, chunk.across, head_dim).add_(update)
    return y, state.view(batch, heads, head_dim, state_size), states


@_scan.register_fake
def _(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    D: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, heads, head_dim = x.shape
    groups, state_size = B.shape[2:]
    num_chunks = -(-length // chunk_size)
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        dt.new_empty(batch, heads, head_dim, state_size),
        x.new_empty(num_chunks, batch, groups, heads // groups * head_dim, state_size),
    )


@torch.library.custom_op("transxssm::ssd_chunked_backward", mutates_args=())
def _scan_backward(
    grad_y: Tensor,
    grad_state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    D: Tensor | None,
    seq_idx: Tensor | None,
    states: Tensor,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, dt, A, B, C, D (empty without D) and the initial state; chunk by chunk from the end."""
    with torch.autocast(x.device.type, enabled=False):  # backward may run where autocast is on again
        return _backward_chunks(grad_y, grad_state, x, dt, A, B, C, cos, sin, D, seq_idx, states, chunk_size)


def _backward_chunks(
    grad_y: Tensor,
    grad_state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    D: Tensor | None,
    seq_idx: Tensor | None,
    states: Tensor,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, _, heads, head_dim = x.shape
    groups, state_size = B.shape[2:]
    acc = dt.dtype
    grad_x, grad_B, grad_C = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, B, C))
    grad_dt, grad_A = torch.empty_like(dt), torch.zeros_like(A)
    grad_D = dt.new_zeros(0 if D is None else heads)
    grad_state = grad_state.reshape(batch, groups, -1, state_size).to(acc).clone()  # (b, g, r p, n)
    rates = A.view(groups, -1, 1)
    for c in reversed(range(states.shape[0])):
        chunk = _load(c, x, dt, A, B, C, cos, sin, seq_idx, chunk_size)
        dy = _heads(grad_y[:, chunk.tokens], groups)  # (b, g, r, q, p)
        entering = states[c]  # (b, g, r p, n)
        leaving = grad_state.to(x.dtype)

        # y_q = Σ_k s_qk L_qk dt_k x_k: to the scores, to dt x, and to the decays between q and k.
        scores = chunk.C @ chunk.B.mT  # (b, g, q, k)
        decayed = (scores[:, :, None] * chunk.L).to(x.dtype)  # (b, g, r, q, k)
        to_scores = (dy @ chunk.x.mT) * chunk.L
        to_scores *= chunk.dt[..., None, :]  # by head
        between = to_scores * scores[:, :, None]  # one matrix for rows and columns, so that its rounding cancels below
        to_log_decay = between.sum(-1) - between.sum(-2)  # (b, g, r, q)
        to_scores = to_scores.sum(2).to(x.dtype)  # (b, g, q, k)
        to_dt_x = (decayed.mT @ dy).to(acc)  # (b, g, r, k, p)

        # S' = across · S + Σ_k to_end_k dt_k x_k B_k^T
        through_state = (chunk.B @ leaving.mT).unflatten(-1, (-1, head_dim)).transpose(2, 3)  # (b, g, r, k, p)
        to_dt_x.addcmul_(through_state.to(acc), chunk.to_end[..., None])
        end_weight = chunk.dt * chunk.to_end
        weighted_x = (chunk.x * end_weight[..., None]).to(x.dtype)
        dB = to_scores.mT @ chunk.C + _rows(weighted_x) @ leaving  # (b, g, k, n)
        to_end = (chunk.x * through_state.to(acc)).sum(-1) * end_weight  # (b, g, r, k)
        kept = (grad_state * entering).sum(-1).unflatten(-1, (-1, head_dim)).sum(-1) * chunk.across  # (b, g, r)
        to_log_decay -= to_end
        to_log_decay[..., -1] += to_end.sum(-1) + kept

        # y_q += from_start_q · S C_q
        weighted_dy = (dy * chunk.from_start[..., None]).to(x.dtype)
        from_start = (chunk.C @ entering.mT).unflatten(-1, (-1, head_dim)).transpose(2, 3)
        to_log_decay += (weighted_dy * from_start.to(acc)).sum(-1)
        dC = to_scores @ chunk.B + _rows(weighted_dy) @ entering  # (b, g, q, n)

        # The cumulative log decay at q sums dt_k A over k ≤ q.
        to_rate = to_log_decay.flip(-1).cumsum(-1).flip(-1)
        grad_A += (to_rate * chunk.dt).sum((0, -1)).view(heads)
        to_dt = (chunk.x * to_dt_x).sum(-1) + rates * to_rate  # (b, g, r, q)
        grad_dt[:, chunk.tokens] = to_dt.flatten(1, 2).transpose(1, 2)

        dx = to_dt_x.mul_(chunk.dt[..., None])
        if D is not None:
            dx.addcmul_(dy.to(acc), D.view(groups, -1, 1, 1))
            grad_D += (dy.to(acc) * chunk.x).sum((0, -1, -2)).view(heads)
        grad_x[:, chunk.tokens] = dx.flatten(1, 2).transpose(1, 2)
        grad_B[:, chunk.tokens] = _rotate(dB.transpose(1, 2), cos, sin, chunk.tokens, inverse=True)
        grad_C[:, chunk.tokens] = _rotate(dC.transpose(1, 2), cos, sin, chunk.tokens, inverse=True)
        grad_state = _scale_rows(grad_state, chunk.across, head_dim).add_(_rows(weighted_dy).mT @ chunk.C)
    return grad_x, grad_dt, grad_A, grad_B, grad_C, grad_D, grad_state.view(batch, heads, head_dim, state_size)


@_scan_backward.register_fake
def _(
    grad_y: Tensor,
    grad_state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    D: Tensor | None,
    seq_idx: Tensor | None,
    states: Tensor,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    grads = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, dt, A, B, C)]
    grad_D = dt.new_empty(0 if D is None else x.shape[2])
    return (*grads, grad_D, dt.new_empty(x.shape[0], *x.shape[2:], B.shape[3]))  # type: ignore[return-value]


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, dt, A, B, C, cos, sin, D, initial_state, seq_idx, chunk_size = inputs
    ctx.save_for_backward(x, dt, A, B, C, cos, sin, D, seq_idx, output[2])
    ctx.has_initial_state, ctx.chunk_size = initial_state is not None, chunk_size


def _backward(ctx: Any, grad_y: Tensor, grad_state: Tensor, _grad_states: Tensor) -> tuple[Tensor | None, ...]:
    x, dt, A, B, C, cos, sin, D, seq_idx, states = ctx.saved_tensors
    *grads, grad_D, grad_initial = _scan_backward(
        grad_y, grad_state, x, dt, A, B, C, cos, sin, D, seq_idx, states, ctx.chunk_size
    )
    return (
        *grads,
        None,
        None,
        None if D is None else grad_D,
        grad_initial if ctx.has_initial_state else None,
        None,
        None,
    )


_scan.register_autograd(_backward, setup_context=_save_for_backward)


class _Chunk(NamedTuple):
    """One chunk's operands; B and C are rotated, decays are zero across document boundaries."""

    tokens: slice
    x: Tensor  # (b, g, r, q, p)
    B: Tensor  # (b, g, q, n)
    C: Tensor  # (b, g, q, n)
    dt: Tensor  # (b, g, r, q)
    L: Tensor  # (b, g, r, q, k): decay from token k to token q ≥ k
    from_start: Tensor  # (b, g, r, q): decay from the state that enters to token q
    to_end: Tensor  # (b, g, r, q): decay from token q to the state that leaves
    across: Tensor  # (b, g, r): decay from the state that enters to the state that leaves


def _load(
    c: int,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    seq_idx: Tensor | None,
    chunk_size: int,
) -> _Chunk:
    groups = B.shape[2]
    start, end = c * chunk_size, min((c + 1) * chunk_size, x.shape[1])
    tokens = slice(start, end)
    dt_chunk = dt[:, tokens].unflatten(2, (groups, -1)).permute(0, 2, 3, 1).contiguous()  # (b, g, r, q)
    exact = (dt_chunk * A.view(groups, -1, 1)).double().cumsum(-1)
    log_decay = exact.to(dt.dtype)
    visible = torch.ones(end - start, end - start, dtype=torch.bool, device=x.device).tril()  # (q, k)
    from_start = log_decay.exp()
    to_end = (exact[..., -1:] - exact).to(dt.dtype).exp_()
    across = from_start[..., -1]
    if seq_idx is not None:
        documents = seq_idx[:, tokens]
        entering, leaving = seq_idx[:, max(start - 1, 0)], documents[:, -1]
        visible = visible & (documents[:, :, None] == documents[:, None, :])[:, None, None]  # (b, 1, 1, q, k)
        from_start = from_start * (documents == entering[:, None])[:, None, None]
        to_end = to_end * (documents == leaving[:, None])[:, None, None]
        across = across * (entering == leaving)[:, None, None]
    exponents = log_decay[..., :, None] - log_decay[..., None, :]  # only those ≤ 0 are exponentiated
    if x.dtype == torch.float32:  # small decays after large ones keep the digits that rounding the sums left out
        remainder = (exact - log_decay).to(dt.dtype)
        exponents += remainder[..., :, None] - remainder[..., None, :]
    return _Chunk(
        tokens=tokens,
        x=_heads(x[:, tokens], groups),
        B=_rotate(B[:, tokens], cos, sin, tokens).transpose(1, 2).contiguous(),
        C=_rotate(C[:, tokens], cos, sin, tokens).transpose(1, 2).contiguous(),
        dt=dt_chunk,
        L=exponents.masked_fill_(~visible, -torch.inf).exp_(),
        from_start=from_start,
        to_end=to_end,
        across=across,
    )


def _heads(tensor: Tensor, groups: int) -> Tensor:
    """(b, q, h, p) → (b, g, r, q, p)."""
    return tensor.unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4).contiguous()


def _rows(tensor: Tensor) -> Tensor:
    """(b, g, r, q, p) → (b, g, q, r p): the heads of a group side by side, for one product with their B or C."""
    return tensor.transpose(2, 3).flatten(3)


def _scale_rows(state: Tensor, factor: Tensor, head_dim: int) -> Tensor:
    """(b, g, r p, n) times (b, g, r)."""
    return (state.unflatten(2, (-1, head_dim)) * factor[..., None, None]).flatten(2, 3)


def _rotate(tensor: Tensor, cos: Tensor | None, sin: Tensor | None, tokens: slice, *, inverse: bool = False) -> Tensor:
    """Rotates (b, q, g, n) to its positions, or back."""
    if cos is None or sin is None:
        return tensor
    return apply_rotary(tensor, cos[:, tokens], -sin[:, tokens] if inverse else sin[:, tokens])
