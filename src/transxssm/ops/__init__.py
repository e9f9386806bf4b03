"""Layer 0: functions of tensors. They know no configuration, no module and no cache, and are pure unless the name ends in `_`."""

from transxssm.ops.causal_attention import causal_attention, has_attention_kernels
from transxssm.ops.dispatch import Choice
from transxssm.ops.explain import explain
from transxssm.ops.linear import linear
from transxssm.ops.linear_cross_entropy import linear_cross_entropy
from transxssm.ops.rms_norm import rms_norm
from transxssm.ops.rotary import (
    DocumentBounds,
    apply_rotary,
    keep_pairs,
    rotary_cos_sin,
    rotary_frequencies,
    rotate_by_angles,
    running_angles,
    subsample_rotary,
)
from transxssm.ops.short_convolution import short_convolution, short_convolution_
from transxssm.ops.single_query_attention import has_single_query_attention, single_query_attention
from transxssm.ops.ssd import SSDBackend, ssd_chunk_scan, ssd_chunk_scan_, ssd_step, ssd_step_
from transxssm.ops.swiglu import swiglu
from transxssm.ops.token_layer import layer_end, layer_start

__all__ = [
    "Choice",
    "DocumentBounds",
    "SSDBackend",
    "apply_rotary",
    "causal_attention",
    "explain",
    "has_attention_kernels",
    "has_single_query_attention",
    "keep_pairs",
    "layer_end",
    "layer_start",
    "linear",
    "linear_cross_entropy",
    "rms_norm",
    "rotary_cos_sin",
    "rotary_frequencies",
    "rotate_by_angles",
    "running_angles",
    "short_convolution",
    "short_convolution_",
    "single_query_attention",
    "ssd_chunk_scan",
    "ssd_chunk_scan_",
    "ssd_step",
    "ssd_step_",
    "subsample_rotary",
    "swiglu",
]
