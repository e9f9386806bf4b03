"""Causal attention over ranges of keys, with kernels for bfloat16 on CPUs: see ops/csrc/attention.cpp.

Letters: b batch, h heads, k key-value heads, t time, d head_dim.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from transxssm.ops.csrc import Kernels, Structure, has_bf16_gemm, kernels_for, kernels_inside_operator
from transxssm.ops.watched import is_exporting

# What attention.cpp works in: heads of whole pairs of vectors, blocks of keys.
_HEAD_DIM_STEP, _WIDEST_HEAD, _KEYS = 32, 128, 128


def causal_attention(q: Tensor, k: Tensor, v: Tensor, first_keys: Tensor | None = None, *, scaling: float) -> Tensor:
    """softmax(scaling · q kᵀ) v, in which query i sees the keys first_keys_i … i; scores and sums are float32.

    The processor's own kernels where it has them: bfloat16 on a CPU with such products (AVX-512), heads of 32, 64, 96 or 128. They
    know of no mask, so that what documents or a window hide costs nothing. Else torch's SDPA. Not twice differentiable.

    Args:
        q: (b, h, t, d). k, v: (b, k, t, d); heads r·i … r·i + r − 1 of the h = r k share number i.
        first_keys: (b, t) int32, at most the query's own place and never falling along a row; None: zeros, as are negative ones.
        scaling: of the scores, more than 0.

    Returns:
        (b, h, t, d) in q's dtype.

    Raises:
        ValueError: shapes do not fit; a scaling of 0 or less, for which torch's kernels give NaN.
    """
    batch, heads, length, _ = q.shape
    is_fit = k.shape == v.shape and k.shape[::2] == (batch, length) and k.shape[3] == q.shape[3]
    if not is_fit or k.shape[1] == 0 or heads % k.shape[1]:
        raise ValueError(
            f"expected q (b, h, t, d) and k, v (b, k, t, d), h a multiple of k: got {[*map(tuple, (q, k, v))]}"
        )
    if scaling <= 0:
        raise ValueError(f"scaling must be more than 0: got {scaling}")
    if first_keys is not None and first_keys.shape != (batch, length):
        raise ValueError(f"first_keys must have shape {(batch, length)}: got {tuple(first_keys.shape)}")
    if has_attention_kernels(q, k, v):
        return _attention(q, k, v, first_keys, scaling)[0]
    return _by_torch(q, k, v, first_keys, scaling)


def has_attention_kernels(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `causal_attention` has kernels for these."""
    is_fit = q.device.type == "cpu" and q.shape[-1] % _HEAD_DIM_STEP == 0 and 0 < q.shape[-1] <= _WIDEST_HEAD
    if not is_fit or not (q.dtype == k.dtype == v.dtype == torch.bfloat16) or is_exporting():
        return False
    # The compiler takes the operator as it is: it has no better one.
    return (torch.compiler.is_compiling() or kernels_for(q, k, v) is not None) and has_bf16_gemm()


def _by_torch(q: Tensor, k: Tensor, v: Tensor, first_keys: Tensor | None, scaling: float) -> Tensor:
    if q.shape[1] != k.shape[1]:
        k, v = (tensor.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for tensor in (k, v))
    if first_keys is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling)
    return F.scaled_dot_product_attention(q, k, v, _seen(q, first_keys), scale=scaling)


def _seen(q: Tensor, first_keys: Tensor | None) -> Tensor:
    """(b or 1, 1, t, t): which keys each query sees."""
    places = torch.arange(q.shape[2], device=q.device)
    seen = (places <= places[:, None])[None]
    return (seen if first_keys is None else seen & (places >= first_keys[..., None]))[:, None]


