"""The chunked SSD scan: matrix products inside chunks, a short recurrence over the chunks' states (Mamba-2, Section 6).

One custom operator with its own backward. Both walk over blocks of a few chunks with views of the inputs, so that what they
form fits the cache, rotate B and C as they load them, fold the heads that share B and C into one matrix product, and keep only the
state that each chunk began with; the rest is formed again in the backward pass.

Letters: b batch, t time, m chunks of a block, a = b m their joint batch axis, q and k positions in a chunk, h heads, g groups,
r = h/g heads of a group, p head_dim, n state size.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from transxssm.ops.rotary import apply_rotary

_BLOCK_SCORES = 2**19  # scores of a block over all heads and rows: 2 MiB of float32


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
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    states = x.new_empty(batch, -(-length // chunk_size), groups, rows, state_size)
    state = (
        dt.new_zeros(batch, groups, rows, state_size)
        if initial_state is None
        else initial_state.reshape(batch, groups, rows, state_size)
    )
    for block in _blocks(x, chunk_size):
        chunk = _load(block, x, dt, A, B, C, cos, sin, seq_idx)
        weighted_x = (chunk.x * (chunk.dt * chunk.to_end)[..., None]).to(x.dtype)  # (a, g, r, q, p)
        updates = (_rows(weighted_x).mT @ chunk.B).unflatten(0, (batch, -1))  # (b, m, g, r p, n)
        for c, update, across in zip(block.chunks, updates.unbind(1), chunk.across.unbind(1), strict=True):
            states[:, c] = state
            state = _scale_rows(state, across, head_dim) + update
        entering = states[:, block.chunks.start : block.chunks.stop].flatten(0, 1)  # (a, g, r p, n)
        scores = chunk.C @ chunk.B.mT  # (a, g, q, k)
        weights = (scores[:, :, None] * chunk.L).mul_(chunk.dt[..., None, :]).to(x.dtype)  # (a, g, r, q, k)
        inside = (weights @ chunk.x).to(dt.dtype)  # (a, g, r, q, p)
        from_start = _by_head(chunk.C @ entering.mT, head_dim)  # (a, g, r, q, p)
        inside.addcmul_(from_start.to(dt.dtype), chunk.from_start[..., None])
        if D is not None:
            inside.addcmul_(chunk.x.to(dt.dtype), D.view(groups, -1, 1, 1))
        y[:, block.tokens] = _tokens(inside.flatten(1, 2), batch)
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
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        dt.new_empty(batch, heads, head_dim, state_size),
        x.new_empty(batch, -(-length // chunk_size), groups, heads // groups * head_dim, state_size),
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
    grad_state = grad_state.reshape(batch, groups, -1, state_size).to(acc)  # (b, g, r p, n)
    rates = A.view(groups, -1, 1)
    for block in reversed(_blocks(x, chunk_size)):
        chunk = _load(block, x, dt, A, B, C, cos, sin, seq_idx)
        dy = _heads(_chunks(grad_y[:, block.tokens], block), groups)  # (a, g, r, q, p)
        entering = states[:, block.chunks.start : block.chunks.stop].flatten(0, 1)  # (a, g, r p, n)

        # The states' gradients, from the last chunk to the first.
        weighted_dy = (dy * chunk.from_start[..., None]).to(x.dtype)
        updates = (_rows(weighted_dy).mT @ chunk.C).unflatten(0, (batch, -1))  # (b, m, g, r p, n)
        leaving = dt.new_empty(updates.shape)
        for c in reversed(range(len(block.chunks))):
            leaving[:, c] = grad_state
            grad_state = _scale_rows(grad_state, chunk.across[:, c], head_dim) + updates[:, c]
        leaving = leaving.flatten(0, 1)  # (a, g, r p, n)
        across = chunk.across.flatten(0, 1)  # (a, g, r)

        # y_q = Σ_k s_qk L_qk dt_k x_k: to the scores, to dt x, and to the decays between q and k.
        scores = chunk.C @ chunk.B.mT  # (a, g, q, k)
        decayed = (scores[:, :, None] * chunk.L).to(x.dtype)  # (a, g, r, q, k)
        to_scores = (dy @ chunk.x.mT) * chunk.L
        to_scores *= chunk.dt[..., None, :]  # by head
        between = to_scores * scores[:, :, None]  # one matrix for rows and columns, so that its rounding cancels below
        to_log_decay = between.sum(-1) - between.sum(-2)  # (a, g, r, q)
        to_scores = to_scores.sum(2).to(x.dtype)  # (a, g, q, k)
        to_dt_x = (decayed.mT @ dy).to(acc)  # (a, g, r, k, p)

        # S' = across · S + Σ_k to_end_k dt_k x_k B_k^T
        kept = (leaving * entering).sum(-1).unflatten(-1, (-1, head_dim)).sum(-1) * across  # (a, g, r)
        leaving = leaving.to(x.dtype)
        through_state = _by_head(chunk.B @ leaving.mT, head_dim)  # (a, g, r, k, p)
        to_dt_x.addcmul_(through_state.to(acc), chunk.to_end[..., None])
        end_weight = chunk.dt * chunk.to_end
        weighted_x = (chunk.x * end_weight[..., None]).to(x.dtype)
        dB = to_scores.mT @ chunk.C + _rows(weighted_x) @ leaving  # (a, g, k, n)
        to_end = (chunk.x * through_state.to(acc)).sum(-1) * end_weight  # (a, g, r, k)
        to_log_decay -= to_end
        to_log_decay[..., -1] += to_end.sum(-1) + kept

        # y_q += from_start_q · S C_q
        from_start = _by_head(chunk.C @ entering.mT, head_dim)
        to_log_decay += (weighted_dy * from_start.to(acc)).sum(-1)
        dC = to_scores @ chunk.B + _rows(weighted_dy) @ entering  # (a, g, q, n)

        # The cumulative log decay at q sums dt_k A over k ≤ q.
        to_rate = to_log_decay.flip(-1).cumsum(-1).flip(-1)
        grad_A += (to_rate * chunk.dt).sum((0, -1)).view(heads)
        to_dt = (chunk.x * to_dt_x).sum(-1) + rates * to_rate  # (a, g, r, q)
        grad_dt[:, block.tokens] = _tokens(to_dt.flatten(1, 2), batch)

        dx = to_dt_x.mul_(chunk.dt[..., None])
        if D is not None:
            dx.addcmul_(dy.to(acc), D.view(groups, -1, 1, 1))
            grad_D += (dy.to(acc) * chunk.x).sum((0, -1, -2)).view(heads)
        grad_x[:, block.tokens] = _tokens(dx.flatten(1, 2), batch)
        grad_B[:, block.tokens] = _rotate(_tokens(dB, batch), cos, sin, block.tokens, inverse=True)
        grad_C[:, block.tokens] = _rotate(_tokens(dC, batch), cos, sin, block.tokens, inverse=True)
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


class _Block(NamedTuple):
    """Chunks that are computed together: enough of them that a product is worth its call, few enough to fit the cache."""

    chunks: range
    tokens: slice
    chunk_length: int


def _blocks(x: Tensor, chunk_size: int) -> list[_Block]:
    """All whole chunks in blocks of equal size, then the last chunk if it is shorter."""
    batch, length, heads, _ = x.shape
    num_whole = length // chunk_size
    size = max(1, _BLOCK_SCORES // (batch * heads * chunk_size * chunk_size))
    blocks = []
    for first in range(0, num_whole, size):
        chunks = range(first, min(first + size, num_whole))
        blocks.append(_Block(chunks, slice(first * chunk_size, chunks.stop * chunk_size), chunk_size))
    rest = length - num_whole * chunk_size
    if rest:
        blocks.append(_Block(range(num_whole, num_whole + 1), slice(length - rest, length), rest))
    return blocks


class _Chunk(NamedTuple):
    """The operands of a block's chunks; B and C are rotated, decays are zero across document boundaries."""

    x: Tensor  # (a, g, r, q, p)
    B: Tensor  # (a, g, q, n)
    C: Tensor  # (a, g, q, n)
    dt: Tensor  # (a, g, r, q)
    L: Tensor  # (a, g, r, q, k): decay from token k to token q ≥ k
    from_start: Tensor  # (a, g, r, q): decay from the state that enters to token q
    to_end: Tensor  # (a, g, r, q): decay from token q to the state that leaves
    across: Tensor  # (b, m, g, r): decay from the state that enters to the state that leaves


