"""The SSD scan as Triton kernels for GPUs. Only `launch` and `kernels` import Triton; `scan` is the operator that calls them."""
