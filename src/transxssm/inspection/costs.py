"""The parts and the work of a model: the layers that mix tokens, parameters by kind, and FLOPs of a token and of whole steps.

All of this covers models of this package and its baselines. FLOPs, two for a multiply-add, are those of linear layers, causal attention
and the scan. Elementwise work, norms, the convolution and the softmax are left out. So the time that these FLOPs take at the measured
peak of a matrix product is a lower bound for everything that multiplies in the same dtype.

Letters: q chunk size, h SSD heads, g groups, p head_dim of an SSD head, n state size.
"""

from typing import NamedTuple

from torch import nn
from transformers import BambaConfig, LlamaConfig, Mamba2Config, PreTrainedConfig

from transxssm.models import TransXSSMConfig
from transxssm.models.baselines import language_model_on_meta
from transxssm.models.selective_rotation import TransXSSMSelectiveRotation
from transxssm.ops.ssd.interface import DEFAULT_CHUNK_SIZE

# The kind of parameters, by the first of these names in their path. Every module of the models has one.
KIND_OF_NAME = {
    "embed_tokens": "embeddings",
    "embeddings": "embeddings",
    "ssd": "ssd",
    "mamba": "ssd",
    "mixer": "ssd",
    "self_attn": "attention",
    "mlp": "ffn",
    "feed_forward": "ffn",
    "input_layernorm": "norms",
    "post_attention_layernorm": "norms",
    "pre_ff_layernorm": "norms",
    "final_layernorm": "norms",
    "norm": "norms",
    "norm_f": "norms",
    "lm_head": "head",
}

# The backward pass has two products for each of the forward pass: one for the input's gradient, one for the weight's. Nothing is
# computed twice (no gradient checkpointing).
TRAINING_PER_FORWARD = 3


class AttentionLayer(NamedTuple):
    """Sizes of an attention layer. `window` is the largest number of keys that a query sees, itself included."""

    num_heads: int
    num_key_value_heads: int
    head_dim: int
    window: int | None = None


class ScanLayer(NamedTuple):
    """Sizes of a state-space layer.

    Args:
        chunk_size: chunk size of its scan, or None for the device's default.
        conv_state_size: number of the convolution's inputs that are kept between two tokens.
    """

    num_heads: int
    head_dim: int
    num_groups: int
    state_size: int
    chunk_size: int | None
    conv_state_size: int


def layers_of(config: PreTrainedConfig) -> list[AttentionLayer | ScanLayer]:
    """The mixer of each layer, in order.

    Raises:
        ValueError: the model is not a TransXSSM, Llama, Mamba-2 or Bamba model.
    """
    match config:
        case TransXSSMConfig():
            attention = attention_of(config)
            kinds: dict[str, AttentionLayer | ScanLayer] = {
                "full_attention": attention,
                "sliding_attention": attention._replace(window=config.sliding_window),
                "linear_attention": ScanLayer(
                    num_heads=config.ssd_num_heads,
                    head_dim=config.ssd_head_dim,
                    num_groups=config.ssd_num_groups,
                    state_size=config.ssd_state_size,
                    chunk_size=config.ssd_chunk_size,
                    conv_state_size=max(config.ssd_conv_kernel_size - 1, 0),
                ),
            }
            return [kinds[layer_type] for layer_type in config.layer_types]
        case LlamaConfig():
            return [attention_of(config)] * config.num_hidden_layers
        case BambaConfig():
            scan = ScanLayer(
                num_heads=config.mamba_n_heads,
                head_dim=config.mamba_d_head,
                num_groups=config.mamba_n_groups,
                state_size=config.mamba_d_state,
                chunk_size=config.mamba_chunk_size,
                conv_state_size=config.mamba_d_conv,
            )
            attention = attention_of(config)
            return [scan if layer_type == "linear_attention" else attention for layer_type in config.layer_types]
        case Mamba2Config():
            scan = ScanLayer(
                num_heads=config.num_heads,
                head_dim=config.head_dim,
                num_groups=config.n_groups,
                state_size=config.state_size,
                chunk_size=config.chunk_size,
                conv_state_size=config.conv_kernel,
            )
            return [scan] * config.num_hidden_layers
    raise ValueError(f"costs are known of TransXSSM, Llama, Mamba-2 and Bamba: got {config.model_type!r}")


