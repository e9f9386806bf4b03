"""The chunked SSD scan: matrix products inside chunks, a short recurrence over the chunks' states (Mamba-2, Section 6).

It is one custom operator with its own backward pass. Both iterate over blocks of a few chunks with views of the inputs, so that
intermediate results fit the cache; rotate B and C as they load them; fold the heads that share B and C into one matrix product; and
save only the state that each chunk begins with. The backward pass recomputes the rest. The backends "cpp" and "cpp_gemm" replace the
operations written here by C++ kernels (cpp.py).

Letters: b batch, t time, m chunks of a block, a = b m their joint batch axis, q and k positions in a chunk, h heads, g groups,
r = h/g heads of a group, p head_dim, n state size. States are (b, g, n, r p) inside: the heads of a group side by side.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensorMode

from transxssm.ops.dispatch import code_checksum
from transxssm.ops.ssd.blocks import (
    Block,
    ScanInputs,
    as_rows,
    blocks_of,
    by_head,
    heads_of,
    is_on_cpu,
    is_traced,
    load,
    product,
    store_unrotated,
)
from transxssm.ops.ssd.cpp import BACKENDS, backward_by_kernels, forward_by_kernels
from transxssm.ops.ssd.decays import cumulative_sum


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
    cu_seqlens: Tensor | None,
    chunk_size: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The scan of `transxssm.ops.ssd.ssd_chunk_scan` in chunks of `chunk_size` tokens, by "cpp_gemm", "cpp" or "chunked".

    Sequences that are side by side in one row begin at multiples of `chunk_size`.

    Matrix operands keep x's dtype (float32 for half types on a CPU that doesn't multiply them in hardware); time steps, decays,
    cumulative sums and states are float32 (float64 for float64 inputs). Differentiable once, in everything but the rotary tables.
    """
    accumulate = torch.float64 if x.dtype == torch.float64 else torch.float32
    cos, sin = (None, None) if rotary is None else rotary
    differentiable = (x, dt, A, B, C, D, initial_state)
    keeps_states = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in differentiable)
    y, final_state, _ = _scan(
        x,
        dt.to(accumulate),
        A.to(accumulate),
        B.to(x.dtype),
        C.to(x.dtype),
        None if D is None else D.to(accumulate),
        None if initial_state is None else initial_state.to(accumulate),
        cos,
        sin,
        seq_idx,
        cu_seqlens,
        chunk_size,
        keeps_states,
        backend,
        code_checksum() if torch.compiler.is_compiling() else 0,
    )
    return y, final_state


