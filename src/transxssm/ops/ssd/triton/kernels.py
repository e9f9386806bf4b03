"""Triton kernels of the SSD scan, forward and backward, with the rotation of B and C. Design and byte counts: docs/kernels.md.

A sequence is cut into chunks, and a chunk into blocks of tokens, the rows and columns of a program's tiles. Memory sees one state per
chunk and head. The forward pass sums what each chunk adds to the state (`sum_chunks`), carries the states from chunk to chunk
(`carry_states`), and forms the outputs of each block from the state that enters its chunk and from the tokens before it in the
chunk (`scan_blocks`). The backward pass does the same with the gradients of the states, from the last chunk to the first, then forms
the gradients of C (`differentiate_queries`) and of x, B and dt (`differentiate_keys`).

B and C are rotated once, in a pass of their own (`rotate_maps`): the other kernels read them several times, and would read angles of
twice their bytes with them each time. Their gradients are rotated back as they are stored. The state size is held in two halves,
since coordinate i of B and C rotates with coordinate i + n/2. Products take operands in x's dtype and accumulate in
float32; decays and sums of them are float32, or float64 where x is float32. Nothing is accumulated across programs, so two runs
give the same bits.

Letters: b batch, t time, c chunks, h heads, g groups, p head_dim, n state size, q and k positions in a block.
"""

import triton
import triton.language as tl


@triton.jit
def _load_maps(maps, token, first, length, block: tl.constexpr, size: tl.constexpr, block_half: tl.constexpr):
    """Rotated B or C of a block of tokens, in two halves (q, n/2). Zeros behind the last token."""
    half: tl.constexpr = (size + 1) // 2
    q, i = tl.arange(0, block), tl.arange(0, block_half)
    in_t = (first + q < length)[:, None]
    place = maps + tl.cast(first, tl.int64) * token + q[:, None] * token + i[None, :]
    a = tl.load(place, mask=in_t & (i < half)[None, :], other=0.0)
    b = tl.load(place + half, mask=in_t & (i < size - half)[None, :], other=0.0)
    return a, b


@triton.jit
def _store_unrotated(
    grads,
    token,
    cos,
    sin,
    first,
    length,
    a,
    b,
    block: tl.constexpr,
    size: tl.constexpr,
    block_half: tl.constexpr,
    rotates: tl.constexpr,
):
    """Stores the gradient of B or C of a block of tokens, given as that of the rotated halves."""
    half: tl.constexpr = (size + 1) // 2
    q, i = tl.arange(0, block), tl.arange(0, block_half)
    in_t = (first + q < length)[:, None]
    long = tl.cast(first, tl.int64)
    in_first, in_second = in_t & (i < half)[None, :], in_t & (i < size - half)[None, :]
    if rotates:
        angle = long * half + q[:, None] * half + i[None, :]
        cosine = tl.load(cos + angle, mask=in_first, other=1.0)
        sine = tl.load(sin + angle, mask=in_first, other=0.0)
        to_first = a * cosine + b * sine
        to_second = b * cosine - a * sine
    else:
        to_first = a
        to_second = b
    place = grads + long * token + q[:, None] * token + i[None, :]
    tl.store(place, to_first.to(grads.dtype.element_ty), mask=in_first)
    tl.store(place + half, to_second.to(grads.dtype.element_ty), mask=in_second)


@triton.jit
def _load_rows(rows, token, first, length, block: tl.constexpr, head_dim: tl.constexpr, block_p: tl.constexpr):
    """x or the gradient of y of a block of tokens, (q, p). Zeros behind the last token."""
    q, p = tl.arange(0, block), tl.arange(0, block_p)
    inside = (first + q < length)[:, None] & (p < head_dim)[None, :]
    return tl.load(rows + tl.cast(first, tl.int64) * token + q[:, None] * token + p[None, :], mask=inside, other=0.0)


@triton.jit
def _load_state(states, head_dim: tl.constexpr, size: tl.constexpr, block_half: tl.constexpr, block_p: tl.constexpr):
    """A state in two halves (p, n/2)."""
    half: tl.constexpr = (size + 1) // 2
    p, i = tl.arange(0, block_p), tl.arange(0, block_half)
    place = states + p[:, None] * size + i[None, :]
    in_p = (p < head_dim)[:, None]
    a = tl.load(place, mask=in_p & (i < half)[None, :], other=0.0)
    b = tl.load(place + half, mask=in_p & (i < size - half)[None, :], other=0.0)
    return a, b


