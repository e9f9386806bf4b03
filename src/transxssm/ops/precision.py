"""Which number formats a device has, and multiplies at full speed."""

import torch


def has_fast_products(device_type: str, dtype: torch.dtype) -> bool:
    """Whether matrix products of `dtype` run in hardware on such a device, CPUs included (AVX-512 BF16, AVX-512 FP16 or AMX).

    A CPU without falls back to loops that are several times slower than float32. Accelerators are taken at their word.
    """
    if device_type != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return True
    return _this_cpu_multiplies(dtype)


def has_float64(device: torch.device) -> bool:
    """Whether tensors on a device can be float64; on Apple's GPUs they cannot."""
    return device.type != "mps"


@torch.compiler.assume_constant_result  # the compiler refuses to trace torch's checks, and a process stays on its processor
def _this_cpu_multiplies(dtype: torch.dtype) -> bool:
    # torch 2.11 names no public check; `torch.cpu.get_capabilities()` came later.
    if dtype == torch.bfloat16:
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.cpu._is_amx_fp16_supported()