def _load(
    block: _Block,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    seq_idx: Tensor | None,
) -> _Chunk:
    batch, groups = B.shape[0], B.shape[2]
    tokens, length = block.tokens, block.chunk_length
    dt = _chunks(dt[:, tokens], block).unflatten(2, (groups, -1)).permute(0, 2, 3, 1).contiguous()  # (a, g, r, q)
    exact = (dt * A.view(groups, -1, 1)).double().cumsum(-1)
    log_decay = exact.to(dt.dtype)
    visible = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()  # (q, k)
    from_start = log_decay.exp()
    to_end = (exact[..., -1:] - exact).to(dt.dtype).exp_()
    across = from_start[..., -1]  # (a, g, r)
    if seq_idx is not None:
        documents = _chunks(seq_idx[:, tokens], block)  # (a, q)
        before = seq_idx[:, max(tokens.start - 1, 0), None]  # (b, 1)
        leaving = documents[:, -1]  # (a,)
        entering = torch.cat((before, leaving.view(batch, -1)[:, :-1]), dim=1).flatten()  # (a,)
        visible = visible & (documents[:, :, None] == documents[:, None, :])[:, None, None]  # (a, 1, 1, q, k)
        from_start = from_start * (documents == entering[:, None])[:, None, None]
        to_end = to_end * (documents == leaving[:, None])[:, None, None]
        across = across * (entering == leaving)[:, None, None]
    exponents = log_decay[..., :, None] - log_decay[..., None, :]  # only those ≤ 0 are exponentiated
    if x.dtype == torch.float32:  # small decays after large ones keep the digits that rounding the sums left out
        remainder = (exact - log_decay).to(dt.dtype)
        exponents += remainder[..., :, None] - remainder[..., None, :]
    return _Chunk(
        x=_heads(_chunks(x[:, tokens], block), groups),
        B=_chunks(_rotate(B[:, tokens], cos, sin, tokens), block).transpose(1, 2).contiguous(),
        C=_chunks(_rotate(C[:, tokens], cos, sin, tokens), block).transpose(1, 2).contiguous(),
        dt=dt,
        L=exponents.masked_fill_(~visible, -torch.inf).exp_(),
        from_start=from_start,
        to_end=to_end,
        across=across.unflatten(0, (batch, -1)),
    )


