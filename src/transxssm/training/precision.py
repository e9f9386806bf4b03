"""What this machine computes with: an accelerator or the CPU, and whether bfloat16 products are fast there."""

import torch
from transformers.utils import is_torch_bf16_gpu_available

from transxssm.ops.devices import has_fast_products


def has_accelerator() -> bool:
    """Whether torch sees a GPU or another accelerator."""
    return torch.accelerator.is_available()


def has_fast_bfloat16() -> bool:
    """Whether the accelerator, or without one the CPU, multiplies bfloat16 in hardware."""
    if has_accelerator():
        return is_torch_bf16_gpu_available()
    return has_fast_products("cpu", torch.bfloat16)
