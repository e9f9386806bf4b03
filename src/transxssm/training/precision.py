"""What this machine computes with: an accelerator or the CPU, and whether bfloat16 products are fast there."""

import torch
from transformers.utils import is_torch_bf16_gpu_available


def has_accelerator() -> bool:
    """Whether torch sees a GPU or another accelerator."""
    return torch.accelerator.is_available()


def has_fast_bfloat16() -> bool:
    """Whether the accelerator, or without one the CPU (AVX-512 BF16 or AMX), multiplies bfloat16 in hardware."""
    if has_accelerator():
        return is_torch_bf16_gpu_available()
    # torch 2.11 names no public check; `torch.cpu.get_capabilities()` came later.
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
