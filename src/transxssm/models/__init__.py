"""Layer 1: the model inside Hugging Face transformers."""

from transxssm.models.cache_transxssm import TransXSSMCache
from transxssm.models.checkpoint import (
    load_causal_lm,
    load_model,
    load_tokenizer,
    read_causal_lm_config,
    read_config,
    read_device,
)
from transxssm.models.configuration_transxssm import PRESETS, TransXSSMConfig
from transxssm.models.modeling_transxssm import (
    MODEL_CARD,
    TransXSSMForCausalLM,
    TransXSSMForSequenceClassification,
    TransXSSMModel,
    TransXSSMPreTrainedModel,
)

__all__ = [
    "MODEL_CARD",
    "PRESETS",
    "TransXSSMCache",
    "TransXSSMConfig",
    "TransXSSMForCausalLM",
    "TransXSSMForSequenceClassification",
    "TransXSSMModel",
    "TransXSSMPreTrainedModel",
    "load_causal_lm",
    "load_model",
    "load_tokenizer",
    "read_causal_lm_config",
    "read_config",
    "read_device",
]