@triton.jit
def _exp(exponent):
    """The exponential of a number that is at most 0 but for rounding."""
    return tl.exp(tl.minimum(exponent.to(tl.float32), 0.0))


@triton.jit
def _between(cumulative_q, cumulative_k, t_q, t_k, documents_q, documents_k, has_documents: tl.constexpr):
    """The decay from token k to token q ≥ k of the same document, 0 elsewhere: (q, k) of columns and rows, (k, q) of rows and columns."""
    seen = t_q >= t_k
    if has_documents:
        seen = seen & (documents_q == documents_k)
    return tl.where(seen, _exp(cumulative_q - cumulative_k), 0.0)


@triton.jit
def _from_start(cumulative, documents, seq_idx, first_of_chunk, has_documents: tl.constexpr):
    """The decay from the state that enters a chunk to its tokens, (q,)."""
    decay = _exp(cumulative)
    if has_documents:
        before = tl.load(seq_idx + tl.maximum(first_of_chunk - 1, 0))
        decay = tl.where(documents == before, decay, 0.0)
    return decay


@triton.jit
def _to_end(cumulative, documents, sums, seq_idx, last_of_chunk, has_documents: tl.constexpr):
    """The decay from the tokens of a chunk to the state that leaves it, (k,)."""
    decay = _exp(tl.load(sums + last_of_chunk) - cumulative)
    if has_documents:
        decay = tl.where(documents == tl.load(seq_idx + last_of_chunk), decay, 0.0)
    return decay


@triton.jit
def _across(sums, seq_idx, first_of_chunk, last_of_chunk, has_documents: tl.constexpr):
    """The decay from the state that enters a chunk to the state that leaves it."""
    decay = _exp(tl.load(sums + last_of_chunk))
    if has_documents:
        before, last = tl.load(seq_idx + tl.maximum(first_of_chunk - 1, 0)), tl.load(seq_idx + last_of_chunk)
        decay = tl.where(before == last, decay, 0.0)
    return decay


@triton.jit
def _rotate_block(
    maps, rotated, token, rotated_token, t, cosine, sine, in_first, half: tl.constexpr, block_half: tl.constexpr
):
    i = tl.arange(0, block_half)
    place = maps + t[:, None] * token + i[None, :]
    a = tl.load(place, mask=in_first, other=0.0).to(tl.float32)
    b = tl.load(place + half, mask=in_first, other=0.0).to(tl.float32)
    at = rotated + t[:, None] * rotated_token + i[None, :]
    kind = rotated.dtype.element_ty
    tl.store(at, (a * cosine - b * sine).to(kind), mask=in_first)
    tl.store(at + half, (b * cosine + a * sine).to(kind), mask=in_first)


@triton.jit(do_not_specialize=["length"])
def rotate_maps(
    B,
    C,
    cos,  # (b or 1, t, n/2) float32
    sin,
    rotated_B,  # (b, t, g, n)
    rotated_C,
    length,
    B_row,
    B_token,
    B_group,
    C_row,
    C_token,
    C_group,
    rotary_row,
    groups: tl.constexpr,
    groups_per_program: tl.constexpr,
    state_size: tl.constexpr,
    block: tl.constexpr,
    block_half: tl.constexpr,
):
    """B and C of a block of tokens, turned by the angles of their positions, which are read once for several groups."""
    half: tl.constexpr = state_size // 2
    row = tl.program_id(2).to(tl.int64)
    t = (tl.program_id(0) * block + tl.arange(0, block)).to(tl.int64)
    i = tl.arange(0, block_half)
    in_first = (t < length)[:, None] & (i < half)[None, :]
    angle = row * rotary_row + t[:, None] * half + i[None, :]
    cosine = tl.load(cos + angle, mask=in_first, other=1.0)
    sine = tl.load(sin + angle, mask=in_first, other=0.0)
    token: tl.constexpr = groups * state_size
    first_group = tl.program_id(1) * groups_per_program
    for group in range(first_group, min(first_group + groups_per_program, groups)):
        at = row * length * token + group * state_size
        _rotate_block(
            *(
                B + row * B_row + group * B_group,
                rotated_B + at,
                B_token,
                token,
                t,
                cosine,
                sine,
                in_first,
                half,
                block_half,
            )
        )
        _rotate_block(
            *(
                C + row * C_row + group * C_group,
                rotated_C + at,
                C_token,
                token,
                t,
                cosine,
                sine,
                in_first,
                half,
                block_half,
            )
        )


