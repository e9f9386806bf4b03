"""How the ops call what is in the C++ files: tensors go over as addresses."""

import ctypes
from typing import Any

import torch
from torch import Tensor

from transxssm.ops.csrc.build import compiled_library
from transxssm.ops.watched import is_plain, is_watched

_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


class Kernels:
    """The functions for one number format.

    Args:
        suffix: what ends their names: the format, for the scan also that of its products where it is another.
    """

    def __init__(self, library: ctypes.CDLL, suffix: str) -> None:
        self._library: Any = library
        self._suffix = suffix

    def run(self, name: str, *arguments: Tensor | int | float | ctypes.Structure) -> None:
        """Calls a function. Tensors must lie in memory as it expects them: contiguous, where its source says nothing else."""
        getattr(self._library, f"{name}_{self._suffix}")(*map(_converted, arguments))

    def on_rows(self, name: str, rows: Tensor, *arguments: Tensor | int | float) -> None:
        """Calls a function of rows.cpp on (n, d)."""
        self.run(name, *rows.shape, torch.get_num_threads(), *arguments)

    def num_tasks(self, num_rows: int) -> int:
        """Tasks that a function of rows.cpp splits n rows into."""
        return int(self._library.tasks_of_rows(ctypes.c_int64(num_rows)))


def kernels_for(tensor: Tensor, *others: Tensor | None) -> Kernels | None:
    """The kernels for `tensor`'s format; None where there are none: torch's operations do it then.

    There are none either where somebody would not see them: who traces, fakes, counts, maps or differentiates forwards. The compiler
    makes its own of torch's operations.
    """
    if torch.compiler.is_compiling():  # first, since the compiler cannot trace the other questions
        return None
    return None if is_watched() else kernels_inside_operator(tensor, *others)


def kernels_inside_operator(
    tensor: Tensor, *others: Tensor | None, operand: torch.dtype | None = None
) -> Kernels | None:
    """The same inside a custom operator, which is watched from outside; with products in `operand`'s format.

    Kernels read memory: all tensors have to lie on the CPU, and be no subclass that holds theirs elsewhere.
    """
    if tensor.dtype not in _DTYPES or not all(_is_readable(each) for each in (tensor, *others) if each is not None):
        return None
    library = compiled_library()
    if library is None:
        return None
    by = "" if operand in (None, tensor.dtype) else f"_by_{_DTYPES[operand]}"
    return Kernels(library, _DTYPES[tensor.dtype] + by)


def _is_readable(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and is_plain(tensor)


def _converted(argument: Tensor | int | float | ctypes.Structure) -> Any:
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    if isinstance(argument, ctypes.Structure):
        return ctypes.byref(argument)
    if isinstance(argument, int):
        return ctypes.c_int64(argument)
    if isinstance(argument, float):
        return ctypes.c_float(argument)
    raise TypeError(f"a kernel takes tensors, int and float: got {type(argument).__name__}")
