"""The parts of a layer before and after its mixer, each in one call, for decoded tokens, where calls cost as much as the work.

Letters: i input width, o output width, m width of the mixer's output, f inner width of the FFN.
"""

import torch
from torch import Tensor

from transxssm.ops.csrc import kernels_of
from transxssm.ops.dispatch import COMPILED, ON_CPU, Backend, Op, cpp_shortfall, eager_cpp_refusal
from transxssm.ops.linear import linear
from transxssm.ops.rms_norm import rms_norm
from transxssm.ops.swiglu import swiglu

MOST_TOKENS = 4  # up to which reading the weights takes all the time
_MOST_WEIGHTS = 5  # limit of `struct Projections`


def layer_start(
    x: Tensor, norm: Tensor, eps: float, weights: tuple[Tensor, ...], *, backend: str | None = None
) -> tuple[Tensor, ...]:
    """n · weightᵀ for each weight, where n is x after RMSNorm. Not differentiable.

    Backends, in order of preference:
        "cpp": one to four tokens in float32 or bfloat16 on a CPU, and up to five weights, in one call.
        "torch": `rms_norm` and `linear` as separate operations.

    Args:
        x: (…, i). norm: (i,), the norm's weight. eps: added to the mean square.
        weights: (o, i) each.
        backend: one of the names above. Defaults to the first that takes the call.

    Returns:
        (…, o) for each weight, in x's dtype. They may share memory, and rows may lie apart.

    Raises:
        ValueError: shapes do not fit, or the requested backend does not take the call.
    """
    if norm.shape != x.shape[-1:] or any(each.dim() != 2 or each.shape[1:] != x.shape[-1:] for each in weights):
        shapes = [tuple(each.shape) for each in (x, norm, *weights)]
        raise ValueError(f"expected x (…, i), norm (i,) and weights (o, i): got {shapes}")
    with torch.no_grad():
        outputs: tuple[Tensor, ...] = LAYER_START.choose(backend, x, norm, *weights).forward(x, norm, eps, weights)
    return outputs


def layer_end(
    mixed: Tensor,
    residual: Tensor,
    mixer_output: Tensor,
    norm: Tensor,
    eps: float,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    *,
    backend: str | None = None,
) -> Tensor:
    """h + (silu(n · gateᵀ) ∘ n · upᵀ) · downᵀ, where h = residual + mixed · mixer_outputᵀ, and n is h after RMSNorm. Not differentiable.

    Backends, in order of preference:
        "cpp": one to four tokens in float32 or bfloat16 on a CPU, in one call.
        "torch": `linear`, `rms_norm` and `swiglu` as separate operations.

    Args:
        mixed: (…, m). residual: (…, i).
        mixer_output: (i, m). norm: (i,), the norm's weight. gate, up: (f, i). down: (i, f).
        eps: added to the mean square.
        backend: one of the names above. Defaults to the first that takes the call.

    Returns:
        (…, i) in the dtype of `mixed`.

    Raises:
        ValueError: shapes do not fit, or the requested backend does not take the call.
    """
    width, mixed_width, inner_width = residual.shape[-1], mixed.shape[-1], gate.shape[0]
    weights = (mixer_output, norm, gate, up, down)
    expected = [(width, mixed_width), (width,), *[(inner_width, width)] * 2, (width, inner_width)]
    if mixed.shape[:-1] != residual.shape[:-1] or any(w.shape != s for w, s in zip(weights, expected, strict=True)):
        shapes = [tuple(each.shape) for each in (mixed, residual, *weights)]
        raise ValueError(f"expected (…, m), (…, i) and weights (i, m), (i,), (f, i), (f, i), (i, f): got {shapes}")
    with torch.no_grad():
        chosen = LAYER_END.choose(backend, mixed, residual, *weights)
        output: Tensor = chosen.forward(mixed, residual, mixer_output, norm, eps, gate, up, down)
    return output


