"""Parameters by kind, counted on the meta device: shapes without storage."""

import torch
from torch import nn

from transxssm.models import TransXSSMConfig, TransXSSMForCausalLM

# Which kind the parameters under a name belong to: the first of these names on a path, which every module of the model has.
KIND_OF_NAME = {
    "embed_tokens": "embeddings",
    "ssd": "ssd",
    "self_attn": "attention",
    "mlp": "ffn",
    "input_layernorm": "norms",
    "post_attention_layernorm": "norms",
    "norm": "norms",
    "lm_head": "head",
}


def count_parameters(config: TransXSSMConfig) -> dict[str, int]:
    """Numbers of parameters: "embeddings", "ssd", "attention", "ffn", "norms" and "head".

    A head tied to the embeddings counts there, and as 0 under "head".
    """
    counts = dict.fromkeys(KIND_OF_NAME.values(), 0)
    for name, parameter in model_on_meta(config).named_parameters():
        kind = next(KIND_OF_NAME[part] for part in name.split(".") if part in KIND_OF_NAME)
        counts[kind] += parameter.numel()
    return counts


def model_on_meta(config: TransXSSMConfig) -> nn.Module:
    """The model's modules with shapes and no storage."""
    with torch.device("meta"):
        return TransXSSMForCausalLM(config)
