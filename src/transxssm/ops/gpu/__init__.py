"""Kernels for GPUs, in Triton, which CUDA builds of torch bring along; without it, or a C compiler, the ops take torch's operations.

The compiler of torch takes these kernels as they are, so that what it compiles and what it doesn't run the same.
"""

from transxssm.ops.gpu.dispatch import gpu_kernels_of, gpu_refusal, has_gpu_kernels

__all__ = ["gpu_kernels_of", "gpu_refusal", "has_gpu_kernels"]