@triton.jit(do_not_specialize=["length"])
def sum_decays(
    dt,
    A,
    times,  # (b, h, t): dt
    sums,  # (b, h, t): the sum of dt A from the first token of its chunk up to and with each token
    length,
    dt_row,
    dt_token,
    dt_head,
    heads: tl.constexpr,
    chunk: tl.constexpr,
    block_h: tl.constexpr,
):
    c, row = tl.program_id(0), tl.program_id(2).to(tl.int64)
    h = tl.program_id(1) * block_h + tl.arange(0, block_h)
    q = tl.arange(0, chunk)
    t = (c * chunk + q).to(tl.int64)
    inside = (t < length)[:, None] & (h < heads)[None, :]
    given = tl.load(dt + row * dt_row + t[:, None] * dt_token + h[None, :] * dt_head, mask=inside, other=0.0)
    rates = tl.load(A + h, mask=h < heads, other=0.0)
    place = row * heads * length + h[None, :].to(tl.int64) * length + t[:, None]
    tl.store(times + place, given, mask=inside)
    log_decays = (given * rates[None, :]).to(sums.dtype.element_ty)
    tl.store(sums + place, tl.cumsum(log_decays, 0), mask=inside)


@triton.jit(do_not_specialize=["length", "num_chunks"])
def sum_chunks(
    rows,  # x, or the gradient of y where `backward`
    maps,  # B, or C where `backward`
    times,
    sums,
    seq_idx,
    updates,  # (b, c, h, p, n)
    length,
    num_chunks,
    rows_row,
    rows_token,
    rows_head,
    maps_row,
    maps_token,
    maps_group,
    heads: tl.constexpr,
    heads_per_group: tl.constexpr,
    head_dim: tl.constexpr,
    state_size: tl.constexpr,
    has_documents: tl.constexpr,
    backward: tl.constexpr,
    precision: tl.constexpr,
    chunk: tl.constexpr,
    block: tl.constexpr,
    block_half: tl.constexpr,
    block_p: tl.constexpr,
    stages: tl.constexpr,
):
    """What a chunk adds to the state that leaves it, Σ_k to_end_k dt_k x_k B_kᵀ; where `backward`, to the gradient of the state that
    enters it, Σ_q from_start_q dy_q C_qᵀ."""
    head, c, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    half: tl.constexpr = (state_size + 1) // 2
    q = tl.arange(0, block)
    rows += row * rows_row + head * rows_head
    maps += row * maps_row + head // heads_per_group * maps_group
    seq_idx += row * length
    times += (row * heads + head) * length
    sums += (row * heads + head) * length
    first_of_chunk = c * chunk
    end = tl.minimum(first_of_chunk + chunk, length)

    update1 = tl.zeros((block_p, block_half), tl.float32)
    update2 = tl.zeros((block_p, block_half), tl.float32)
    for first in tl.range(first_of_chunk, end, block, num_stages=stages):
        t = first + q
        in_t = t < length
        given = _load_rows(rows, rows_token, first, length, block, head_dim, block_p)
        map1, map2 = _load_maps(maps, maps_token, first, length, block, state_size, block_half)
        cumulative = tl.load(sums + t, mask=in_t, other=0.0)
        documents = t
        if has_documents:
            documents = tl.load(seq_idx + t, mask=in_t, other=0)
        if backward:
            factor = _from_start(cumulative, documents, seq_idx, first_of_chunk, has_documents)
        else:
            factor = _to_end(cumulative, documents, sums, seq_idx, end - 1, has_documents)
            factor *= tl.load(times + t, mask=in_t, other=0.0)
        weighted = tl.trans((given.to(tl.float32) * factor[:, None]).to(map1.dtype))
        update1 = tl.dot(weighted, map1, update1, input_precision=precision)
        update2 = tl.dot(weighted, map2, update2, input_precision=precision)

    p, i = tl.arange(0, block_p), tl.arange(0, block_half)
    place = ((row * num_chunks + c) * heads + head) * head_dim * state_size + p[:, None] * state_size + i[None, :]
    in_p = (p < head_dim)[:, None]
    kind = updates.dtype.element_ty
    tl.store(updates + place, update1.to(kind), mask=in_p & (i < half)[None, :])
    tl.store(updates + place + half, update2.to(kind), mask=in_p & (i < state_size - half)[None, :])


@triton.jit
def _step(step, num_chunks, token, e, inside, backward: tl.constexpr):
    """Of the chunk that is number `step` in this direction: its number, its place among the states, and what of it is inside.

    No pointer comes in. Those that the place came out with would count as written to, and be copied before a compiled launch.
    """
    is_there = step < num_chunks
    c = num_chunks - 1 - step if backward else step
    c = tl.where(is_there, c, 0)
    return c, tl.cast(c, tl.int64) * token + e, inside & is_there


