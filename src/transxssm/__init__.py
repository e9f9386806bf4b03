"""TransXSSM: hybrid Transformer–state-space language models with one rotary position embedding (arXiv 2506.09507)."""

import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from transxssm._version import __version__
from transxssm.models import (
    TransXSSMCache,
    TransXSSMConfig,
    TransXSSMForCausalLM,
    TransXSSMForSequenceClassification,
    TransXSSMModel,
)
from transxssm.models.peft_targets import add_peft_targets
from transxssm.models.ssd_mixer import DYNAMICS_NAMES

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
# TRL (given a path), pipelines and `transformers serve` look up the class that a saved config names in the module `transformers`. There
# may be two modules of that name, since `transformers.processing_utils` executes it again. An attribute of their type is in both.
for _class in (TransXSSMModel, TransXSSMForCausalLM, TransXSSMForSequenceClassification):
    setattr(type(transformers), _class.__name__, _class)
# Trainer's label smoothing shifts the labels of the classes named here, and of no others.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["transxssm"] = TransXSSMForCausalLM.__name__
add_peft_targets(TransXSSMConfig.model_type)
register_checkpoint_conversion_mapping(
    TransXSSMConfig.model_type,
    [WeightRenaming(f"ssd.{name}", f"ssd.dynamics.{name}") for name in DYNAMICS_NAMES],
    overwrite=True,
)
