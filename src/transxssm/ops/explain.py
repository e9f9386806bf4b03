"""Explains which backend an op takes for a call, and why the faster ones refuse."""

from collections.abc import Callable
from typing import Any

from transxssm.ops.causal_attention import CAUSAL_ATTENTION
from transxssm.ops.dispatch import Choice, Op
from transxssm.ops.linear import LINEAR
from transxssm.ops.linear_cross_entropy import LINEAR_CROSS_ENTROPY
from transxssm.ops.rms_norm import RMS_NORM
from transxssm.ops.short_convolution import SHORT_CONVOLUTION, SHORT_CONVOLUTION_
from transxssm.ops.single_query_attention import SINGLE_QUERY_ATTENTION
from transxssm.ops.ssd.interface import SSD_CHUNK_SCAN
from transxssm.ops.ssd.step import SSD_STEP, SSD_STEP_
from transxssm.ops.swiglu import SWIGLU
from transxssm.ops.token_layer import LAYER_END, LAYER_START

OPS: dict[str, Op] = {
    op.name: op
    for op in (
        SSD_CHUNK_SCAN,
        SSD_STEP,
        SSD_STEP_,
        CAUSAL_ATTENTION,
        SINGLE_QUERY_ATTENTION,
        LAYER_START,
        LAYER_END,
        LINEAR,
        RMS_NORM,
        SWIGLU,
        SHORT_CONVOLUTION,
        SHORT_CONVOLUTION_,
        LINEAR_CROSS_ENTROPY,
    )
}


def explain(op: str | Callable[..., Any], *arguments: Any, **options: Any) -> Choice:
    """Explains which backend would compute `op(*arguments, **options)` on this machine. Nothing is computed.

    Args:
        op: a function of `transxssm.ops` that has several implementations, or its name.
        arguments, options: those of the function. Whether gradients are wanted counts too: call this under `torch.no_grad()` for what
            decoding takes.

    Returns:
        The backend that is taken, and for each backend of the op why it refuses, or None if it does not.

    Raises:
        ValueError: the op has no table of implementations.
    """
    name = op if isinstance(op, str) else op.__name__
    if name not in OPS:
        raise ValueError(f"unknown op {name!r}: expected one of {', '.join(OPS)}")
    return OPS[name].explain(*arguments, **options)
