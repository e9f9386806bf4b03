"""The "triton" backend of `single_query_attention`: split-KV decoding attention (Flash-Decoding), which reads keys and values once.

Letters: b batch, h heads, t time, d head_dim.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from transxssm.ops.devices import launched_on, power_of_2

_KEYS = 128  # in a block, if so many fit
_STAGES, _WARPS = 3, 4  # blocks of keys and values in flight; warps of a program
_SHARED_BYTES = 96 * 1024  # for these blocks: two programs to a processor of an H100
_SHARED_PART = 0.75  # share of the shared memory that a program may have on this GPU
_MIN_PART = 256  # the fewest keys of a part
_PROGRAMS_PER_PROCESSOR = 8  # that saturate the memory


def attend_once(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """(b, h, 1, d) in q's dtype. Every head has its own keys and values, (b, h, t, d).

    A program works through one part of the keys of a head. If rows and heads are too few to keep the GPU busy, the keys of a head are split
    into several parts, whose results a second kernel combines.
    """
    batch, heads, _, head_dim = q.shape
    length = k.shape[2]
    q, k, v = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (q, k, v))
    output = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if output.numel() == 0:
        return output
    block_d = power_of_2(head_dim)
    num_keys = _num_keys(block_d * k.dtype.itemsize, q.device)
    part_length = _part_length(batch * heads, length, num_keys, q.device)
    num_parts = triton.cdiv(length, part_length)
    found, weights = output, output  # a single part writes the output itself
    if num_parts > 1:
        found = torch.empty((batch, heads, num_parts, head_dim), dtype=torch.float32, device=q.device)
        weights = torch.empty((batch, heads, num_parts, 2), dtype=torch.float32, device=q.device)
    seen, seen_strides = q, (0, 0)  # q stands for what is not read
    if mask is not None:
        seen, seen_strides = mask.view(torch.uint8), (0 if mask.shape[0] == 1 else mask.stride(0), mask.stride(3))
    with launched_on(q.device):
        _attend_part[(batch * heads, num_parts)](
            *(q, k, v, seen, found, weights),
            *(*q.stride()[:2], *k.stride()[:3], *v.stride()[:3], *seen_strides),
            length,
            part_length,
            scaling / math.log(2),
            heads=heads,
            head_dim=head_dim,
            has_mask=mask is not None,
            is_whole=num_parts == 1,
            block_t=num_keys,
            block_d=block_d,
            stages=_STAGES,
            num_warps=_WARPS,
        )
        if num_parts > 1:
            _join_parts[(batch * heads,)](
                *(found, weights, output, num_parts),
                head_dim=head_dim,
                block_parts=power_of_2(num_parts),
                block_d=block_d,
            )
    return output


def _num_keys(bytes_per_key: int, device: torch.device) -> int:
    """Keys in a block, such that all blocks in flight fit into the shared memory of a multiprocessor. Heads have at most 512 bytes."""
    room = _SHARED_BYTES
    if device.type == "cuda":
        most = getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 64 * 1024)
        room = min(room, int(_SHARED_PART * most))
    num_keys = _KEYS
    while num_keys > 16 and 2 * _STAGES * num_keys * bytes_per_key > room:
        num_keys //= 2
    return num_keys


def _part_length(num_heads: int, length: int, num_keys: int, device: torch.device) -> int:
    """The number of keys in a part, a multiple of the block."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    wanted = triton.cdiv(_PROGRAMS_PER_PROCESSOR * processors, num_heads)
    num_parts = max(1, min(wanted, length // _MIN_PART))
    return triton.cdiv(triton.cdiv(length, num_parts), num_keys) * num_keys


@triton.jit(do_not_specialize=["length", "part_length"])
def _attend_part(
    q,
    k,
    v,
    seen,
    found,
    weights,
    q_row,
    q_head,
    k_row,
    k_head,
    k_time,
    v_row,
    v_head,
    v_time,
    seen_row,
    seen_time,
    length,
    part_length,
    scaling,
    heads: tl.constexpr,
    head_dim: tl.constexpr,
    has_mask: tl.constexpr,
    is_whole: tl.constexpr,
    block_t: tl.constexpr,
    block_d: tl.constexpr,
    stages: tl.constexpr,
):
    """Each lane i keeps a maximum, a sum and an output for the keys t ≡ i (mod block_t), combined at the end, so that lanes do not wait."""
    place, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, head = place // heads, place % heads
    d = tl.arange(0, block_d)
    in_d = d < head_dim
    query = tl.load(q + row * q_row + head * q_head + d, mask=in_d, other=0.0).to(tl.float32) * scaling
    keys = k + row * k_row + head * k_head
    values = v + row * v_row + head * v_head

    most = tl.full((block_t,), -1e38, tl.float32)
    total = tl.zeros((block_t,), tl.float32)
    sums = tl.zeros((block_t, block_d), tl.float32)
    start = part * part_length
    for first in tl.range(start, min(start + part_length, length), block_t, num_stages=stages):
        t = first + tl.arange(0, block_t)
        in_t = t < length
        inside = in_t[:, None] & in_d[None, :]
        time = t.to(tl.int64)[:, None]
        key = tl.load(keys + time * k_time + d[None, :], mask=inside, other=0.0)
        value = tl.load(values + time * v_time + d[None, :], mask=inside, other=0.0)
        score = tl.sum(key.to(tl.float32) * query[None, :], axis=1)
        score = tl.where(in_t, score, -1e38)
        if has_mask:
            is_seen = tl.load(seen + row * seen_row + t.to(tl.int64) * seen_time, mask=in_t, other=0)
            score = tl.where(is_seen != 0, score, -1e38)
        higher = tl.maximum(most, score)
        kept = tl.exp2(most - higher)
        weight = tl.where(in_t, tl.exp2(score - higher), 0.0)
        total = total * kept + weight
        sums = sums * kept[:, None] + weight[:, None] * value.to(tl.float32)
        most = higher

    highest = tl.max(most, axis=0)
    share = tl.exp2(most - highest)
    whole = tl.sum(total * share, axis=0)
    result = tl.sum(sums * share[:, None], axis=0) / whole
    if is_whole:
        tl.store(found + place * head_dim + d, result.to(found.dtype.element_ty), mask=in_d)
    else:
        slot = place * tl.num_programs(1) + part
        tl.store(found + slot * head_dim + d, result, mask=in_d)
        tl.store(weights + 2 * slot, highest)
        tl.store(weights + 2 * slot + 1, whole)


@triton.jit
def _join_parts(
    found,
    weights,
    output,
    num_parts,
    head_dim: tl.constexpr,
    block_parts: tl.constexpr,
    block_d: tl.constexpr,
):
    """A program combines the results of all parts of one head."""
    place = tl.program_id(0).to(tl.int64)
    part, d = tl.arange(0, block_parts), tl.arange(0, block_d)
    in_parts, in_d = part < num_parts, d < head_dim
    weight = weights + 2 * (place * num_parts + part)
    highest = tl.load(weight, mask=in_parts, other=-1e38)
    share = tl.load(weight + 1, mask=in_parts, other=0.0) * tl.exp2(highest - tl.max(highest, axis=0))
    share = share / tl.sum(share, axis=0)
    parts = found + (place * num_parts + part[:, None]) * head_dim + d[None, :]
    results = tl.load(parts, mask=in_parts[:, None] & in_d[None, :], other=0.0)
    result = tl.sum(results * share[:, None], axis=0)
    tl.store(output + place * head_dim + d, result.to(output.dtype.element_ty), mask=in_d)