def _by_formula(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, first_keys: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v in float32, from all scores at once: an operator has no autograd inside."""
    key_heads = k.shape[1]
    grad, q = (tensor.float().unflatten(1, (key_heads, -1)) for tensor in (grad, q))  # (b, k, r, t, d)
    k, v = k.float()[:, :, None], v.float()[:, :, None]
    scores = (scaling * q @ k.mT).masked_fill(~_seen(q[:, :, 0], first_keys)[:, :, None], -torch.inf)
    weights = scores.softmax(-1)
    to_weights = grad @ v.mT
    to_scores = scaling * weights * (to_weights - (weights * to_weights).sum(-1, keepdim=True))
    return (to_scores @ k).flatten(1, 2), (to_scores.mT @ q).sum(2), (weights.mT @ grad).sum(2)


@torch.library.custom_op("transxssm::causal_attention", mutates_args=())
def _attention(q: Tensor, k: Tensor, v: Tensor, first_keys: Tensor | None, scaling: float) -> tuple[Tensor, Tensor]:
    """The output, and the logarithms of the sums of exponentials: (b, h, t), float32.

    Programs are exported where there are kernels and run where there may be none: then torch's attention, without the sums.
    """
    output, log_sums = _empty_outputs(q, k, v, first_keys, scaling)
    kernels = _kernels(q, k, v, first_keys)
    if kernels is None:
        return output.copy_(_by_torch(q, k, v, first_keys, scaling)), log_sums.zero_()
    call = _description(kernels, q, k, v, first_keys, scaling, output, log_sums)
    kernels.run("attend", call, _workspace(k), _workspace(k))
    return output, log_sums


@_attention.register_fake
def _empty_outputs(q: Tensor, k: Tensor, v: Tensor, first_keys: Tensor | None, scaling: float) -> tuple[Tensor, Tensor]:
    return _empty_heads(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("transxssm::causal_attention_backward", mutates_args=())
def _attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first_keys: Tensor | None,
    output: Tensor,
    log_sums: Tensor,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    gradients = _empty_gradients(grad, q, k, v, first_keys, output, log_sums, scaling)
    kernels = _kernels(q, k, v, first_keys, output, log_sums, grad)
    if kernels is None:
        for gradient, value in zip(gradients, _by_formula(grad, q, k, v, first_keys, scaling), strict=True):
            gradient.copy_(value)
        return gradients
    rows = (q.shape[0], q.shape[1], _padded(q.shape[2]))
    description = kernels.structure(
        "AttentionGradients",
        **dict(zip(("grad_q", "grad_k", "grad_v"), gradients, strict=True)),
        **{name: _workspace(q) for name in ("q_T_packed", "q_packed", "grad_T_packed", "grad_packed")},
        k_T=_workspace(k),
        sums_q=_workspace(q, torch.float32),
        **{name: q.new_empty(rows, dtype=torch.float32) for name in ("dots", "log2_sums")},
    )
    call = _description(kernels, q, k, v, first_keys, scaling, output, log_sums, grad)
    kernels.run("attend_backward", call, description)
    return gradients


@_attention_backward.register_fake
def _empty_gradients(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first_keys: Tensor | None,
    output: Tensor,
    log_sums: Tensor,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_heads(q), _empty_heads(k), _empty_heads(v)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scaling = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    return *_attention_backward(grad, *ctx.saved_tensors, ctx.scaling), None, None


_attention.register_autograd(_backward, setup_context=_save_for_backward)


def _empty_heads(like: Tensor) -> Tensor:
    """(b, h, t, d), a token's heads side by side, as projections want them."""
    batch, heads, length, head_dim = like.shape
    return like.new_empty(batch, length, heads, head_dim).transpose(1, 2)


def _kernels(q: Tensor, *others: Tensor | None) -> Kernels | None:
    return kernels_inside_operator(q, *others) if q.dtype == torch.bfloat16 and has_bf16_gemm() else None


def _padded(length: int) -> int:
    return -(-length // _KEYS) * _KEYS


def _workspace(heads: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """For a head after the other: (b, h, padded t, d)."""
    batch, num_heads, length, head_dim = heads.shape
    return heads.new_empty(batch, num_heads, _padded(length), head_dim, dtype=dtype)


def _description(
    kernels: Kernels,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first_keys: Tensor | None,
    scaling: float,
    output: Tensor,
    log_sums: Tensor,
    grad: Tensor | None = None,
) -> Structure:
    """`struct Attention` of ops/csrc/attention.cpp."""
    given = {"q": q, "k": k, "v": v, "output": output, "grad": output if grad is None else grad}
    strided = {name: tensor if tensor.stride(-1) == 1 else tensor.contiguous() for name, tensor in given.items()}
    strides = {
        f"{name}_{axis}": tensor.stride(d)
        for name, tensor in strided.items()
        for d, axis in enumerate(("row", "head", "token"))
    }
    return kernels.structure(
        "Attention",
        batch=q.shape[0],
        heads=q.shape[1],
        key_heads=k.shape[1],
        length=q.shape[2],
        head_dim=q.shape[3],
        threads=torch.get_num_threads(),
        first_keys=None if first_keys is None else first_keys.clamp(min=0).to(torch.int32).contiguous(),
        log_sums=log_sums.contiguous(),
        scaling=scaling,
        **strided,
        **strides,
    )
