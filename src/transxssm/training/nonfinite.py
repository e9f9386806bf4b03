"""Finds where a training step first became non-finite, by running the batch again with hooks on every module."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, fields, is_dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from transxssm.models.ssd_mixer import name_in_checkpoints

LOSS = "the loss"


class NonFiniteError(ValueError):
    """The loss or a gradient became NaN or infinite. That step changed no weight."""


@dataclass(frozen=True)
class Origin:
    """The first quantity that was not finite.

    Args:
        quantity: the quantity in words.
        where: path of the module in which it arose, path of the parameter for a parameter's gradient, or "the loss".
        note: a parameter of that module that was not finite before the step, if there is one.
    """

    quantity: Literal["activation", "SSD state", "gradient"]
    where: str
    note: str = ""

    def __str__(self) -> str:
        return f"{self.quantity} of {self.where}{self.note}"


def find_origin(model: nn.Module, loss_of_batch: Callable[[], Tensor]) -> Origin | None:
    """Runs a batch forward and backward again and returns what first became non-finite, or None if all stays finite.

    Args:
        model: the module that `loss_of_batch` runs. Its gradients are overwritten.
        loss_of_batch: computes the loss, with its graph.
    """
    model.zero_grad()
    watch = _Watch(model)
    with watch.hooks():
        loss = loss_of_batch()
        if watch.origin is None and not _finite(loss):
            watch.origin = Origin("activation", LOSS)
        if watch.origin is None:
            watch.forward_done = True
            loss.backward()
    model.zero_grad()
    return watch.origin


@dataclass
class _Passage:
    """A tensor between modules: the modules that read it, and the module whose own code made it or reads it."""

    readers: list[nn.Module] = field(default_factory=list)
    enclosing: nn.Module | None = None


class _Watch:
    """Hooks on every module but the head: outputs on the way forward, gradients of outputs and of parameters on the way back.

    With a hook, the head would compute all logits of the batch at once, for which there may be no memory.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.names = {module: name_in_checkpoints(name) for name, module in model.named_modules()}
        self.origin: Origin | None = None
        self.forward_done = False
        self.running: list[nn.Module] = []
        # Weak keys, since activation checkpointing frees these tensors, and another tensor may get the id of one.
        self.passages = WeakTensorKeyDictionary()

    def hooks(self) -> ExitStack:
        stack = ExitStack()
        model: Any = self.model
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        for module in self.names:
            if module is head:
                continue
            stack.callback(module.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True).remove)
            stack.callback(module.register_forward_hook(self._after, with_kwargs=True).remove)
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                hook = partial(self._on_parameter_gradient, name_in_checkpoints(name))
                stack.callback(parameter.register_post_accumulate_grad_hook(hook).remove)
        return stack

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self.forward_done:  # activation checkpointing recomputes layers in the backward pass
            return
        for tensor in _tensors((args, kwargs)):
            self._passage_of(tensor).readers.append(module)
            if self.running and not _finite(tensor):
                self._found_in(self.running[-1])
        self.running.append(module)

    def _after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self.forward_done:
            return
        self.running.pop()
        for tensor in _tensors(output):
            if not _finite(tensor):
                self._found_in(module)
            passage = self._passage_of(tensor)
            if passage.enclosing is None:
                tensor.register_hook(partial(self._on_gradient, passage))
            passage.enclosing = self.running[-1] if self.running else module

    def _passage_of(self, tensor: Tensor) -> _Passage:
        passage: _Passage = self.passages.setdefault(tensor, _Passage())
        return passage

    def _found_in(self, module: nn.Module) -> None:
        if self.origin is not None:
            return
        # Inside a mixer every projection is a module of its own, so that the mixer's own code is the recurrence of the state.
        quantity: Literal["activation", "SSD state"] = "SSD state" if hasattr(module, "A_log") else "activation"
        bad = [name for name, parameter in module.named_parameters(recurse=False) if not _finite(parameter)]
        note = f" (its {', '.join(bad)} was not finite before the step)" if bad else ""
        self.origin = Origin(quantity, self.names[module] or LOSS, note)

    def _on_gradient(self, passage: _Passage, gradient: Tensor) -> None:
        if self.origin is not None or _finite(gradient):
            return
        # The gradient of a tensor comes from its readers: the innermost module that reads it, or else the code around its maker.
        readers = passage.readers
        innermost = [m for m in readers if not any(other is not m and other in set(m.modules()) for other in readers)]
        named = innermost or ([passage.enclosing] if passage.enclosing is not None else [])
        names = [self.names[module] for module in named]
        self.origin = Origin("gradient", _common_module(names) or LOSS)

    def _on_parameter_gradient(self, name: str, parameter: Tensor) -> None:
        if self.origin is None and parameter.grad is not None and not _finite(parameter.grad):
            self.origin = Origin("gradient", name)


def _common_module(names: list[str]) -> str:
    paths = [name.split(".") for name in names]
    shared = 0
    while all(len(path) > shared and path[shared] == paths[0][shared] for path in paths):
        shared += 1
    return ".".join(paths[0][:shared])


def _tensors(value: Any) -> Iterator[Tensor]:
    """Tensors between parameters and loss. Masks, which may hold −inf, are left out, since they require no gradient."""
    if isinstance(value, Tensor):
        if value.requires_grad:
            yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif is_dataclass(value):
        for part in fields(value):
            yield from _tensors(getattr(value, part.name))


def _finite(tensor: Tensor) -> bool:
    # Detached, since activation checkpointing raises if tensors saved in the first run are not saved again in the second.
    return bool(torch.isfinite(tensor.detach()).all())
