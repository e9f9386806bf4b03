"""How the ops call the C++ functions of this folder: by name, with every argument checked against the type that the library states."""

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from transxssm.ops.csrc.build import compiled_library, reason_without_library

_FORMATS = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_NUMBERS: dict[str, Any] = {"void": None, "int64": ctypes.c_int64, "float32": ctypes.c_float}
# The dtype of a tensor for each pointer type of the library. Pointers to void take the dtype for which the function was compiled.
_POINTEES = {
    "float32*": torch.float32,
    "float64*": torch.float64,
    "bfloat16*": torch.bfloat16,
    "int64*": torch.int64,
    "int32*": torch.int32,
    "uint8*": torch.uint8,
    "void*": None,
}

Argument = Tensor | int | float | ctypes.Structure


class Structure(ctypes.Structure):
    """The base class of the library's structures. A structure keeps the tensors alive whose addresses it holds."""

    types: dict[str, str]  # type of each field

    def fill(self, **values: Tensor | int | float | None) -> None:
        """Sets fields: numbers, and tensors where the field is a pointer, or None for a null pointer.

        Raises:
            TypeError: there is no such field, or a tensor has another dtype than the field's type says or is not on the CPU.
        """
        kept, types = self.__dict__.setdefault("tensors", {}), self.types
        for name, value in values.items():
            if name not in types:
                raise TypeError(f"{type(self).__name__} has no field {name!r}: expected one of {', '.join(types)}")
            if type(value) is not int and isinstance(value, Tensor):
                kept[name] = value
                values[name] = _address(value, types[name], name)
        super().__init__(
            **values
        )  # one call; setting each field by itself would take 15 calls for each structure of a decoded token


class Function:
    """A C++ function with the types of its result and arguments."""

    def __init__(
        self, name: str, address: int, result: str, types: list[str], structures: dict[str, type[Structure]]
    ) -> None:
        self._name = name
        self._types = types
        self._call = ctypes.CFUNCTYPE(_NUMBERS[result], *(_ctypes_type(each, structures) for each in types))(address)

    def __call__(self, *arguments: Argument) -> Any:
        """Calls it. Tensors must be contiguous.

        Raises:
            TypeError: the number or the types of the arguments do not fit.
        """
        if len(arguments) != len(self._types):
            raise TypeError(f"{self._name} takes {len(self._types)} arguments ({self._types}): got {len(arguments)}")
        values: list[Any] = []
        for argument, expected in zip(arguments, self._types, strict=True):
            if isinstance(argument, Tensor):
                if not argument.is_contiguous():
                    raise TypeError(f"{self._name} takes contiguous tensors: got strides {argument.stride()}")
                values.append(_address(argument, expected, self._name))
            elif expected in _POINTEES:  # ctypes would take any integer as an address
                raise TypeError(f"{self._name} takes a tensor for {expected}: got {argument!r}")
            else:
                values.append(argument)
        try:
            return self._call(*values)
        except ctypes.ArgumentError as error:
            raise TypeError(f"{self._name} takes ({', '.join(self._types)}): {error}") from error


class Library:
    """The functions and structures of the compiled library, with the types that it states itself (library.h)."""

    def __init__(self, loaded: ctypes.CDLL) -> None:
        self._loaded = loaded  # keeps the library loaded
        self.functions: dict[str, dict[str, Function]] = {}  # by number format and name
        self.structures: dict[str, type[Structure]] = {}
        describe = loaded.describe_library
        describe.argtypes, describe.restype = (), ctypes.c_char_p
        for kind, name, *rest in map(str.split, _structures_with_fields(describe().decode())):
            if kind == "structure":
                self.structures[name] = _structure(name, int(rest[0]), rest[1:])
            else:
                formats, address, result, *types = rest
                made = Function(f"{name} ({formats})", int(address), result, types, self.structures)
                self.functions.setdefault(formats, {})[name] = made