def _chunks(tensor: Tensor, block: _Block) -> Tensor:
    """(b, m q, …) → (a, q, …)."""
    return tensor.unflatten(1, (-1, block.chunk_length)).flatten(0, 1)


def _tokens(tensor: Tensor, batch: int) -> Tensor:
    """(a, h or g, q, …) → (b, m q, h or g, …), the inputs' layout."""
    return tensor.transpose(1, 2).unflatten(0, (batch, -1)).flatten(1, 2)


def _heads(tensor: Tensor, groups: int) -> Tensor:
    """(a, q, h, p) → (a, g, r, q, p)."""
    return tensor.unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4).contiguous()


def _by_head(tensor: Tensor, head_dim: int) -> Tensor:
    """(a, g, q, r p) → (a, g, r, q, p)."""
    return tensor.unflatten(-1, (-1, head_dim)).transpose(2, 3)


def _rows(tensor: Tensor) -> Tensor:
    """(a, g, r, q, p) → (a, g, q, r p): the heads of a group side by side, for one product with their B or C."""
    return tensor.transpose(2, 3).flatten(3)


def _scale_rows(state: Tensor, factor: Tensor, head_dim: int) -> Tensor:
    """(b, g, r p, n) times (b, g, r)."""
    return (state.unflatten(2, (-1, head_dim)) * factor[..., None, None]).flatten(2, 3)


def _rotate(tensor: Tensor, cos: Tensor | None, sin: Tensor | None, tokens: slice, *, inverse: bool = False) -> Tensor:
    """Rotates (b, t, g, n) to its positions, or back."""
    if cos is None or sin is None:
        return tensor
    return apply_rotary(tensor, cos[:, tokens], -sin[:, tokens] if inverse else sin[:, tokens])
