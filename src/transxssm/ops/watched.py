"""Whether somebody looks on who would not see a kernel: kernels read memory, torch's operations can be traced."""

import torch
from torch import Tensor, nn


def is_watched() -> bool:
    """Whether somebody traces, fakes, counts, maps or differentiates forwards. Not for the compiler, which can't trace the questions."""
    is_traced = torch._C._get_tracing_state() is not None
    has_modes = torch._C._len_torch_dispatch_stack() > 0 or torch.autograd.forward_ad._current_level >= 0
    is_transformed = (
        torch._C._functorch.peek_interpreter_stack() is not None
    )  # by vmap, grad, …: tensors without memory
    return is_traced or has_modes or is_transformed


@torch.compiler.assume_constant_result
def is_exporting() -> bool:
    """Whether `torch.export` traces. While `torch.compile` traces, torch 2.11's own function says so too; here it is called, not traced."""
    return torch.compiler.is_exporting()


def is_plain(tensor: Tensor) -> bool:
    """Whether it is no subclass, which may hold its numbers elsewhere."""
    return type(tensor) in (Tensor, nn.Parameter)