@triton.jit
def _load_update(
    states, sums, seq_idx, c, place, step, num_chunks, length, inside, has_documents: tl.constexpr, chunk: tl.constexpr
):
    """The update of a chunk and the decay across it; 0 and 1 beyond the last."""
    first = c * chunk
    update = tl.load(states + place, mask=inside, other=0.0).to(tl.float32)
    across = _across(sums, seq_idx, first, tl.minimum(first + chunk, length) - 1, has_documents)
    return update, tl.where(step < num_chunks, across, 1.0)


@triton.jit(do_not_specialize=["length", "num_chunks"])
def carry_states(
    given,  # (b, h, p, n): the state before the first chunk; where `backward`, the gradient of the one after the last
    states,  # (b, c, h, p, n): what the chunks add; replaced by the state that enters each, or the gradient of the one that leaves it
    carried,  # (b, h, p, n) float32: the state after the last chunk, or the gradient of the one before the first
    sums,
    seq_idx,
    first_chunks,  # (s + 1,): where sequences side by side in one row begin and end; `given` and `carried` are then (s, h, p, n)
    length,
    num_chunks,
    heads: tl.constexpr,
    size: tl.constexpr,  # p · n
    has_given: tl.constexpr,
    has_documents: tl.constexpr,
    has_sequences: tl.constexpr,
    backward: tl.constexpr,
    chunk: tl.constexpr,
    block: tl.constexpr,
):
    """The recurrence from chunk to chunk, in float32: S ← across S + update."""
    head, row = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    e = tl.program_id(0) * block + tl.arange(0, block)
    inside = e < size
    place = row * heads + head
    state = tl.zeros((block,), tl.float32)
    if has_given:
        state = tl.load(given + place * size + e, mask=inside, other=0.0)
    if has_sequences:
        first = tl.load(first_chunks + row).to(tl.int64)
        sums += head * length + first * chunk
        states += (first * heads + head) * size
        num_chunks = (tl.load(first_chunks + row + 1) - first).to(tl.int32)
        length = num_chunks * chunk
    else:
        seq_idx += row * length
        sums += place * length
        states += (row * num_chunks * heads + head) * size
    token: tl.constexpr = heads * size
    kind = states.dtype.element_ty
    for step in tl.range(0, num_chunks, 4):
        # Loads of four chunks are under way before the first store, since the compiler moves no load over a store.
        c0, place0, inside0 = _step(step, num_chunks, token, e, inside, backward)
        update0, across0 = _load_update(
            *(states, sums, seq_idx, c0, place0, step, num_chunks, length, inside0, has_documents, chunk)
        )
        c1, place1, inside1 = _step(step + 1, num_chunks, token, e, inside, backward)
        update1, across1 = _load_update(
            *(states, sums, seq_idx, c1, place1, step + 1, num_chunks, length, inside1, has_documents, chunk)
        )
        c2, place2, inside2 = _step(step + 2, num_chunks, token, e, inside, backward)
        update2, across2 = _load_update(
            *(states, sums, seq_idx, c2, place2, step + 2, num_chunks, length, inside2, has_documents, chunk)
        )
        c3, place3, inside3 = _step(step + 3, num_chunks, token, e, inside, backward)
        update3, across3 = _load_update(
            *(states, sums, seq_idx, c3, place3, step + 3, num_chunks, length, inside3, has_documents, chunk)
        )
        tl.store(states + place0, state.to(kind), mask=inside0)
        state = across0 * state + update0
        tl.store(states + place1, state.to(kind), mask=inside1)
        state = across1 * state + update1
        tl.store(states + place2, state.to(kind), mask=inside2)
        state = across2 * state + update2
        tl.store(states + place3, state.to(kind), mask=inside3)
        state = across3 * state + update3
    tl.store(carried + place * size + e, state, mask=inside)


