"""The scan and the step as Triton kernels for GPUs. `scan`, the operator around the scan, can be imported without Triton."""
