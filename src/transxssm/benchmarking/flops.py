"""FLOPs of a contender's step: linear layers, causal attention and the scan, as `transxssm.inspection` counts them.

Elementwise work, norms, the convolution and the softmax are left out: the time that these FLOPs take at the measured peak of a
matrix product is a floor for everything that multiplies in the same dtype.
"""

from typing import NamedTuple

from torch import nn
from transformers import BambaConfig, LlamaConfig, Mamba2Config, PreTrainedConfig

from transxssm.inspection import attention_flops, flops_per_token, mean_keys, scan_flops
from transxssm.inspection.flops import TRAINING_PER_FORWARD
from transxssm.models import TransXSSMConfig
from transxssm.models.baselines import language_model_on_meta


class Flops(NamedTuple):
    """FLOPs by kind."""

    linear: float
    attention: float
    ssd: float

    @property
    def total(self) -> float:
        return sum(self)

    def times(self, factor: float) -> "Flops":
        """Each kind, multiplied."""
        return Flops(*(factor * kind for kind in self))


class _Scan(NamedTuple):
    """Sizes of a state-space layer."""

    chunk_size: int
    num_heads: int
    num_groups: int
    head_dim: int
    state_size: int


def step_flops(config: PreTrainedConfig, mode: str, length: int, batch: int) -> Flops:
    """FLOPs of a training step or a prefill over (batch, length) tokens, or of decoding one token in each row after `length`.

    A prefill needs the head for its last token only. A decoded token reads every key, and a state once in and once out.

    Raises:
        ValueError: a kind of model that is no contender.
    """
    body, head = _linear_flops(config)
    if mode == "decode":
        num_attention, attention, scans = _mixers(config, length + 1)
        step = sum(4 * scan.num_heads * scan.head_dim * scan.state_size for scan in scans)
        return Flops(body + head, num_attention * attention_flops(*attention, length + 1), step).times(batch)
    forward = _forward_flops(config, length)
    if mode == "prefill":
        forward = forward._replace(linear=forward.linear - (length - 1) * head)
        return forward.times(batch)
    return forward.times(TRAINING_PER_FORWARD * batch)


def _forward_flops(config: PreTrainedConfig, length: int) -> Flops:
    """Of one sequence, logits of every token included."""
    if isinstance(config, TransXSSMConfig):
        return Flops(*flops_per_token(config, length)).times(length)
    num_attention, attention, scans = _mixers(config, length)
    keys = mean_keys(length)
    return Flops(
        sum(_linear_flops(config)),
        num_attention * attention_flops(*attention, keys),
        sum(scan_flops(**scan._asdict()) for scan in scans),
    ).times(length)


def _linear_flops(config: PreTrainedConfig) -> tuple[int, int]:
    """Per token, of every linear layer but the head, and of the head."""
    model = language_model_on_meta(config)
    head = 2 * model.get_output_embeddings().weight.numel()
    return sum(2 * module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear)) - head, head


def _mixers(config: PreTrainedConfig, length: int) -> tuple[int, tuple[int, int], list[_Scan]]:
    """Number of attention layers, their heads and width, and the sizes of every state-space layer."""
    match config:
        case LlamaConfig():
            return config.num_hidden_layers, (config.num_attention_heads, config.head_dim), []
        case TransXSSMConfig():
            chunk_size, num_heads, num_groups = config.ssd_chunk_size, config.ssd_num_heads, config.ssd_num_groups
            head_dim, state_size = config.ssd_head_dim, config.ssd_state_size
        case BambaConfig():
            chunk_size, num_heads, num_groups = config.mamba_chunk_size, config.mamba_n_heads, config.mamba_n_groups
            head_dim, state_size = config.mamba_d_head, config.mamba_d_state
        case Mamba2Config():
            chunk_size, num_heads, num_groups = config.chunk_size, config.num_heads, config.n_groups
            head_dim, state_size = config.head_dim, config.state_size
        case _:
            raise ValueError(f"FLOPs are counted for TransXSSM, Llama, Mamba-2 and Bamba: got {config.model_type!r}")
    has_attention = not isinstance(config, Mamba2Config)
    attention = (config.num_attention_heads, config.head_dim) if has_attention else (0, 0)
    num_scans = list(config.layer_types).count("linear_attention")
    scan = _Scan(min(chunk_size or length, length), num_heads, num_groups, head_dim, state_size)
    return config.num_hidden_layers - num_scans, attention, [scan] * num_scans