@triton.jit(do_not_specialize=["length", "num_chunks"])
def scan_blocks(
    x,
    B,
    C,
    D,
    times,
    sums,
    seq_idx,
    states,  # (b, c, h, p, n)
    y,  # (b, t, h, p)
    length,
    num_chunks,
    x_row,
    x_token,
    x_head,
    B_row,
    B_token,
    B_group,
    C_row,
    C_token,
    C_group,
    heads: tl.constexpr,
    heads_per_group: tl.constexpr,
    head_dim: tl.constexpr,
    state_size: tl.constexpr,
    has_D: tl.constexpr,
    has_documents: tl.constexpr,
    precision: tl.constexpr,
    chunk: tl.constexpr,
    block: tl.constexpr,
    inner: tl.constexpr,
    block_half: tl.constexpr,
    block_p: tl.constexpr,
    stages: tl.constexpr,
):
    """y of a block of tokens: y_q = from_start_q S C_q + Σ_{k ≤ q} (C_q · B_k) between_qk dt_k x_k + D x_q."""
    head, row = tl.program_id(0), tl.program_id(2).to(tl.int64)
    first = tl.program_id(1) * block
    c = first // chunk
    first_of_chunk = c * chunk
    q, p = tl.arange(0, block), tl.arange(0, block_p)
    x += row * x_row + head * x_head
    B += row * B_row + head // heads_per_group * B_group
    C += row * C_row + head // heads_per_group * C_group
    seq_idx += row * length
    times += (row * heads + head) * length
    sums += (row * heads + head) * length
    states += ((row * num_chunks + c) * heads + head) * head_dim * state_size

    t = first + q
    in_t = t < length
    C1, C2 = _load_maps(C, C_token, first, length, block, state_size, block_half)
    cumulative = tl.load(sums + t, mask=in_t, other=0.0)
    documents = t
    if has_documents:
        documents = tl.load(seq_idx + t, mask=in_t, other=0)
    state1, state2 = _load_state(states, head_dim, state_size, block_half, block_p)
    outputs = tl.dot(C1, tl.trans(state1), input_precision=precision)
    outputs = tl.dot(C2, tl.trans(state2), outputs, input_precision=precision)
    outputs *= _from_start(cumulative, documents, seq_idx, first_of_chunk, has_documents)[:, None]
    k = tl.arange(0, inner)
    for first_k in tl.range(first_of_chunk, tl.minimum(first + block, length), inner, num_stages=stages):
        t_k = first_k + k
        in_k = t_k < length
        values = _load_rows(x, x_token, first_k, length, inner, head_dim, block_p)
        B1, B2 = _load_maps(B, B_token, first_k, length, inner, state_size, block_half)
        cumulative_k = tl.load(sums + t_k, mask=in_k, other=0.0)
        times_k = tl.load(times + t_k, mask=in_k, other=0.0)
        documents_k = t_k
        if has_documents:
            documents_k = tl.load(seq_idx + t_k, mask=in_k, other=0)
        scores = tl.dot(C1, tl.trans(B1), input_precision=precision)
        scores = tl.dot(C2, tl.trans(B2), scores, input_precision=precision)
        scores *= times_k[None, :] * _between(
            *(cumulative[:, None], cumulative_k[None, :], t[:, None], t_k[None, :]),
            *(documents[:, None], documents_k[None, :], has_documents),
        )
        outputs = tl.dot(scores.to(values.dtype), values, outputs, input_precision=precision)
    if has_D:
        values = _load_rows(x, x_token, first, length, block, head_dim, block_p)
        outputs += tl.load(D + head) * values.to(tl.float32)
    token: tl.constexpr = heads * head_dim
    y += row * length * token + tl.cast(first, tl.int64) * token + head * head_dim
    inside = in_t[:, None] & (p < head_dim)[None, :]
    tl.store(y + q[:, None] * token + p[None, :], outputs.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["length", "num_chunks"])
