"""Kernels for CPUs, in C++, compiled on the machine that runs them; without a compiler the ops take torch's operations."""

from transxssm.ops.cpu.kernels import Kernels, kernels_for, kernels_inside_operator
from transxssm.ops.cpu.library import compiled_library, has_tiles

__all__ = ["Kernels", "compiled_library", "has_tiles", "kernels_for", "kernels_inside_operator"]