def _kernel_refusal(x: Tensor, *weights: Tensor) -> str | None:
    if x.device.type != "cpu":
        return ON_CPU
    if torch.compiler.is_compiling():  # before sizes, which may be symbols
        return COMPILED
    if not 0 < x.numel() <= MOST_TOKENS * x.shape[-1]:
        return f"it is for 1 to {MOST_TOKENS} tokens"
    dtype = x.dtype
    for each in weights:
        if each.dtype != dtype or not each.is_contiguous():
            return "it takes contiguous weights of x's dtype"
    if torch.is_autocast_enabled("cpu"):
        return "it does not know autocast"
    return eager_cpp_refusal(x, *weights)


def _end_refusal(mixed: Tensor, residual: Tensor, *weights: Tensor) -> str | None:
    if mixed.dtype != residual.dtype:
        return "it takes a residual of the dtype of what was mixed"
    return eager_cpp_refusal(residual) or _kernel_refusal(mixed, *weights)


def _start_refusal(x: Tensor, norm: Tensor, *weights: Tensor) -> str | None:
    if len(weights) > _MOST_WEIGHTS:
        return f"it takes up to {_MOST_WEIGHTS} weights"
    return _kernel_refusal(x, norm, *weights)


def _start_by_kernel(x: Tensor, norm: Tensor, eps: float, weights: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    kernels, widths = kernels_of(x.dtype), [each.shape[0] for each in weights]
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    output = x.new_empty(*x.shape[:-1], sum(widths))
    call = kernels.structure(
        "Projections",
        rows=rows.shape[0],
        width=rows.shape[1],
        threads=torch.get_num_threads(),
        x=rows,
        norm=norm,
        eps=eps,
        output=output,
        **{f"weight_{index}": weight for index, weight in enumerate(weights)},
        **{f"width_{index}": width for index, width in enumerate(widths)},
    )
    kernels.run("project", call)
    return torch.split_with_sizes(output, widths, dim=-1)


def _start_by_torch(x: Tensor, norm: Tensor, eps: float, weights: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    normed = rms_norm(x, norm, eps)
    return tuple(linear(normed, weight) for weight in weights)


def _end_by_kernel(
    mixed: Tensor,
    residual: Tensor,
    mixer_output: Tensor,
    norm: Tensor,
    eps: float,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
) -> Tensor:
    kernels = kernels_of(mixed.dtype)
    rows = mixed.reshape(-1, mixed.shape[-1]).contiguous()
    num_rows, width, inner_width = rows.shape[0], down.shape[0], gate.shape[0]
    output = mixed.new_empty(residual.shape)
    call = kernels.structure(
        "LayerEnd",
        rows=num_rows,
        mixed_width=rows.shape[1],
        width=width,
        inner_width=inner_width,
        threads=torch.get_num_threads(),
        mixed=rows,
        residual=residual.contiguous(),
        mixer_output=mixer_output,
        norm=norm,
        gate=gate,
        up=up,
        down=down,
        hidden=mixed.new_empty(num_rows, width),
        inner=mixed.new_empty(num_rows, inner_width),
        output=output,
        eps=eps,
    )
    kernels.run("end_layer", call)
    return output


def _end_by_torch(
    mixed: Tensor,
    residual: Tensor,
    mixer_output: Tensor,
    norm: Tensor,
    eps: float,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
) -> Tensor:
    hidden = residual + linear(mixed, mixer_output)
    normed = rms_norm(hidden, norm, eps)
    return hidden + linear(swiglu(linear(normed, gate), linear(normed, up)), down)


LAYER_START = Op(
    "layer_start",
    (
        Backend("cpp", _start_by_kernel, refusal=_start_refusal, shortfall=cpp_shortfall),
        Backend("torch", _start_by_torch),
    ),
    call=lambda x, norm, eps, weights, **options: (x, norm, *weights),
)
LAYER_END = Op(
    "layer_end",
    (
        Backend("cpp", _end_by_kernel, refusal=_end_refusal, shortfall=cpp_shortfall),
        Backend("torch", _end_by_torch),
    ),
    call=lambda mixed, residual, mixer_output, norm, eps, gate, up, down, **options: (
        mixed,
        residual,
        mixer_output,
        norm,
        gate,
        up,
        down,
    ),
)