def differentiate_queries(
    x,
    B,
    C,
    grad_y,
    times,
    sums,
    cos,
    sin,
    seq_idx,
    states,  # (b, c, h, p, n)
    grad_C,  # (b, t, parts, n)
    grad_sums,  # (b, h, t) float32: of the log decay up to each token, the part of the queries
    length,
    num_chunks,
    x_row,
    x_token,
    x_head,
    B_row,
    B_token,
    B_group,
    C_row,
    C_token,
    C_group,
    grad_y_row,
    grad_y_token,
    grad_y_head,
    rotary_row,
    heads: tl.constexpr,
    heads_per_group: tl.constexpr,
    heads_per_part: tl.constexpr,
    head_dim: tl.constexpr,
    state_size: tl.constexpr,
    rotates: tl.constexpr,
    has_documents: tl.constexpr,
    precision: tl.constexpr,
    chunk: tl.constexpr,
    block: tl.constexpr,
    inner: tl.constexpr,
    block_half: tl.constexpr,
    block_p: tl.constexpr,
    stages: tl.constexpr,
):
    """The gradient of C of a block of tokens, and of the decays to them, summed over the heads of a part of a group."""
    part, row = tl.program_id(0), tl.program_id(2).to(tl.int64)
    first = tl.program_id(1) * block
    c = first // chunk
    first_of_chunk = c * chunk
    q, k = tl.arange(0, block), tl.arange(0, inner)
    group = part * heads_per_part // heads_per_group
    B += row * B_row + group * B_group
    C += row * C_row + group * C_group
    cos += row * rotary_row
    sin += row * rotary_row
    seq_idx += row * length
    t = first + q
    in_t = t < length
    C1, C2 = _load_maps(C, C_token, first, length, block, state_size, block_half)
    documents = t
    if has_documents:
        documents = tl.load(seq_idx + t, mask=in_t, other=0)

    grad_C1 = tl.zeros((block, block_half), tl.float32)
    grad_C2 = tl.zeros((block, block_half), tl.float32)
    for head in range(part * heads_per_part, (part + 1) * heads_per_part):
        of_head = (row * heads + head) * length
        dy = _load_rows(
            grad_y + row * grad_y_row + head * grad_y_head, grad_y_token, first, length, block, head_dim, block_p
        ).to(C1.dtype)
        cumulative = tl.load(sums + of_head + t, mask=in_t, other=0.0)
        factor = _from_start(cumulative, documents, seq_idx, first_of_chunk, has_documents)
        weighted = (dy.to(tl.float32) * factor[:, None]).to(C1.dtype)
        state = states + ((row * num_chunks + c) * heads + head) * head_dim * state_size
        state1, state2 = _load_state(state, head_dim, state_size, block_half, block_p)
        through = tl.dot(weighted, state1, input_precision=precision)
        to_sums = tl.sum(C1.to(tl.float32) * through, 1)
        grad_C1 += through
        through = tl.dot(weighted, state2, input_precision=precision)
        to_sums += tl.sum(C2.to(tl.float32) * through, 1)
        grad_C2 += through
        for first_k in tl.range(first_of_chunk, tl.minimum(first + block, length), inner, num_stages=stages):
            t_k = first_k + k
            in_k = t_k < length
            values = _load_rows(x + row * x_row + head * x_head, x_token, first_k, length, inner, head_dim, block_p)
            B1, B2 = _load_maps(B, B_token, first_k, length, inner, state_size, block_half)
            cumulative_k = tl.load(sums + of_head + t_k, mask=in_k, other=0.0)
            times_k = tl.load(times + of_head + t_k, mask=in_k, other=0.0)
            documents_k = t_k
            if has_documents:
                documents_k = tl.load(seq_idx + t_k, mask=in_k, other=0)
            to_scores = tl.dot(dy, tl.trans(values), input_precision=precision)
            to_scores *= times_k[None, :] * _between(
                *(cumulative[:, None], cumulative_k[None, :], t[:, None], t_k[None, :]),
                *(documents[:, None], documents_k[None, :], has_documents),
            )
            scores = tl.dot(C1, tl.trans(B1), input_precision=precision)
            scores = tl.dot(C2, tl.trans(B2), scores, input_precision=precision)
            to_sums += tl.sum(to_scores * scores, 1)
            operand = to_scores.to(C1.dtype)
            grad_C1 = tl.dot(operand, B1, grad_C1, input_precision=precision)
            grad_C2 = tl.dot(operand, B2, grad_C2, input_precision=precision)
        tl.store(grad_sums + of_head + t, to_sums, mask=in_t)
    token: tl.constexpr = heads // heads_per_part * state_size
    grad_C += row * length * token + part * state_size
    _store_unrotated(grad_C, token, cos, sin, first, length, grad_C1, grad_C2, block, state_size, block_half, rotates)


