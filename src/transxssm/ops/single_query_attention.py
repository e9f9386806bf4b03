"""Attention of one new token to all that came before it, at the speed at which memory gives keys and values.

Letters: b batch, h heads, k key-value heads, r = h/k heads that share one, t time, d head_dim.
"""

import torch
from torch import Tensor

from transxssm.ops.gpu import has_gpu_kernels

# Keys or values that are raised to float32 at once, over all heads and rows: 4 MiB.
BLOCK_ELEMENTS = 2**20
_WIDEST_GPU_HEAD_BYTES = 512


def single_query_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, scaling: float) -> Tensor:
    """softmax(scaling · q kᵀ) v for one query a row; scores and sums are float32. Not differentiable.

    torch's kernel for CPUs reads half-precision keys at some 4 GB/s when there is one query. Here blocks of them are raised to
    float32, which a product then reads from the cache: three times as fast. On a GPU a kernel reads them once
    (ops/gpu/single_query_attention.py), where flash attention would compute a tile of queries for the one.

    Args:
        q: (b, h, 1, d). k, v: (b, k, t, d), of any strides; heads r·i … r·i + r − 1 share number i.
        mask: (b or 1, 1, 1, t) bool, False where a key is not seen; None: all are. A row that sees none gets the mean of v.
        scaling: of the scores.

    Returns:
        (b, h, 1, d) in q's dtype.

    Raises:
        ValueError: a mask of another shape.
    """
    if mask is not None and (mask.shape[0] not in (1, len(q)) or mask.shape[1:] != (1, 1, k.shape[2])):
        raise ValueError(f"mask must have shape ({len(q)} or 1, 1, 1, {k.shape[2]}): got {tuple(mask.shape)}")
    if _has_gpu_kernel(q, k, v):
        if torch.compiler.is_compiling():
            return _for_the_compiler(q, k, v, mask, scaling)
        from transxssm.ops.gpu.single_query_attention import attend_once  # which imports Triton

        return attend_once(q.detach(), k.detach(), v.detach(), mask, scaling)
    batch, heads, _, head_dim = q.shape
    _, key_heads, length, _ = k.shape
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        queries = (q.float() * scaling).reshape(batch * key_heads, -1, head_dim)  # (b k, r, d)
        scores = queries.new_empty(*queries.shape[:2], length)
        size = min(length, max(1, BLOCK_ELEMENTS // (batch * key_heads * head_dim)))
        raised = queries.new_empty(batch, key_heads, size, head_dim)
        blocks = [slice(start, min(start + size, length)) for start in range(0, length, size)]
        for block in blocks:
            keys = raised[:, :, : block.stop - block.start].copy_(k[:, :, block]).flatten(0, 1)
            scores[..., block] = queries @ keys.mT
        if mask is not None:
            scores.view(batch, heads, length).masked_fill_(~mask[:, 0], torch.finfo(scores.dtype).min)
        weights = scores.softmax(-1)
        output = torch.zeros_like(queries)
        for block in blocks:
            values = raised[:, :, : block.stop - block.start].copy_(v[:, :, block]).flatten(0, 1)
            output.baddbmm_(weights[..., block], values)
    return output.view(batch, heads, 1, head_dim).to(q.dtype)


def has_single_query_attention(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `single_query_attention` is faster than torch's attention: in half precision on a CPU, and where a GPU has its kernel."""
    if q.shape[2] != 1:
        return False
    is_slow_in_torch = q.device.type == "cpu" and q.dtype in (torch.bfloat16, torch.float16)
    return (is_slow_in_torch and not torch.compiler.is_compiling()) or _has_gpu_kernel(q, k, v)


def _has_gpu_kernel(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """For heads with keys of their own: shared ones would be read once for each head. Of wide ones no block fits into a processor."""
    return (
        q.shape[1] == k.shape[1]
        and q.shape[3] * k.dtype.itemsize <= _WIDEST_GPU_HEAD_BYTES
        and has_gpu_kernels(q, k, v)
    )


@torch.library.custom_op("transxssm::single_query_attention", mutates_args=())
def _for_the_compiler(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """The same as an operator, into which the compiler doesn't look: how keys are split depends on their number."""
    return single_query_attention(q, k, v, mask, scaling=scaling)


@_for_the_compiler.register_fake
def _empty_output(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    return q.new_empty(q.shape)
