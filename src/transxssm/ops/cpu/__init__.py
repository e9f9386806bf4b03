"""Kernels for CPUs, in C++, compiled on the machine that runs them; without a compiler the ops take torch's operations."""

from transxssm.ops.cpu.kernels import Kernels, kernels_for

__all__ = ["Kernels", "kernels_for"]