@triton.jit(do_not_specialize=["length", "num_chunks"])
def differentiate_keys(
    x,
    B,
    C,
    D,
    grad_y,
    times,
    sums,
    cos,
    sin,
    seq_idx,
    states,  # (b, c, h, p, n)
    leaving,  # (b, c, h, p, n): gradients of the states that leave the chunks
    grad_x,  # (b, t, h, p)
    grad_B,  # (b, t, parts, n)
    grad_times,  # (b, h, t) float32: of dt, but for what passes through the decays
    grad_sums,  # (b, h, t) float32: of the log decay up to each token; read with the queries' part, written with both
    grad_ends,  # (b, h, blocks) float32: of the log decay across the chunk, by way of the block's tokens
    grad_kept,  # (b, h, c) float32: the same, by way of the state that enters the chunk
    grad_D,  # (b, h, blocks) float32
    length,
    num_chunks,
    x_row,
    x_token,
    x_head,
    B_row,
    B_token,
    B_group,
    C_row,
    C_token,
    C_group,
    grad_y_row,
    grad_y_token,
    grad_y_head,
    rotary_row,
    heads: tl.constexpr,
    heads_per_group: tl.constexpr,
    heads_per_part: tl.constexpr,
    head_dim: tl.constexpr,
    state_size: tl.constexpr,
    rotates: tl.constexpr,
    has_D: tl.constexpr,
    has_documents: tl.constexpr,
    precision: tl.constexpr,
    chunk: tl.constexpr,
    block: tl.constexpr,
    inner: tl.constexpr,
    block_half: tl.constexpr,
    block_p: tl.constexpr,
    stages: tl.constexpr,
):
    """The gradients of x, dt and B of a block of tokens, and of the decays from them; that of B summed over a part of a group's heads."""
    part, row = tl.program_id(0), tl.program_id(2).to(tl.int64)
    first = tl.program_id(1) * block
    c = first // chunk
    first_of_chunk = c * chunk
    end = tl.minimum(first_of_chunk + chunk, length)
    k, q, p = tl.arange(0, block), tl.arange(0, inner), tl.arange(0, block_p)
    group = part * heads_per_part // heads_per_group
    B += row * B_row + group * B_group
    C += row * C_row + group * C_group
    cos += row * rotary_row
    sin += row * rotary_row
    seq_idx += row * length
    t = first + k
    in_t = t < length
    B1, B2 = _load_maps(B, B_token, first, length, block, state_size, block_half)
    documents = t
    if has_documents:
        documents = tl.load(seq_idx + t, mask=in_t, other=0)

    grad_B1 = tl.zeros((block, block_half), tl.float32)
    grad_B2 = tl.zeros((block, block_half), tl.float32)
    for head in range(part * heads_per_part, (part + 1) * heads_per_part):
        of_head = (row * heads + head) * length
        values = _load_rows(x + row * x_row + head * x_head, x_token, first, length, block, head_dim, block_p)
        cumulative = tl.load(sums + of_head + t, mask=in_t, other=0.0)
        times_k = tl.load(times + of_head + t, mask=in_t, other=0.0)
        of_state = ((row * num_chunks + c) * heads + head) * head_dim * state_size
        leaving1, leaving2 = _load_state(leaving + of_state, head_dim, state_size, block_half, block_p)
        to_end = _to_end(cumulative, documents, sums + of_head, seq_idx, end - 1, has_documents)
        # S' = across S + Σ_k to_end_k dt_k x_k B_kᵀ. `to_values` is the gradient of dt x.
        to_values = tl.dot(B1, tl.trans(leaving1), input_precision=precision)
        to_values = tl.dot(B2, tl.trans(leaving2), to_values, input_precision=precision) * to_end[:, None]
        to_times = tl.sum(to_values * values.to(tl.float32), 1)
        to_sums = -times_k * to_times
        to_end_of_chunk = tl.sum(times_k * to_times, 0)
        weighted = (values.to(tl.float32) * (to_end * times_k)[:, None]).to(values.dtype)
        grad_B1 = tl.dot(weighted, leaving1, grad_B1, input_precision=precision)
        grad_B2 = tl.dot(weighted, leaving2, grad_B2, input_precision=precision)

        for first_q in tl.range(first, end, inner, num_stages=stages):
            t_q = first_q + q
            in_q = t_q < length
            dy = _load_rows(
                grad_y + row * grad_y_row + head * grad_y_head, grad_y_token, first_q, length, inner, head_dim, block_p
            ).to(values.dtype)
            C1, C2 = _load_maps(C, C_token, first_q, length, inner, state_size, block_half)
            cumulative_q = tl.load(sums + of_head + t_q, mask=in_q, other=0.0)
            documents_q = t_q
            if has_documents:
                documents_q = tl.load(seq_idx + t_q, mask=in_q, other=0)
            between = _between(
                *(cumulative_q[None, :], cumulative[:, None], t_q[None, :], t[:, None]),
                *(documents_q[None, :], documents[:, None], has_documents),
            )
            scores = tl.dot(B1, tl.trans(C1), input_precision=precision)
            scores = tl.dot(B2, tl.trans(C2), scores, input_precision=precision) * between  # (k, q)
            to_scores = tl.dot(values, tl.trans(dy), input_precision=precision)
            moved = tl.sum(to_scores * scores, 1)
            to_times += moved
            to_sums -= times_k * moved
            to_values = tl.dot(scores.to(values.dtype), dy, to_values, input_precision=precision)
            operand = (to_scores * between * times_k[:, None]).to(values.dtype)
            grad_B1 = tl.dot(operand, C1, grad_B1, input_precision=precision)
            grad_B2 = tl.dot(operand, C2, grad_B2, input_precision=precision)

        dx = to_values * times_k[:, None]
        at_block = (row * heads + head) * tl.num_programs(1) + tl.program_id(1)
        if has_D:
            dy = _load_rows(
                grad_y + row * grad_y_row + head * grad_y_head, grad_y_token, first, length, block, head_dim, block_p
            ).to(tl.float32)
            dx += tl.load(D + head) * dy
            tl.store(grad_D + at_block, tl.sum(tl.sum(dy * values.to(tl.float32), 1), 0))
        token: tl.constexpr = heads * head_dim
        at = grad_x + row * length * token + tl.cast(first, tl.int64) * token + head * head_dim
        inside = in_t[:, None] & (p < head_dim)[None, :]
        tl.store(at + k[:, None] * token + p[None, :], dx.to(grad_x.dtype.element_ty), mask=inside)
        tl.store(grad_times + of_head + t, to_times, mask=in_t)
        to_sums += tl.load(grad_sums + of_head + t, mask=in_t, other=0.0)
        tl.store(grad_sums + of_head + t, to_sums, mask=in_t)
        tl.store(grad_ends + at_block, to_end_of_chunk)
    maps_token: tl.constexpr = heads // heads_per_part * state_size
    grad_B += row * length * maps_token + part * state_size
    _store_unrotated(
        grad_B, maps_token, cos, sin, first, length, grad_B1, grad_B2, block, state_size, block_half, rotates
    )
    if first == first_of_chunk:  # here, where no other large tile is in the registers
        for head in range(part * heads_per_part, (part + 1) * heads_per_part):
            of_state = ((row * num_chunks + c) * heads + head) * head_dim * state_size
            state1, state2 = _load_state(states + of_state, head_dim, state_size, block_half, block_p)
            leaving1, leaving2 = _load_state(leaving + of_state, head_dim, state_size, block_half, block_p)
            kept = tl.sum(tl.sum(leaving1.to(tl.float32) * state1.to(tl.float32), 1), 0)
            kept += tl.sum(tl.sum(leaving2.to(tl.float32) * state2.to(tl.float32), 1), 0)
            kept *= _across(sums + (row * heads + head) * length, seq_idx, first_of_chunk, end - 1, has_documents)
            tl.store(grad_kept + (row * heads + head) * num_chunks + c, kept)


