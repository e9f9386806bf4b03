"""Kernels for GPUs in Triton, which CUDA builds of torch bring along. `torch.compile` takes them as they are."""
