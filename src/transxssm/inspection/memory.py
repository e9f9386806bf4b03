"""The memory of a sequence, in its cache and in the activations of its forward pass, and the memory that the machine has left.

Letters: q chunk size, h SSD heads, g groups, p head_dim of an SSD head, n state size, d head_dim of attention.
"""

import os
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import Mamba2Config, PreTrainedConfig

from transxssm.inspection.costs import AttentionLayer, attention_of, layers_of
from transxssm.models import TransXSSMConfig
from transxssm.models.baselines import language_model_on_meta
from transxssm.models.selective_rotation import TransXSSMSelectiveRotation
from transxssm.ops.csrc import arena_bytes, has_bf16_gemm
from transxssm.ops.devices import ELEMENTS_PER_BLOCK, has_fast_products
from transxssm.ops.dispatch import cpp_refusal, cpp_shortfall
from transxssm.ops.linear import BLOCK_TOKENS
from transxssm.ops.ssd.blocks import BLOCK_SCORES
from transxssm.ops.ssd.cpp import GEMM_COLUMNS
from transxssm.ops.ssd.interface import DEFAULT_CHUNK_SIZE

FLOAT32 = 4  # bytes
MEMORY_INFO = Path("/proc/meminfo")
# Limits of a container (cgroup v2), which the machine's own numbers do not include.
CGROUP = Path("/sys/fs/cgroup")


class CacheBytes(NamedTuple):
    """Bytes that one sequence keeps between two tokens."""

    kv: int  # keys and values of attention layers
    state: int  # states of SSD layers, the last inputs of their convolutions, and running angles of all layers

    @property
    def total(self) -> int:
        return sum(self)


def cache_bytes(config: PreTrainedConfig, num_tokens: int, dtype: torch.dtype) -> CacheBytes:
    """Bytes in the cache of one sequence of `num_tokens` tokens, of a model of this package or a baseline.

    Keys, values and the convolutions' inputs have the model's `dtype`, the states are float32. A sliding window keeps one token
    less than it sees, since the next token is one of those.

    Raises:
        ValueError: the model is not of a known kind.
    """
    kv = state = 0
    for layer in layers_of(config):
        if isinstance(layer, AttentionLayer):
            kv += _key_value_bytes(layer, num_tokens, dtype)
        else:
            x_size = layer.num_heads * layer.head_dim
            channels = x_size + 2 * layer.num_groups * layer.state_size
            state += FLOAT32 * x_size * layer.state_size + dtype.itemsize * channels * layer.conv_state_size
    if isinstance(config, TransXSSMConfig) and config.is_selective:
        for module in language_model_on_meta(config).modules():
            if isinstance(
                module, TransXSSMSelectiveRotation
            ):  # the angles, and one input less than the convolution has taps
                state += FLOAT32 * module.conv_weight.numel()
    return CacheBytes(kv, state)


def all_attention_bytes(config: PreTrainedConfig, num_tokens: int, dtype: torch.dtype) -> int | None:
    """Bytes of the cache if every layer were a full attention layer, for comparison.

    None for Mamba-2, whose configuration describes no attention.
    """
    if isinstance(config, Mamba2Config):
        return None
    return len(layers_of(config)) * _key_value_bytes(attention_of(config), num_tokens, dtype)


def _key_value_bytes(layer: AttentionLayer, num_tokens: int, dtype: torch.dtype) -> int:
    kept = num_tokens if layer.window is None else min(num_tokens, layer.window - 1)
    return 2 * layer.num_key_value_heads * layer.head_dim * dtype.itemsize * kept


