"""Kernels for CPUs, in C++, compiled on the machine that runs them; without a compiler the ops take torch's operations."""

from transxssm.ops.csrc.build import compiled_library, has_tiles
from transxssm.ops.csrc.launch import Kernels, kernels_for, kernels_inside_operator

__all__ = ["Kernels", "compiled_library", "has_tiles", "kernels_for", "kernels_inside_operator"]
