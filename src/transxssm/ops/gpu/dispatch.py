"""Whether a GPU's kernels can take some tensors."""

from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec

import torch
from torch import Tensor

from transxssm.ops.watched import is_plain, is_watched

_HAS_TRITON = find_spec("triton") is not None
_DEVICE_TYPE = "cuda"  # AMD's too
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_OLDEST_CAPABILITY = (8, 0)  # with bfloat16


def has_gpu_kernels(tensor: Tensor, *others: Tensor | None) -> bool:
    """Whether all lie on one GPU for which Triton compiles, in formats that the kernels read, and nobody would miss the operations."""
    given = [each for each in (tensor, *others) if each is not None]
    if not _HAS_TRITON or not all(each.device == tensor.device and each.device.type == _DEVICE_TYPE for each in given):
        return False
    if not all(each.dtype in _DTYPES and is_plain(each) for each in given) or not _is_new_enough(tensor.device.index):
        return False
    return torch.compiler.is_compiling() or not is_watched()


@torch.compiler.assume_constant_result
def _is_new_enough(index: int) -> bool:
    return torch.version.hip is not None or torch.cuda.get_device_capability(index) >= _OLDEST_CAPABILITY


def launched_on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current GPU, which need not be the tensors'. What the compiler makes sees to it itself."""
    is_elsewhere = (
        not torch.compiler.is_compiling() and device.type == "cuda" and device.index != torch.cuda.current_device()
    )
    return torch.cuda.device(device) if is_elsewhere else nullcontext()


def power_of_2(number: int) -> int:
    """The smallest that is no less than a number from 1 on: a side of a block."""
    return 1 << (number - 1).bit_length()
