"""Whether a GPU's kernels can take some tensors, and what all of them need where they are launched."""

import functools
import logging
import os
import warnings
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec

import torch
from torch import Tensor

from transxssm.ops.watched import is_exporting, is_plain, is_watched

_SWITCH = "TRANSXSSM_GPU_KERNELS"
_DEVICE_TYPE = "cuda"  # of AMD's GPUs too, on which nobody has run these
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_OLDEST_CAPABILITY = (8, 0)  # with bfloat16
_logger = logging.getLogger(__name__)


def gpu_refusal(tensor: Tensor, *others: Tensor | None) -> str | None:
    """Why these tensors cannot be given to a GPU's kernels, or None if they can."""
    if is_exporting():
        return "an exported graph has torch's own operations alone"
    given = [each for each in (tensor, *others) if each is not None]
    if not all(each.device == tensor.device and each.device.type == _DEVICE_TYPE for each in given):
        return f"Triton's kernels need all tensors on one CUDA device: got {', '.join({str(each.device) for each in given})}"
    if not all(each.dtype in _DTYPES or not each.is_floating_point() for each in given):
        return (
            f"Triton's kernels take float32, bfloat16 and float16: got {', '.join({str(each.dtype) for each in given})}"
        )
    if not all(is_plain(each) for each in given):
        return f"Triton's kernels take plain tensors: got {', '.join({type(each).__name__ for each in given})}"
    if not _is_supported(tensor.device.index):
        return "Triton, a C compiler that it can use, or a GPU with bfloat16 (compute capability 8.0) is missing"
    return None


def has_gpu_kernels(tensor: Tensor, *others: Tensor | None) -> bool:
    """Whether the kernels can take these tensors, and no tracer, counter or transform has to see torch's operations instead."""
    return gpu_refusal(tensor, *others) is None and (torch.compiler.is_compiling() or not is_watched())


def gpu_kernels_of(device: torch.device) -> bool:
    """Whether there are kernels for this device at all."""
    return device.type == _DEVICE_TYPE and _is_supported(device.index or 0)


@torch.compiler.assume_constant_result
def _is_supported(index: int) -> bool:
    if torch.version.hip is None and torch.cuda.get_device_capability(index) < _OLDEST_CAPABILITY:
        return False
    return _triton_compiles()


@functools.cache
def _triton_compiles() -> bool:
    """Whether Triton is here and can launch what it compiles, for which it wants a C compiler; asked once a process."""
    if os.environ.get(_SWITCH, "1") == "0":
        return False
    if find_spec("triton") is None:
        _logger.info("no Triton: GPUs take torch's operations")
        return False
    try:
        from triton.runtime import driver

        driver.active.get_current_device()  # makes the library of the driver
    except Exception as error:
        warnings.warn(
            "the GPU's kernels could not be made, so that decoding takes torch's operations, which are slower; "
            f"{_SWITCH}=0 says that this is wanted. {type(error).__name__}: {error}",
            stacklevel=2,
        )
        return False
    return True


def launched_on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current GPU, which need not be the tensors'. What the compiler makes sees to it itself."""
    if torch.compiler.is_compiling() or device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def power_of_2(number: int) -> int:
    """The smallest that is no less than a number from 1 on: a side of a block."""
    return 1 << (number - 1).bit_length()
