"""Floating-point operations, two for a multiply-add, of linear layers, causal attention and the scan: per token, and of whole steps.

Elementwise work, norms, the convolution and the softmax are left out: the time that these FLOPs take at the measured peak of a
matrix product is a floor for everything that multiplies in the same dtype.

Letters: q chunk size, h SSD heads, g groups, p head_dim of an SSD head, n state size.
"""

from typing import NamedTuple

from torch import nn
from transformers import PreTrainedConfig

from transxssm.inspection.parameters import AttentionLayer, layers_of
from transxssm.models.baselines import language_model_on_meta
from transxssm.models.selective_rotation import TransXSSMSelectiveRotation
from transxssm.ops.ssd.interface import DEFAULT_CHUNK_SIZE

# The backward pass has two products for each of the forward pass: one for the input's gradient, one for the weight's. Nothing is
# computed twice (no gradient checkpointing).
TRAINING_PER_FORWARD = 3


class Flops(NamedTuple):
    """FLOPs by kind."""

    linear: float  # projections, FFN and head
    attention: float  # scores and weighted values
    ssd: float  # the chunked scan

    @property
    def total(self) -> float:
        return sum(self)

    def times(self, factor: float) -> "Flops":
        """Each kind, multiplied."""
        return Flops(*(factor * kind for kind in self))


def flops_per_token(config: PreTrainedConfig, context: int) -> Flops:
    """FLOPs of a forward pass over a sequence of `context` tokens, divided by them; training takes `TRAINING_PER_FORWARD` times as many.

    Attention counts what causality leaves, (context + 1) / 2 keys for the mean token, as fused kernels skip the rest. The scan
    counts whole chunks, as it computes them, in chunks of the configuration's size, or the CPU's default where that is None.

    Args:
        config: of a model of this package, or a baseline.
        context: tokens.

    Raises:
        ValueError: `context` is less than one token; another kind of model.
    """
    if context < 1:
        raise ValueError(f"context must be at least 1 token: got {context}")
    attention = ssd = 0.0
    for layer in layers_of(config):
        if isinstance(layer, AttentionLayer):
            attention += attention_flops(layer.num_heads, layer.head_dim, mean_keys(context, layer.window))
        else:
            ssd += scan_flops(
                chunk_size=min(layer.chunk_size or DEFAULT_CHUNK_SIZE["cpu"], context),
                num_heads=layer.num_heads,
                num_groups=layer.num_groups,
                head_dim=layer.head_dim,
                state_size=layer.state_size,
            )
    linear = sum(2 * _num_weights(module) for module in language_model_on_meta(config).modules())
    return Flops(linear, attention, ssd)


def _num_weights(module: nn.Module) -> int:
    """Of the matrices that a module itself multiplies with."""
    if isinstance(module, TransXSSMSelectiveRotation):
        gate = 0 if module.gate_weight is None else module.gate_weight.numel()
        return module.down_weight.numel() + module.up_weight.numel() + gate
    return module.weight.numel() if isinstance(module, nn.Linear) else 0


def mean_keys(context: int, window: int | None = None) -> float:
    """Keys that the mean token of a sequence sees, itself included; window: at most so many."""
    growing = context if window is None else min(context, window)
    return (growing * (growing + 1) / 2 + (context - growing) * growing) / context


def attention_flops(num_heads: int, head_dim: int, num_keys: float) -> float:
    """Of one attention layer for a token that sees `num_keys` keys: scores, then weighted values."""
    return 4 * num_heads * head_dim * num_keys


def scan_flops(*, chunk_size: int, num_heads: int, num_groups: int, head_dim: int, state_size: int) -> int:
    """Of one layer's chunked scan, per token (Mamba-2, Section 6)."""
    q, h, g, p, n = chunk_size, num_heads, num_groups, head_dim, state_size
    scores, within_chunk = 2 * q * g * n, 2 * q * h * p
    into_state = from_state = 2 * h * p * n
    return scores + within_chunk + into_state + from_state


def step_flops(config: PreTrainedConfig, mode: str, length: int, batch: int) -> Flops:
    """FLOPs of a training step or a prefill over (batch, length) tokens, or of decoding one token in each row after `length`.

    A prefill needs the head for its last token only. Gradient checkpointing repeats the layers' forward pass, not the head's. A
    decoded token reads every key, and a state once in and once out.

    Raises:
        ValueError: a kind of model that is no contender.
    """
    forward = flops_per_token(config, length)
    if mode == "decode":
        attention = ssd = 0.0
        for layer in layers_of(config):
            if isinstance(layer, AttentionLayer):
                num_keys = length + 1 if layer.window is None else min(length + 1, layer.window)
                attention += attention_flops(layer.num_heads, layer.head_dim, num_keys)
            else:
                ssd += 4 * layer.num_heads * layer.head_dim * layer.state_size
        return Flops(forward.linear, attention, ssd).times(batch)
    whole = forward.times(length)
    head = 2 * config.hidden_size * config.vocab_size
    if mode == "prefill":
        return whole._replace(linear=whole.linear - (length - 1) * head).times(batch)
    if mode == "train-checkpointed":
        repeated = whole.times(TRAINING_PER_FORWARD + 1)
        return repeated._replace(linear=repeated.linear - length * head).times(batch)
    return whole.times(TRAINING_PER_FORWARD * batch)
