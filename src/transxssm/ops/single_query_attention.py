"""Attention of one new token to all that came before it, at the speed at which a CPU reads half-precision keys and values.

Letters: b batch, h heads, k key-value heads, r = h/k heads that share one, t time, d head_dim.
"""

import torch
from torch import Tensor

# Keys or values that are raised to float32 at once, over all heads and rows: 4 MiB.
BLOCK_ELEMENTS = 2**20


def single_query_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, scaling: float) -> Tensor:
    """softmax(scaling · q kᵀ) v for one query a row. Not differentiable.

    torch's kernel for CPUs reads half-precision keys at some 4 GB/s when there is one query. Here blocks of them are raised to
    float32, which a product then reads from the cache: three times as fast, and scores and sums are float32.

    Args:
        q: (b, h, 1, d). k, v: (b, k, t, d), of any strides; heads r·i … r·i + r − 1 share number i.
        mask: (b or 1, 1, 1, t) bool, False where a key is not seen; None: all are. A row that sees none gets the mean of v.
        scaling: of the scores.

    Returns:
        (b, h, 1, d) in q's dtype.
    """
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
