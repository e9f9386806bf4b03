"""Attention of one new token to all tokens before it, which is bound by the bandwidth of reading keys and values.

Letters: b batch, h heads, k key-value heads, r = h/k heads that share one, t time, d head_dim.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from transxssm.ops.csrc import kernels_of
from transxssm.ops.dispatch import (
    COMPILED,
    ON_CPU,
    Backend,
    Op,
    cpp_shortfall,
    eager_cpp_refusal,
    eager_triton_refusal,
    triton_shortfall,
)

# Keys or values that are upcast to float32 at once, over all heads and rows: 4 MiB.
BLOCK_ELEMENTS = 2**20
_WIDEST_GPU_HEAD_BYTES = 512


def single_query_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, scaling: float, backend: str | None = None
) -> Tensor:
    """softmax(scaling · q kᵀ) v for one query a row; scores and sums are float32. Not differentiable.

    Backends, in order of preference:
        "triton": split-KV decoding attention (Flash-Decoding) on a GPU, for heads with keys of their own. Keys and values are read once.
        "cpp": float32 and bfloat16 on a CPU: split-KV decoding attention in C++. Keys and values are read once, in their own format.
        "blocks": half precision on a CPU. Blocks of keys are upcast to float32, which a product then reads from the cache.
        "sdpa": torch's `scaled_dot_product_attention`, everywhere else and in a compiled graph.

    Args:
        q: (b, h, 1, d). k, v: (b, k, t, d), of any strides; heads r·i … r·i + r − 1 share number i.
        mask: (b or 1, 1, 1, t) bool, False where a key is not seen. Defaults to seeing all. A row that sees none gets the mean of v.
        scaling: factor of the scores.
        backend: one of the names above. Defaults to the first that takes the call.

    Returns:
        (b, h, 1, d) in q's dtype.

    Raises:
        ValueError: shapes do not fit, or the requested backend does not take the call.
    """
    batch, heads, queries, head_dim = q.shape
    is_fit = k.shape == v.shape and k.shape[::3] == (batch, head_dim) and 0 not in k.shape[1:]
    if not is_fit or queries != 1 or heads % k.shape[1]:
        raise ValueError(
            f"expected q (b, h, 1, d) and k, v (b, k, t, d), h a multiple of k: got {[*map(tuple, (q, k, v))]}"
        )
    if mask is not None and (mask.shape[0] not in (1, len(q)) or mask.shape[1:] != (1, 1, k.shape[2])):
        raise ValueError(f"mask must have shape ({len(q)} or 1, 1, 1, {k.shape[2]}): got {tuple(mask.shape)}")
    output: Tensor = SINGLE_QUERY_ATTENTION.choose(backend, q, k, v).forward(q, k, v, mask, scaling)
    return output


def has_single_query_attention(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether this is one query, and `single_query_attention` is faster than torch's attention."""
    return q.shape[2] == 1 and SINGLE_QUERY_ATTENTION.choose(None, q, k, v).name != "sdpa"