@triton.jit(do_not_specialize=["length", "num_blocks"])
def differentiate_decays(
    A,
    times,
    grad_times,
    grad_sums,
    grad_ends,
    grad_kept,
    grad_dt,  # (b, t, h) float32
    grad_A,  # (b, c, h) float32
    length,
    num_blocks,
    heads: tl.constexpr,
    chunk: tl.constexpr,
    blocks: tl.constexpr,  # of a chunk
    block_h: tl.constexpr,
):
    """The gradients of dt and A through the decays: the sum at q has dt_k A for all k ≤ q of its chunk."""
    c, row = tl.program_id(0), tl.program_id(2).to(tl.int64)
    h = tl.program_id(1) * block_h + tl.arange(0, block_h)
    q = tl.arange(0, chunk)
    t = (c * chunk + q).to(tl.int64)
    in_h = h < heads
    inside = (t < length)[:, None] & in_h[None, :]
    place = row * heads * length + h[None, :].to(tl.int64) * length + t[:, None]
    to_sums = tl.load(grad_sums + place, mask=inside, other=0.0)
    j = c * blocks + tl.arange(0, blocks)
    at_ends = row * heads * num_blocks + h[None, :].to(tl.int64) * num_blocks + j[:, None]
    ends = tl.sum(tl.load(grad_ends + at_ends, mask=(j < num_blocks)[:, None] & in_h[None, :], other=0.0), 0)
    ends += tl.load(grad_kept + (row * heads + h) * tl.num_programs(0) + c, mask=in_h, other=0.0)
    to_log_decays = tl.cumsum(to_sums, 0, reverse=True) + ends[None, :]
    rates = tl.load(A + h, mask=in_h, other=0.0)
    given = tl.load(times + place, mask=inside, other=0.0)
    to_dt = tl.load(grad_times + place, mask=inside, other=0.0) + rates[None, :] * to_log_decays
    tl.store(grad_dt + row * length * heads + t[:, None] * heads + h[None, :], to_dt, mask=inside)
    tl.store(grad_A + (row * tl.num_programs(0) + c) * heads + h, tl.sum(given * to_log_decays, 0), mask=in_h)
