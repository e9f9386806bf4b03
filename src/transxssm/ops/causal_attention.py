"""Causal attention over ranges of keys, with kernels for bfloat16 on CPUs: see ops/csrc/attention.cpp.

Letters: b batch, h heads, k key-value heads, t time, d head_dim.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from transxssm.ops.csrc import Kernels, Structure, has_bf16_gemm, kernels_of
from transxssm.ops.dispatch import (
    CPU_SWITCH,
    EXPORTED,
    ON_CPU,
    WATCHED,
    Backend,
    Op,
    cpp_shortfall,
    is_exporting,
    is_plain,
    is_watched,
    switched_off,
)

# attention.cpp takes heads of whole pairs of vectors, and works in blocks of keys.
_HEAD_DIM_STEP, _WIDEST_HEAD, _KEYS = 32, 128, 128


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, first_keys: Tensor | None = None, *, scaling: float, backend: str | None = None
) -> Tensor:
    """softmax(scaling · q kᵀ) v, in which query i sees the keys first_keys_i … i; scores and sums are float32.

    Backends, in order of preference:
        "cpp": bfloat16 on a CPU with AVX-512 BF16, for heads of 32, 64, 96 or 128. Its kernels
            take each query's first key and no mask, so that keys hidden by documents or a window cost nothing. Not twice
            differentiable.
        "sdpa": torch's `scaled_dot_product_attention`.

    Args:
        q: (b, h, t, d). k, v: (b, k, t, d); heads r·i … r·i + r − 1 of the h = r k share number i.
        first_keys: (b, t) int32, the first key that each query sees: at most the query's own place, and never falling along a row.
            Negative ones count as 0. Defaults to zeros.
        scaling: factor of the scores, above 0.
        backend: one of the names above. Defaults to the first that takes the call.

    Returns:
        (b, h, t, d) in q's dtype.

    Raises:
        ValueError: shapes do not fit, the scaling is not above 0, for which torch's kernels give NaN, or the requested backend does not
            take the call.
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
    output: Tensor = CAUSAL_ATTENTION.choose(backend, q, k, v).forward(q, k, v, first_keys, scaling)
    return output


def has_attention_kernels(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `causal_attention` has kernels for these."""
    return CAUSAL_ATTENTION.choose(None, q, k, v).name == "cpp"


def _kernel_refusal(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    if not q.device.type == k.device.type == v.device.type == "cpu":
        return ON_CPU
    if q.shape[-1] % _HEAD_DIM_STEP or not 0 < q.shape[-1] <= _WIDEST_HEAD:
        return f"it takes heads of a multiple of {_HEAD_DIM_STEP}, at most {_WIDEST_HEAD}: got {q.shape[-1]}"
    if not q.dtype == k.dtype == v.dtype == torch.bfloat16:
        return "it is for bfloat16"
    if is_exporting():
        return EXPORTED
    if not torch.compiler.is_compiling():  # the compiler calls the operator itself
        if is_watched():
            return WATCHED
        if not all(map(is_plain, (q, k, v))):
            return "it takes no subclasses of tensors"
    return switched_off(CPU_SWITCH)


def _kernel_shortfall(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    reason = cpp_shortfall()
    return "this processor has no AVX-512 BF16" if reason is None and not has_bf16_gemm() else reason


def _by_kernel(q: Tensor, k: Tensor, v: Tensor, first_keys: Tensor | None, scaling: float) -> Tensor:
    output: Tensor = _attention(q, k, v, first_keys, scaling)[0]
    return output


def _by_torch(q: Tensor, k: Tensor, v: Tensor, first_keys: Tensor | None, scaling: float) -> Tensor:
    if q.shape[1] != k.shape[1]:
        k, v = (tensor.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for tensor in (k, v))
    if first_keys is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling)
    return F.scaled_dot_product_attention(q, k, v, _seen(q, first_keys), scale=scaling)


def _seen(q: Tensor, first_keys: Tensor | None) -> Tensor:
    """Which keys each query sees, (b or 1, 1, t, t)."""
    places = torch.arange(q.shape[2], device=q.device)
    seen = (places <= places[:, None])[None]
    return (seen if first_keys is None else seen & (places >= first_keys[..., None]))[:, None]


@torch.library.custom_op("transxssm::causal_attention", mutates_args=())
def _attention(q: Tensor, k: Tensor, v: Tensor, first_keys: Tensor | None, scaling: float) -> tuple[Tensor, Tensor]:
    """The output, and for the backward pass the logarithm of each softmax's denominator, (b, h, t) float32."""
    output, log_sums = _empty_outputs(q, k, v, first_keys, scaling)
    kernels = kernels_of(q.dtype)
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
    kernels = kernels_of(q.dtype)
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
    """(b, h, t, d) in which the heads of a token are adjacent in memory, as the output projection reads them."""
    batch, heads, length, head_dim = like.shape
    return like.new_empty(batch, length, heads, head_dim).transpose(1, 2)


def _padded(length: int) -> int:
    return -(-length // _KEYS) * _KEYS


def _workspace(heads: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Memory of shape (b, h, padded t, d)."""
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


CAUSAL_ATTENTION = Op(
    "causal_attention",
    (Backend("cpp", _by_kernel, refusal=_kernel_refusal, shortfall=_kernel_shortfall), Backend("sdpa", _by_torch)),
    call=lambda q, k, v, *others, **options: (q, k, v),
)
