"""Properties of a device: the dtypes it multiplies fast, the work that fits its cache, and whether it runs Triton's kernels."""

import functools
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec

import torch
from torch import Tensor

ELEMENTS_PER_BLOCK = 2**18  # 1 MiB of float32
GPU_SWITCH = "TRANSXSSM_GPU_KERNELS"
_OLDEST_CAPABILITY = (8, 0)  # the first one with bfloat16


def has_fast_products(device_type: str, dtype: torch.dtype) -> bool:
    """Whether a device multiplies matrices of `dtype` in hardware, on a CPU by AVX-512 BF16, AVX-512 FP16 or AMX.

    A CPU without such instructions falls back to loops that are several times slower than float32. Accelerators are assumed to have them.
    """
    if device_type != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return True
    return _this_cpu_multiplies(dtype)


def has_float64(device: torch.device) -> bool:
    """Whether tensors on a device can be float64; on Apple's GPUs they cannot."""
    return device.type != "mps"


def row_blocks(rows: Tensor) -> Iterator[slice]:
    """Slices over the first axis of (n, d), for elementwise work whose intermediate results should stay in the cache.

    On a CPU a slice has about 2^18 elements. A GPU gains nothing from blocks, so that there is one slice.
    """
    num_rows, width = rows.shape
    step = num_rows if rows.device.type != "cpu" else max(1, ELEMENTS_PER_BLOCK // max(width, 1))
    for start in range(0, num_rows, max(step, 1)):
        yield slice(start, min(start + step, num_rows))


@torch.compiler.assume_constant_result
def reason_without_triton(index: int) -> str | None:
    """Why the GPU with this index cannot run Triton's kernels, or None if it can."""
    if torch.version.hip is None and torch.cuda.get_device_capability(index) < _OLDEST_CAPABILITY:
        return f"this GPU has no bfloat16: it needs compute capability {'.'.join(map(str, _OLDEST_CAPABILITY))}"
    return _reason_against_compiling()


def launched_on(device: torch.device) -> AbstractContextManager[object]:
    """Makes the device of the tensors the current GPU, on which Triton launches. What `torch.compile` generates does so itself."""
    if torch.compiler.is_compiling() or device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def power_of_2(number: int) -> int:
    """The smallest power of 2 that is not less than a number ≥ 1: the side of a block."""
    return 1 << (number - 1).bit_length()


@functools.cache
def _reason_against_compiling() -> str | None:
    """Why Triton cannot compile and launch kernels in this process, or None if it can. It needs a C compiler for launching."""
    if os.environ.get(GPU_SWITCH, "1") == "0":
        return f"{GPU_SWITCH}=0 switches them off"
    if find_spec("triton") is None:
        return "Triton is not installed: run `pip install triton`"
    try:
        from triton.runtime import driver

        driver.active.get_current_device()  # compiles the library that launches kernels
    except Exception as error:
        return f"Triton cannot launch kernels, for which it needs a C compiler: {type(error).__name__}: {error}"
    return None


@torch.compiler.assume_constant_result  # the compiler cannot trace torch's checks, and a process stays on its processor
def _this_cpu_multiplies(dtype: torch.dtype) -> bool:
    # torch 2.11 names no public check; `torch.cpu.get_capabilities()` came later.
    if dtype == torch.bfloat16:
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.cpu._is_amx_fp16_supported()