class Kernels:
    """The functions for one number format.

    Args:
        formats: the number format, and for the scan also that of the operands of its matrix products where it differs (library.h).
    """

    def __init__(self, library: Library, formats: str) -> None:
        self._library = library
        self._functions = library.functions[formats]

    def run(self, name: str, *arguments: Argument) -> None:
        """Calls a function. Tensors must be contiguous and on the CPU, with the dtypes that the function declares.

        Raises:
            TypeError: an argument does not fit.
        """
        self._functions[name](*arguments)

    def on_rows(self, name: str, rows: Tensor, *arguments: Tensor | int | float) -> None:
        """Calls a function of rows.cpp for (n, d)."""
        self.run(name, *rows.shape, torch.get_num_threads(), *arguments)

    def num_tasks(self, num_rows: int) -> int:
        """The number of tasks that a function of rows.cpp splits n rows into."""
        return int(self._library.functions["any"]["num_row_tasks"](num_rows))

    def num_splits(self, num_keys: int) -> int:
        """The number of parts that single_query.cpp splits the keys into."""
        return int(self._library.functions["any"]["num_splits"](num_keys))

    def structure(self, name: str, **values: Tensor | int | float | None) -> Structure:
        """A structure with these fields; all others are 0."""
        made = self._library.structures[name]()
        made.fill(**values)
        return made


def kernels_of(dtype: torch.dtype, operand: torch.dtype | None = None) -> Kernels:
    """The kernels for tensors of `dtype`, which the C++ library must have: an op's table of backends says where it does.

    Args:
        operand: the dtype that operands of matrix products have. Defaults to `dtype`.
    """
    library = compiled_library()
    if library is None:
        raise RuntimeError(
            f"expected the C++ kernels, which a graph was compiled for: {reason_without_library()}; compile it again on this machine"
        )
    by = "" if operand in (None, dtype) else f"_by_{_FORMATS[operand]}"
    return _kernels(library, _FORMATS[dtype] + by)


@torch.compiler.assume_constant_result
def has_bf16_gemm() -> bool:
    """Whether the library has the register-blocked AVX-512 BF16 GEMM of gemm_bf16.h, and with it what is built on it."""
    loaded = compiled_library()
    return loaded is not None and bool(_library(loaded).functions["any"]["has_bf16_gemm"]())


def arena_bytes(chunk_length: int, state_size: int, heads_per_group: int, head_dim: int) -> int:
    """The bytes that a thread needs for the matrices of one chunk and group in scan_bf16.cpp, where there is the GEMM."""
    loaded = compiled_library()
    assert loaded is not None
    return int(_library(loaded).functions["any"]["arena_bytes"](chunk_length, state_size, heads_per_group, head_dim))


@functools.cache
def _library(loaded: ctypes.CDLL) -> Library:
    return Library(loaded)


@functools.cache
def _kernels(loaded: ctypes.CDLL, formats: str) -> Kernels:
    return Kernels(_library(loaded), formats)


def _address(tensor: Tensor, expected: str, where: str) -> int:
    if expected not in _POINTEES:
        raise TypeError(f"{where} takes {expected}: got a tensor")
    dtype = _POINTEES[expected]
    if not (tensor.is_cpu and (dtype is None or tensor.dtype is dtype)):
        raise TypeError(f"{where} takes {expected} on the CPU: got {tensor.dtype} on {tensor.device}")
    return tensor.data_ptr()


def _ctypes_type(name: str, structures: dict[str, type[Structure]]) -> Any:
    if name in structures:
        return ctypes.POINTER(structures[name])
    return ctypes.c_void_p if name in _POINTEES else _NUMBERS[name]


def _structures_with_fields(description: str) -> list[str]:
    """The lines of a description, with the fields of a structure on the line of the structure."""
    return description.replace("\nfield", "").splitlines()


def _structure(name: str, size: int, fields: list[str]) -> type[Structure]:
    """The structure of so many bytes with fields (name, offset, type) one after the other."""
    names, offsets, types = fields[::3], [int(offset) for offset in fields[1::3]], fields[2::3]
    members = [(each, _ctypes_type(of_type, {})) for each, of_type in zip(names, types, strict=True)]
    made = type(name, (Structure,), {"_fields_": members, "types": dict(zip(names, types, strict=True))})
    laid_out = [getattr(made, each).offset for each in names]
    if laid_out != offsets or ctypes.sizeof(made) != size:
        raise RuntimeError(
            f"the compiled library describes its structure {name} with other fields than it has: got {ctypes.sizeof(made)} "
            f"bytes from the description, expected {size}. List every field in the order of its declaration (TRANSXSSM_FIELD)"
        )
    return made
