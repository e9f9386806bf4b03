"""The parts and costs of a model from its configuration alone: parameters, FLOPs, bytes. No weight is loaded."""

from transxssm.inspection.costs import (
    TRAINING_PER_FORWARD,
    AttentionLayer,
    Flops,
    ScanLayer,
    attention_flops,
    count_parameters,
    flops_per_token,
    layers_of,
    mean_keys,
    scan_flops,
)
from transxssm.inspection.memory import CacheBytes, activation_bytes, all_attention_bytes, available_bytes, cache_bytes

__all__ = [
    "TRAINING_PER_FORWARD",
    "AttentionLayer",
    "CacheBytes",
    "Flops",
    "ScanLayer",
    "activation_bytes",
    "all_attention_bytes",
    "attention_flops",
    "available_bytes",
    "cache_bytes",
    "count_parameters",
    "flops_per_token",
    "layers_of",
    "mean_keys",
    "scan_flops",
]