def _forward_chunks(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """y, the final state, and the state that each chunk began with, in x's dtype: (chunks, b, g, n, r p), or (0,)."""
    *tensors, chunk_size, keeps_states, backend, _ = arguments
    inputs = ScanInputs(*tensors)
    x, B, D = inputs.x, inputs.B, inputs.D
    batch, _, heads, head_dim = x.shape
    groups, state_size = B.shape[2:]
    y, state, states = _empty_outputs(*arguments)
    if inputs.initial_state is None:
        state = state.new_zeros(inputs.num_states, groups, state_size, heads // groups * head_dim)
    else:
        state = _fold(inputs.initial_state, groups).clone(memory_format=torch.contiguous_format)
    if backend in BACKENDS:
        forward_by_kernels(backend, inputs, y, state, states, chunk_size)
        return y, _unfold(state, head_dim), states
    sequences = inputs.sequences_of_chunks(chunk_size)
    for block in blocks_of(x, chunk_size):
        chunk = load(block, inputs)
        weighted_x = product(as_rows(chunk.x), as_rows(chunk.to_end[..., None]))
        updates = (chunk.B.mT @ weighted_x.flatten(3)).unflatten(0, (batch, -1))  # (b, m, g, n, r p)
        state, entering = _carry(state, updates.to(state.dtype), chunk.across, block, sequences)
        entering = entering.to(chunk.x.dtype)
        if keeps_states:
            states[block.chunks] = entering.transpose(0, 1)
        from_start = by_head(chunk.C @ entering.flatten(0, 1), head_dim)  # (a, g, r, q, p)
        outputs = product(from_start, chunk.from_start[..., None])
        weights = product((chunk.C @ chunk.B.mT)[:, :, None], chunk.L)  # (a, g, r, q, k)
        outputs = _add_products(outputs, weights, chunk.x).unflatten(0, (batch, -1))  # (b, m, g, r, q, p)
        if D is not None:
            outputs += D.view(groups, -1, 1, 1) * heads_of(x[:, block.tokens], block, groups)
        heads_of(y[:, block.tokens], block, groups).copy_(outputs)
    return y, _unfold(state, head_dim), states


def _empty_outputs(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *tensors, chunk_size, keeps_states, _, _ = arguments
    inputs = ScanInputs(*tensors)
    x, dt, B = inputs.x, inputs.dt, inputs.B
    batch, length, heads, head_dim = x.shape
    groups, state_size = B.shape[2:]
    states_shape = (-(-length // chunk_size), batch, groups, state_size, heads // groups * head_dim)
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        dt.new_empty(inputs.num_states, heads, head_dim, state_size),
        x.new_empty(states_shape if keeps_states else 0),
    )


def _backward_chunks(*arguments: Any) -> tuple[Tensor, ...]:
    """Gradients of x, dt, A, B, C, D (empty without D) and the initial state; chunk by chunk from the end."""
    with torch.autocast(arguments[0].device.type, enabled=False):  # the backward pass may run under autocast
        return _backward_in_given_precision(*arguments)


def _backward_in_given_precision(*arguments: Any) -> tuple[Tensor, ...]:
    *tensors, grad_y, grad_state, states, chunk_size, backend, _ = arguments
    inputs = ScanInputs(*tensors)
    x, dt, A, B, D = inputs.x, inputs.dt, inputs.A, inputs.B, inputs.D
    batch, _, _, head_dim = x.shape
    groups = B.shape[2]
    acc = dt.dtype
    grad_x, grad_dt, grad_A, grad_B, grad_C, grad_D, _ = _empty_gradients(
        *inputs, grad_y, grad_state, states, chunk_size
    )
    grad_A.zero_()
    grad_D.zero_()
    grad_state = _fold(grad_state.to(acc), groups).clone(memory_format=torch.contiguous_format)
    if backend in BACKENDS:
        gradients = (grad_x, grad_dt, grad_A, grad_B, grad_C, grad_D)
        backward_by_kernels(backend, inputs, grad_y, grad_state, states, chunk_size, gradients)
        return *gradients, _unfold(grad_state, head_dim)
    rates = A.view(groups, -1, 1)
    sequences = inputs.sequences_of_chunks(chunk_size)
    for block in reversed(blocks_of(x, chunk_size)):
        chunk = load(block, inputs)
        operand = chunk.x.dtype
        dy = heads_of(grad_y[:, block.tokens], block, groups)  # (b, m, g, r, q, p)
        dy = dy.to(operand, memory_format=torch.contiguous_format, copy=True).flatten(0, 1)  # (a, g, r, q, p)
        entering = states[block.chunks].transpose(0, 1).flatten(0, 1).to(operand)  # (a, g, n, r p)

        # The states' gradients, from the last chunk to the first.
        weighted_dy = product(as_rows(dy), as_rows(chunk.from_start[..., None])).flatten(3)
        updates = (chunk.C.mT @ weighted_dy).to(acc).unflatten(0, (batch, -1))  # (b, m, g, n, r p)
        grad_state, leaving = _carry(grad_state, updates, chunk.across, block, sequences, backwards=True)
        leaving = leaving.flatten(0, 1)  # (a, g, n, r p)

        # y_q = Σ_k s_qk L_qk dt_k x_k: to the scores, to dt x, and to the decays between q and k.
        weights = product((chunk.C @ chunk.B.mT)[:, :, None], chunk.L)  # (a, g, r, q, k)
        to_weights = dy @ chunk.x.mT
        between = (to_weights * weights).to(
            acc
        )  # both sums below are over the same rounded matrix, so that its rounding errors cancel
        to_log_decay = between.sum(-1) - between.sum(-2)  # (a, g, r, q)
        to_scores = _sum_of_heads(to_weights * chunk.L)  # (a, g, q, k)

        # S' = across · S + Σ_k to_end_k dt_k x_k B_k^T
        kept = (leaving * entering).sum(-2).unflatten(-1, (-1, head_dim)).sum(-1)  # (a, g, r)
        kept *= chunk.across.flatten(0, 1)
        leaving = leaving.to(operand)
        through_state = product(by_head(chunk.B @ leaving, head_dim), chunk.to_end[..., None])  # (a, g, r, k, p)
        to_end = (chunk.x * through_state).sum(-1, dtype=acc)  # (a, g, r, k)
        to_log_decay -= to_end
        to_log_decay[..., -1] += to_end.sum(-1) + kept
        to_dt_x = _add_products(through_state, weights.mT, dy)
        weighted_x = product(as_rows(chunk.x), as_rows(chunk.to_end[..., None])).flatten(3)
        dB = _add_products(weighted_x @ leaving.mT, to_scores.mT, chunk.C)  # (a, g, k, n)

        # y_q += from_start_q · S C_q
        from_start = (chunk.C @ entering).unflatten(-1, (-1, head_dim))  # (a, g, q, r, p)
        to_log_decay += (weighted_dy.view_as(from_start) * from_start).sum(-1, dtype=acc).transpose(-1, -2)
        dC = _add_products(weighted_dy @ entering.mT, to_scores, chunk.B)  # (a, g, q, n)

        # The cumulative log decay at q sums dt_k A over k ≤ q.
        to_rate = cumulative_sum(to_log_decay.flip(-1)).flip(-1)
        grad_A += (to_rate * chunk.dt).sum((0, -1)).view(-1)
        to_dt_x = to_dt_x.unflatten(0, (batch, -1))  # (b, m, g, r, q, p)
        block_x = heads_of(x[:, block.tokens], block, groups)
        to_dt = (block_x * to_dt_x).sum(-1, dtype=acc) + (rates * to_rate).view(to_dt_x.shape[:-1])
        heads_of(grad_dt[:, block.tokens], block, groups).copy_(to_dt)
        dx = to_dt_x.mul_(chunk.dt.to(operand).view(to_dt.shape)[..., None])
        if D is not None:
            dy = dy.view_as(dx)
            dx = dx.to(acc).addcmul_(dy.to(acc), D.view(groups, -1, 1, 1))
            grad_D += (dy * block_x).sum((0, 1, -1, -2), dtype=acc).view(-1)
        heads_of(grad_x[:, block.tokens], block, groups).copy_(dx)
        store_unrotated(dB, inputs, block, grad_B)
        store_unrotated(dC, inputs, block, grad_C)
    return grad_x, grad_dt, grad_A, grad_B, grad_C, grad_D, _unfold(grad_state, head_dim)


def _empty_gradients(*arguments: Any) -> tuple[Tensor, ...]:
    inputs = ScanInputs(*arguments[: len(ScanInputs._fields)])
    x, dt, A, B, C, D = inputs[:6]
    grads = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, dt, A, B, C)]
    grad_D = dt.new_empty(0 if D is None else x.shape[2])
    return (*grads, grad_D, dt.new_empty(inputs.num_states, *x.shape[2:], B.shape[3]))


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.chunk_size, _, ctx.backend, ctx.code = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.set_materialize_grads(False)  # a gradient of zeros for the states would be as large as they are


def _backward(
    ctx: Any, grad_y: Tensor | None, grad_state: Tensor | None, _grad_states: None
) -> tuple[Tensor | None, ...]:
    *tensors, states = ctx.saved_tensors
    inputs = ScanInputs(*tensors)
    if grad_y is None:
        grad_y = torch.zeros_like(inputs.x)
    if grad_state is None:
        grad_state = inputs.dt.new_zeros(inputs.num_states, *inputs.x.shape[2:], inputs.B.shape[3])
    gradients = _scan_backward(*inputs, grad_y, grad_state, states, ctx.chunk_size, ctx.backend, ctx.code)
    return _of_arguments(inputs, gradients)


def _of_arguments(inputs: ScanInputs, gradients: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    """The gradients of `_scan`'s arguments: None for those that were not given or have no gradient."""
    *grads, grad_D, grad_initial = gradients
    return (
        *grads,
        None if inputs.D is None else grad_D,
        None if inputs.initial_state is None else grad_initial,
        *(None,) * 8,  # cos, sin, seq_idx, cu_seqlens, chunk_size, keeps_states, backend, code
    )


def _operator(name: str, schema: str, function: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """An operator that `torch.compile` traces through on a GPU, to fuse its operations, and calls as a whole on a CPU, which is faster.

    It is traced below autograd, as a `torch.library.triton_op` is, so that the operator's own backward pass is used.
    """
    operator = torch.library.custom_op(name, function, mutates_args=(), schema=schema)
    operator.register_fake(fake)

    def traced(mode: Any, op: Any, types: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        if is_on_cpu(arguments[0]):
            return mode.__torch_dispatch__(op, types, arguments, options)
        with mode:
            return function(*arguments, **options)

    operator.register_torch_dispatch(FunctionalTensorMode, traced)
    return operator


_INPUTS = (
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? initial_state, "
    "Tensor? cos, Tensor? sin, Tensor? seq_idx, Tensor? cu_seqlens"
)
_scan = _operator(
    "transxssm::ssd_chunked",
    f"({_INPUTS}, int chunk_size, bool keeps_states, str backend, int code) -> (Tensor, Tensor, Tensor)",
    _forward_chunks,
    _empty_outputs,
)
_scan_backward = _operator(
    "transxssm::ssd_chunked_backward",
    f"({_INPUTS}, Tensor grad_y, Tensor grad_state, Tensor states, int chunk_size, str backend, int code) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_chunks,
    _empty_gradients,
)
_scan.register_autograd(_backward, setup_context=_save_for_backward)


def _fold(state: Tensor, groups: int) -> Tensor:
    """(b, h, p, n) → (b, g, n, r p)."""
    return state.unflatten(1, (groups, -1)).permute(0, 1, 4, 2, 3).flatten(3)


def _unfold(state: Tensor, head_dim: int) -> Tensor:
    """(b, g, n, r p) → (b, h, p, n)."""
    return state.unflatten(3, (-1, head_dim)).permute(0, 1, 3, 4, 2).flatten(1, 2).contiguous()


def _carry(
    state: Tensor,
    updates: Tensor,
    across: Tensor,
    block: Block,
    sequences: Tensor | None,
    *,
    backwards: bool = False,
) -> tuple[Tensor, Tensor]:
    """Carries states over the chunks of a block: those behind it (s, g, n, r p), and those that enter the chunks (b, m, g, n, r p).

    Backwards it carries the gradients: those before the block, and those of the states that leave the chunks.

    Args:
        state: (s, g, n, r p), of each row, or of each sequence in the one row; the latter are written over.
        sequences: (chunks,), of which sequence each chunk of the scan is. None if a row is one sequence.
    """
    if sequences is None:
        states = _recurrence(state, updates, across, backwards=backwards)
        return (states[:, 0], states[:, 1:]) if backwards else (states[:, -1], states[:, :-1])
    entering, first = [], 0
    numbers, counts = sequences[block.chunks].unique_consecutive(return_counts=True)
    for number, count in zip(numbers.tolist(), counts.tolist(), strict=True):
        own = slice(first, first := first + count)
        states = _recurrence(state[number, None], updates[:, own], across[:, own], backwards=backwards)
        state[number] = states[0, 0 if backwards else -1]
        entering.append(states[:, 1:] if backwards else states[:, :-1])
    return state, torch.cat(entering, dim=1)


def _recurrence(state: Tensor, updates: Tensor, across: Tensor, *, backwards: bool = False) -> Tensor:
    """S_{c+1} = across_c · S_c + update_c from S_0 = state: (b, g, n, r p), (b, m, g, n, r p), (b, m, g, r) → (b, m + 1, g, n, r p).

    Backwards, S_c = across_c · S_{c+1} + update_c from S_m = state.
    """
    if not is_on_cpu(updates):
        return _recurrence_at_once(state, updates, across, backwards=backwards)
    num_chunks, head_dim = across.shape[1], updates.shape[-1] // across.shape[-1]
    states = updates.new_empty(updates.shape[0], num_chunks + 1, *updates.shape[2:])
    known, wanted = (states[:, 1:], states[:, :-1]) if backwards else (states[:, :-1], states[:, 1:])
    states[:, -1 if backwards else 0] = state
    # A factor for each column, side by side: the inner loop runs over whole rows.
    factors = across.repeat_interleave(head_dim, dim=-1)[:, :, :, None].expand_as(updates)
    steps = list(zip(updates.unbind(1), known.unbind(1), factors.unbind(1), wanted.unbind(1), strict=True))
    for update, before, factor, after in reversed(steps) if backwards else steps:
        torch.addcmul(update, before, factor, out=after)
    return states


def _recurrence_at_once(state: Tensor, updates: Tensor, across: Tensor, *, backwards: bool = False) -> Tensor:
    """`_recurrence` as one product with the decays between all pairs of chunks: a few calls on a GPU instead of one for each chunk."""
    num_heads = across.shape[-1]
    steps = across.movedim(1, -1)  # (b, g, r, m)
    if backwards:
        steps = steps.flip(-1)
        sources = torch.cat((state[:, None], updates.flip(1)), dim=1)
    else:
        sources = torch.cat((state[:, None], updates), dim=1)  # (b, m + 1, g, n, r p)
    steps = torch.cat((torch.ones_like(steps[..., :1]), steps), dim=-1)  # the step into state c, c = 0 … m
    size = steps.shape[-1]
    later = torch.ones(size, size, dtype=torch.bool, device=steps.device).tril(-1)  # (c, j), c > j
    decays = torch.where(later, steps[..., None], 1.0).cumprod(-2).tril()  # (b, g, r, c, j): from state j to state c
    by_head = sources.unflatten(-1, (num_heads, -1)).permute(0, 2, 4, 1, 3, 5)  # (b, g, r, j, n, p)
    states = (decays @ by_head.flatten(4)).unflatten(-1, by_head.shape[4:])  # (b, g, r, c, n, p)
    states = states.permute(0, 3, 1, 4, 2, 5).flatten(4)  # (b, c, g, n, r p)
    return states.flip(1) if backwards else states


def _add_products(out: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """out + left @ right for each matrix, written over `out`."""
    flat, factors = out.flatten(0, -3), (left.flatten(0, -3), right.flatten(0, -3))
    if is_traced(out):
        return torch.baddbmm(flat, *factors).view(out.shape)
    torch.baddbmm(flat, *factors, out=flat)
    return out


def _sum_of_heads(tensor: Tensor) -> Tensor:
    """(a, g, r, q, k) → (a, g, q, k), summed in float32 or more, in the tensor's dtype."""
    if tensor.shape[2] == 1:
        return tensor.squeeze(2)
    if tensor.shape[2] == 2:  # rounded once all the same, and ten times as fast on a CPU
        return tensor[:, :, 0] + tensor[:, :, 1]
    return tensor.sum(2, dtype=torch.promote_types(tensor.dtype, torch.float32)).to(tensor.dtype)
