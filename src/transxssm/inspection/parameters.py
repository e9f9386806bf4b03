"""The layers that mix tokens, and the parameters by kind, of models of this package and of those it compares them with."""

from typing import NamedTuple

from transformers import BambaConfig, LlamaConfig, Mamba2Config, PreTrainedConfig

from transxssm.models import TransXSSMConfig
from transxssm.models.baselines import language_model_on_meta

# Which kind the parameters under a name belong to: the first of these names on a path, which every module of the models has.
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


class AttentionLayer(NamedTuple):
    """Sizes of an attention layer; window: the keys that a query sees at most, itself included."""

    num_heads: int
    num_key_value_heads: int
    head_dim: int
    window: int | None = None


class ScanLayer(NamedTuple):
    """Sizes of a state-space layer.

    Args:
        chunk_size: of its scan, or None for what is best for the device.
        conv_state_size: inputs of the convolution that are kept between two tokens.
    """

    num_heads: int
    head_dim: int
    num_groups: int
    state_size: int
    chunk_size: int | None
    conv_state_size: int


def layers_of(config: PreTrainedConfig) -> list[AttentionLayer | ScanLayer]:
    """Each layer's mixer, first to last.

    Raises:
        ValueError: another kind of model than TransXSSM, Llama, Mamba-2 and Bamba.
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
    """An attention layer of a model, whether it has one or not."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return AttentionLayer(config.num_attention_heads, config.num_key_value_heads, head_dim)


def count_parameters(config: PreTrainedConfig) -> dict[str, int]:
    """Numbers of parameters: "embeddings", "ssd", "attention", "ffn", "norms" and "head", counted on the meta device.

    A head tied to the embeddings counts there, and as 0 under "head".

    Args:
        config: of a model of this package, or a baseline.

    Raises:
        ValueError: another kind of model.
    """
    layers_of(config)  # knows which models have the names above
    counts = dict.fromkeys(KIND_OF_NAME.values(), 0)
    for name, parameter in language_model_on_meta(config).named_parameters():
        kind = next(KIND_OF_NAME[part] for part in name.split(".") if part in KIND_OF_NAME)
        counts[kind] += parameter.numel()
    return counts
