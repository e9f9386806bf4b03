"""Kernels for CPUs, in C++, compiled on the machine that runs them; without a compiler the ops take torch's operations."""

from transxssm.ops.csrc.build import compiled_library, reason_without_library
from transxssm.ops.csrc.launch import (
    Kernels,
    Structure,
    arena_bytes,
    has_bf16_gemm,
    kernels_of,
)

__all__ = [
    "Kernels",
    "Structure",
    "arena_bytes",
    "compiled_library",
    "has_bf16_gemm",
    "kernels_of",
    "reason_without_library",
]
