"""How the ops call scan.cpp and rows.cpp: tensors go over as addresses."""

import ctypes
from typing import Any

import torch
from torch import Tensor

from transxssm.ops.cpu.library import compiled_library

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


def kernels_for(tensor: Tensor, *, operand: torch.dtype | None = None) -> Kernels | None:
    """The kernels for such a tensor, with products in `operand`'s format. None, and torch's operations, where there are none.

    The compiler sees the operations too, and makes its own of them.
    """
    if tensor.device.type != "cpu" or tensor.dtype not in _DTYPES or torch.compiler.is_compiling():
        return None
    library = compiled_library()
    if library is None:
        return None
    by = "" if operand in (None, tensor.dtype) else f"_by_{_DTYPES[operand]}"
    return Kernels(library, _DTYPES[tensor.dtype] + by)


def _converted(argument: Tensor | int | float | ctypes.Structure) -> Any:
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    if isinstance(argument, ctypes.Structure):
        return ctypes.byref(argument)
    return ctypes.c_int64(argument) if isinstance(argument, int) else ctypes.c_float(argument)
