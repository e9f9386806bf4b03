"""A stand-in for Apple's GPUs, which have no float64: on a CPU, with what the code asks about the device answered as there."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from transxssm.models import modeling_transxssm
from transxssm.models.modeling_transxssm import TransXSSMRotaryEmbedding
from transxssm.ops import dispatch, rotary
from transxssm.ops.ssd import blocks, chunked, decays

REFUSAL = "Cannot convert a MPS Tensor to float64 dtype"


class OnAppleGPU(Tensor):
    """A tensor that can't become float64 before `cpu()` has made it an ordinary one."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(function, types, args, kwargs or {})
        if function is Tensor.cpu:
            return result.as_subclass(Tensor)
        if isinstance(result, Tensor) and result.dtype == torch.float64:
            raise TypeError(REFUSAL)
        return result


class _NoFloat64(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if any(isinstance(leaf, Tensor) and leaf.dtype == torch.float64 for leaf in tree_leaves(result)):
            raise TypeError(f"{REFUSAL}: {function}")
        return result


def _look_into(operator: Any, function: Callable[..., Any]) -> None:
    """What a custom operator does inside is hidden from a mode."""

    def watched(mode: Any, op: Any, types: Any, args: Any, kwargs: Any) -> Any:
        with mode:
            return function(*args, **kwargs)

    operator.register_torch_dispatch(_NoFloat64, watched)


_look_into(chunked._scan, chunked._forward_chunks)
_look_into(chunked._scan_backward, chunked._backward_chunks)


@contextmanager
def apple_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No operation may form a float64 tensor, but those that the rotary table moves to the CPU; no kernel of a CPU is there."""

    tables = TransXSSMRotaryEmbedding.tables

    def tables_from_cpu(*arguments: Any) -> Any:
        with _disable_current_modes():
            return tables(*arguments)

    with monkeypatch.context() as patch, _NoFloat64():
        for module in (modeling_transxssm, rotary, decays):
            patch.setattr(module, "has_float64", lambda device: False)
        for module in (blocks, chunked):
            patch.setattr(module, "is_on_cpu", lambda tensor: False)
        patch.setattr(dispatch, "_reason_without_library", lambda: "these are a CPU's")
        patch.setattr(import_module("transxssm.ops.short_convolution"), "SHORTEST_FOR_OPERATOR", 1000)
        patch.setattr(TransXSSMRotaryEmbedding, "tables", tables_from_cpu)
        yield