def _cpp_refusal(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    if not q.dtype == k.dtype == v.dtype:
        return "it takes q, k and v of one dtype"
    return eager_cpp_refusal(q, k, v)


def _blocks_refusal(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    if q.device.type != "cpu":
        return ON_CPU
    if q.dtype not in (torch.bfloat16, torch.float16):
        return "it is for half precision"
    return COMPILED if torch.compiler.is_compiling() else None


def _kernel_refusal(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    if q.shape[1] != k.shape[1]:
        return "the kernel takes heads with keys of their own, since it would read shared ones once for each head"
    if q.shape[3] * k.dtype.itemsize > _WIDEST_GPU_HEAD_BYTES:
        return f"the kernel takes heads of at most {_WIDEST_GPU_HEAD_BYTES} bytes"
    return eager_triton_refusal(q, k, v)


def _by_kernel(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    if torch.compiler.is_compiling():
        return _for_the_compiler(q, k, v, mask, scaling)
    from transxssm.ops.single_query_attention_triton import attend_once  # which imports Triton

    return attend_once(q.detach(), k.detach(), v.detach(), mask, scaling)


def _by_cpp(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    batch, heads, _, head_dim = q.shape
    length, kernels = k.shape[2], kernels_of(q.dtype)
    q, k, v = (each if each.stride(-1) == 1 else each.contiguous() for each in (q, k, v))
    output = q.new_empty(batch, heads, 1, head_dim)
    partial = q.new_empty(batch, heads, kernels.num_splits(length), head_dim + 2, dtype=torch.float32)
    call = kernels.structure(
        "SingleQuery",
        batch=batch,
        heads=heads,
        key_heads=k.shape[1],
        length=length,
        head_dim=head_dim,
        threads=torch.get_num_threads(),
        q_row=q.stride(0),
        q_head=q.stride(1),
        k_row=k.stride(0),
        k_head=k.stride(1),
        k_token=k.stride(2),
        v_row=v.stride(0),
        v_head=v.stride(1),
        v_token=v.stride(2),
        q=q,
        k=k,
        v=v,
        partial=partial,
        output=output,
        scaling=scaling,
    )
    if mask is not None:
        call.fill(mask_rows=len(mask), mask=mask.contiguous().view(torch.uint8))
    kernels.run("attend_once", call)
    return output


def _in_blocks(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    batch, heads, _, head_dim = q.shape
    _, key_heads, length, _ = k.shape
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        queries = (q.float() * scaling).reshape(batch * key_heads, -1, head_dim)  # (b k, r, d)
        scores = queries.new_empty(*queries.shape[:2], length)
        size = min(length, max(1, BLOCK_ELEMENTS // (batch * key_heads * head_dim)))
        upcast = queries.new_empty(batch, key_heads, size, head_dim)
        blocks = [slice(start, min(start + size, length)) for start in range(0, length, size)]
        for block in blocks:
            keys = upcast[:, :, : block.stop - block.start].copy_(k[:, :, block]).flatten(0, 1)
            scores[..., block] = queries @ keys.mT
        if mask is not None:
            scores.view(batch, heads, length).masked_fill_(~mask[:, 0], torch.finfo(scores.dtype).min)
        weights = scores.softmax(-1)
        output = torch.zeros_like(queries)
        for block in blocks:
            values = upcast[:, :, : block.stop - block.start].copy_(v[:, :, block]).flatten(0, 1)
            output.baddbmm_(weights[..., block], values)
    return output.view(batch, heads, 1, head_dim).to(q.dtype)


def _by_torch(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    if q.shape[1] != k.shape[1]:
        k, v = (tensor.repeat_interleave(q.shape[1] // tensor.shape[1], dim=1) for tensor in (k, v))
    if mask is not None:
        q = q * mask.any(-1, keepdim=True).to(
            q.dtype
        )  # equal scores for a row that sees no key, so that it gets the mean of v
        # This is not the least number, since kernels multiply it by log2(e): it would become −∞, and the mean NaN or 0.
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, torch.finfo(q.dtype).min / 2)
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        return F.scaled_dot_product_attention(q, k.to(q.dtype), v.to(q.dtype), mask, scale=scaling)


@torch.library.custom_op("transxssm::single_query_attention", mutates_args=())
def _for_the_compiler(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """The kernel as an operator that the compiler does not trace into, since the number of splits depends on the number of keys."""
    from transxssm.ops.single_query_attention_triton import attend_once  # which imports Triton

    return attend_once(q, k, v, mask, scaling)


@_for_the_compiler.register_fake
def _empty_output(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    return q.new_empty(q.shape)


SINGLE_QUERY_ATTENTION = Op(
    "single_query_attention",
    (
        Backend("triton", _by_kernel, refusal=_kernel_refusal, shortfall=triton_shortfall),
        Backend("cpp", _by_cpp, refusal=_cpp_refusal, shortfall=cpp_shortfall),
        Backend("blocks", _in_blocks, refusal=_blocks_refusal),
        Backend("sdpa", _by_torch),
    ),
    call=lambda q, k, v, *others, **options: (q, k, v),
)