def attention_of(config: TransXSSMConfig | LlamaConfig | BambaConfig) -> AttentionLayer:
    """The attention layer that a model has or would have."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return AttentionLayer(config.num_attention_heads, config.num_key_value_heads, head_dim)


def count_parameters(config: PreTrainedConfig) -> dict[str, int]:
    """Numbers of parameters: "embeddings", "ssd", "attention", "ffn", "norms" and "head", counted on the meta device.

    A head that is tied to the embeddings counts as part of them, and "head" is 0.

    Args:
        config: configuration of a model of this package or of a baseline.

    Raises:
        ValueError: another kind of model.
    """
    layers_of(config)  # raises for models without the names above
    counts = dict.fromkeys(KIND_OF_NAME.values(), 0)
    for name, parameter in language_model_on_meta(config).named_parameters():
        kind = next(KIND_OF_NAME[part] for part in name.split(".") if part in KIND_OF_NAME)
        counts[kind] += parameter.numel()
    return counts


class Flops(NamedTuple):
    """FLOPs by kind."""

    linear: float  # projections, FFN and head
    attention: float  # scores and weighted values
    ssd: float  # the chunked scan

    @property
    def total(self) -> float:
        return sum(self)

    def times(self, factor: float) -> "Flops":
        """The FLOPs of each kind, multiplied by a factor."""
        return Flops(*(factor * kind for kind in self))


def flops_per_token(config: PreTrainedConfig, context: int) -> Flops:
    """FLOPs of a forward pass over a sequence of `context` tokens, divided by `context`. Training takes `TRAINING_PER_FORWARD` times these.

    Attention counts (context + 1) / 2 keys for the mean token, since fused kernels skip masked blocks. The scan counts whole chunks, as
    it computes them, of the configuration's chunk size or, if that is None, the CPU's default.

    Args:
        config: configuration of a model of this package or of a baseline.
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
    """Number of weights in the matrices by which a module itself multiplies."""
    if isinstance(module, TransXSSMSelectiveRotation):
        gate = 0 if module.gate_weight is None else module.gate_weight.numel()
        return module.down_weight.numel() + module.up_weight.numel() + gate
    return module.weight.numel() if isinstance(module, nn.Linear) else 0


def mean_keys(context: int, window: int | None = None) -> float:
    """Mean number of keys that a token of a sequence sees, itself included and at most `window`."""
    growing = context if window is None else min(context, window)
    return (growing * (growing + 1) / 2 + (context - growing) * growing) / context


def attention_flops(num_heads: int, head_dim: int, num_keys: float) -> float:
    """FLOPs of one attention layer for a token that sees `num_keys` keys: scores and weighted values."""
    return 4 * num_heads * head_dim * num_keys


def scan_flops(*, chunk_size: int, num_heads: int, num_groups: int, head_dim: int, state_size: int) -> int:
    """FLOPs of one layer's chunked scan per token (Mamba-2, Section 6)."""
    q, h, g, p, n = chunk_size, num_heads, num_groups, head_dim, state_size
    scores, within_chunk = 2 * q * g * n, 2 * q * h * p
    into_state = from_state = 2 * h * p * n
    return scores + within_chunk + into_state + from_state


def step_flops(config: PreTrainedConfig, mode: str, length: int, batch: int) -> Flops:
    """FLOPs of a training step or a prefill over (batch, length) tokens, or of decoding one token in each row after `length`.

    A prefill needs the head for its last token only. Gradient checkpointing repeats the layers' forward pass, not the head's. A
    decoded token reads every key, and reads and writes each state once.

    Raises:
        ValueError: the model is not of a known kind.
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
