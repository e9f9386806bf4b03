"""TransXSSM: hybrid Transformer–state-space language models with one rotary position embedding (arXiv 2506.09507)."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from transxssm._version import __version__
from transxssm.models import (
    TransXSSMCache,
    TransXSSMConfig,
    TransXSSMForCausalLM,
    TransXSSMForSequenceClassification,
    TransXSSMModel,
)

__all__ = [
    "TransXSSMCache",
    "TransXSSMConfig",
    "TransXSSMForCausalLM",
    "TransXSSMForSequenceClassification",
    "TransXSSMModel",
    "__version__",
]

AutoConfig.register("transxssm", TransXSSMConfig, exist_ok=True)
AutoModel.register(TransXSSMConfig, TransXSSMModel, exist_ok=True)
AutoModelForCausalLM.register(TransXSSMConfig, TransXSSMForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(TransXSSMConfig, TransXSSMForSequenceClassification, exist_ok=True)
# Trainer's label smoothing shifts the labels of the classes named here, and of no others.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["transxssm"] = TransXSSMForCausalLM.__name__
