"""What is refused before the engine starts: settings of vLLM that the model's states do not allow, and sizes that vLLM cannot serve."""

import logging
from typing import Any

import torch
from vllm.config import ModelConfig, VllmConfig
from vllm.model_executor.layers.activation import _ACTIVATION_AND_MUL_REGISTRY
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.platforms import current_platform

from transxssm.models.configuration_transxssm import SSD_LAYER_TYPE, STATIC_ROPE_TYPES, TransXSSMConfig

logger = logging.getLogger(__name__)


class TransXSSMEngineConfig(VerifyAndUpdateConfig):
    """vLLM calls it with every setting in hand, before it makes a worker."""

    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        """Says where weights are rounded: vLLM's `--dtype auto` takes bfloat16 for a checkpoint in float32, without a word."""
        if model_config.hf_config.dtype == torch.float32 != model_config.dtype:
            logger.warning(
                "The checkpoint is float32, and vLLM serves it in %s: its words may differ from those of `generate`. Give --dtype float32 "
                "for its own numbers.",
                str(model_config.dtype).removeprefix("torch."),
            )

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Refuses what cannot be served.

        Raises:
            ValueError: names the option, what it was and what it may be.
        """
        config = vllm_config.model_config.hf_config
        check_model(config)
        check_parallelism(config, vllm_config.parallel_config.tensor_parallel_size)
        _check_states(vllm_config)


def check_model(config: TransXSSMConfig) -> None:
    """Refuses options of a model for which vLLM has no layer.

    Raises:
        ValueError: an activation or a head size that vLLM lacks; selective rotations.
    """
    if config.is_selective:
        raise ValueError(
            "vLLM keeps no running angles of selective rotations: got rope_parameters with rope_type 'selective', expected one of "
            f"{', '.join(STATIC_ROPE_TYPES)}; use `transxssm generate`"
        )
    if config.hidden_act not in (*_ACTIVATION_AND_MUL_REGISTRY, "swish"):
        raise ValueError(
            f"vLLM has no gated layer for hidden_act={config.hidden_act!r}: expected one of {', '.join(_ACTIVATION_AND_MUL_REGISTRY)}"
        )
    if config.has_attention and current_platform.is_cpu():
        from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

        sizes = CPUAttentionBackend.get_supported_head_sizes()
        if config.head_dim not in sizes:
            raise ValueError(
                f"vLLM's attention on a CPU takes head_dim {', '.join(map(str, sizes))}: got {config.head_dim}; serve the model on a "
                "GPU, or use `transxssm generate`"
            )


def check_parallelism(config: TransXSSMConfig, tensor_parallel_size: int) -> None:
    """Refuses a number of shards that would cut through a head or a group.

    Raises:
        ValueError: tensor parallelism that does not divide the heads of attention, the SSD heads' groups or the FFN.
    """
    sizes = {"intermediate_size": config.intermediate_size}
    if config.has_attention:
        sizes["num_attention_heads"] = config.num_attention_heads
    if SSD_LAYER_TYPE in config.layer_types:
        sizes["ssd_num_groups"] = config.ssd_num_groups
    for name, size in sizes.items():
        if size % tensor_parallel_size:
            raise ValueError(
                f"--tensor-parallel-size must divide {name}={size}: got {tensor_parallel_size}; expected one of "
                f"{', '.join(str(n) for n in range(1, size + 1) if all(s % n == 0 for s in sizes.values()))}"
            )
    heads = config.num_key_value_heads
    if config.has_attention and heads % tensor_parallel_size and tensor_parallel_size % heads:
        raise ValueError(
            f"--tensor-parallel-size must divide num_key_value_heads={heads}, or be a multiple of it: got {tensor_parallel_size}"
        )


def _check_states(vllm_config: VllmConfig) -> None:
    config = vllm_config.model_config.hf_config
    if SSD_LAYER_TYPE not in config.layer_types:
        return
    cache = vllm_config.cache_config
    refused: dict[str, Any] = {
        "--speculative-config": vllm_config.speculative_config,
        "--use-replayssm": cache.use_replayssm or None,
        "--mamba-cache-dtype": None if cache.mamba_cache_dtype in ("auto", "float32") else cache.mamba_cache_dtype,
        "--mamba-ssm-cache-dtype": (
            None if cache.mamba_ssm_cache_dtype in ("auto", "float32") else cache.mamba_ssm_cache_dtype
        ),
    }
    reasons = {
        "--speculative-config": "takes back tokens that are not accepted, which the states of SSD layers have summed: leave it out",
        "--use-replayssm": "replays the tokens of Mamba-2's own kernels, which this model does not use: leave it out",
        "--mamba-cache-dtype": "would round states, which are float32: expected auto or float32",
        "--mamba-ssm-cache-dtype": "would round states, which are float32: expected auto or float32",
    }
    for option, value in refused.items():
        if value is not None:
            raise ValueError(f"{option} {reasons[option]}; got {value}")
