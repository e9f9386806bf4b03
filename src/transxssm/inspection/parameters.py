"""Parameters by kind, counted on the meta device: shapes without storage."""

from transformers import PreTrainedConfig

from transxssm.inspection.layers import layers_of
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


def count_parameters(config: PreTrainedConfig) -> dict[str, int]:
    """Numbers of parameters: "embeddings", "ssd", "attention", "ffn", "norms" and "head".

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