def activation_bytes(config: TransXSSMConfig, num_tokens: int, dtype: torch.dtype) -> int:
    """Estimates the peak of the activations in a forward pass of one sequence without gradients. It can be up to twice too high.

    The residual stream and the rotary tables live throughout. Of the parts, which run one after another, only the largest counts.
    """
    item, h, p, n = dtype.itemsize, config.ssd_num_heads, config.ssd_head_dim, config.ssd_state_size
    scan = _scan_workspace(config, num_tokens, dtype) // num_tokens
    query_width, kv_width = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    x_B_C = h * p + 2 * config.ssd_num_groups * n
    inside = item if has_fast_products("cpu", dtype) else 3 * FLOAT32  # inside the convolution's operator
    convolved = x_B_C * (3 * item + inside) if config.ssd_conv_kernel_size else 0  # copies around it
    num_copies = config.ssd_norm_BC + config.ssd_bias_BC  # copies of B and C
    maps = num_copies * (2 * config.ssd_num_groups * n * item + _block_bytes(n, num_tokens))
    gated = 3 * h * p * item + _block_bytes(h * p, num_tokens) if config.ssd_output_gate else 0  # z, and two results
    exact = (x_B_C + h * p) * FLOAT32 if config.ssd_scan_in_fp32 and item < FLOAT32 else 0
    attention = 2 * (query_width + 2 * kv_width) * item + query_width * FLOAT32
    if config.attention_output_gate:  # g, its sigmoid and the product, beside the heads' output
        attention = max(attention, 4 * query_width * item)
    mask = num_tokens * (item + 1)  # the window's mask and the booleans of which it is made, one row for each token
    raised = 0  # a weight and a block of tokens, upcast to float32
    if not has_fast_products("cpu", dtype):
        raised = FLOAT32 * config.intermediate_size * (config.hidden_size + BLOCK_TOKENS) // num_tokens
    parts = {
        "norm": 2 * config.hidden_size * item,
        "ffn": 3 * config.intermediate_size * item + _block_bytes(config.intermediate_size, num_tokens) + raised,
        "full_attention": attention,
        "sliding_attention": attention + 2 * mask,
        "linear_attention": (x_B_C + h * p) * item + exact + max(convolved, maps, scan, gated),
    }
    present = {"norm", "ffn", *config.layer_types}
    stream = 6 * config.hidden_size * item + 2 * config.rotary_width * FLOAT32
    if "sliding_attention" in present:
        stream += mask
    return num_tokens * (stream + max(parts[name] for name in present))


def _block_bytes(width: int, num_tokens: int) -> int:
    """Bytes that an elementwise operator over (tokens, width) takes for a block of rows, per token of the sequence."""
    return 2 * FLOAT32 * min(ELEMENTS_PER_BLOCK // num_tokens, width)


def _scan_workspace(config: TransXSSMConfig, num_tokens: int, dtype: torch.dtype) -> int:
    """Bytes that the scan takes for a block of chunks, which do not depend on the length of the sequence."""
    h, g, p, n = config.ssd_num_heads, config.ssd_num_groups, config.ssd_head_dim, config.ssd_state_size
    q = config.ssd_chunk_size or DEFAULT_CHUNK_SIZE["cpu"]
    tokens = min(num_tokens, max(q, BLOCK_SCORES["cpu"] // (h * q)))
    states = 2 * h * p * n // q  # per token
    if cpp_refusal(torch.empty(0, dtype=dtype)) is None and cpp_shortfall() is None:
        item = dtype.itemsize if has_fast_products("cpu", dtype) else FLOAT32
        if has_bf16_gemm() and dtype == torch.bfloat16 and item < FLOAT32 and p % GEMM_COLUMNS == n % GEMM_COLUMNS == 0:
            arenas = torch.get_num_threads() * arena_bytes(q, n, h // g, p)
            return tokens * (item * (g * n + states) + FLOAT32 * 5 * h) + arenas
        return tokens * (item * (4 * h * p + 2 * g * n + (h + g) * q + states) + FLOAT32 * 5 * h)
    return FLOAT32 * tokens * (3 * h * p + 2 * g * n + 2 * h * q + states)


def available_bytes(device: torch.device) -> int:
    """Memory that a process may still take on a device: a GPU's own, or the machine's up to the container's limit."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    available = _unused_memory()
    try:
        limit, used = ((CGROUP / f"memory.{name}").read_text().strip() for name in ("max", "current"))
    except FileNotFoundError:  # no container with cgroup v2
        return available
    return available if limit == "max" else min(available, int(limit) - int(used))


def _unused_memory() -> int:
    """Memory of the machine that can be used without swapping, from Linux or psutil, or else all of its memory."""
    try:
        lines = MEMORY_INFO.read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except FileNotFoundError:
        pass
    try:
        import psutil  # type: ignore[import-untyped]
    except ModuleNotFoundError:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return psutil.virtual_memory().available
