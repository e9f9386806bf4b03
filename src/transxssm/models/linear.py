"""Products of the model's linear layers, which are torch's own modules.

Quantisers look for `type(module) is nn.Linear`; adapters, sharding and hooks act when a module is called. So the layers are plain, and
are called wherever anything but torch's own forward may act. Everywhere else their product comes from `transxssm.ops.linear`, which is
fast in half precision on any CPU.
"""

from collections.abc import Callable, Iterable
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.overrides import TorchFunctionMode

from transxssm.ops import linear

DENSE = (nn.Parameter, Tensor)  # FSDP1 leaves a view in the place of a parameter
LINEAR = (nn.Linear, NonDynamicallyQuantizableLinear)
HALF_PRECISION = (torch.bfloat16, torch.float16)


def apply_linear(module: nn.Module, x: Tensor) -> Tensor:
    """What `module(x)` gives, with the fast products of a CPU, also inside an adapter's or a quantiser's module.

    Args:
        module: a linear layer, or what an adapter or a quantiser has put in its place.
        x: (…, i).
    """
    output: Tensor
    if torch.compiler.is_compiling():
        output = module(x)
    elif type(x) is Tensor and (weight := _plain_weight(module)) is not None:
        output = linear(x, weight)
    elif x.device.type == "cpu" and (x.dtype in HALF_PRECISION or torch.is_autocast_enabled("cpu")):
        with _FastProducts():
            output = module(x)
    else:
        output = module(x)
    return output


def plain_weights(modules: Iterable[nn.Module]) -> tuple[Tensor, ...] | None:
    """The weights of layers that are all plain (`is_plain_linear`), else None."""
    weights = []
    for module in modules:
        weight = _plain_weight(module)
        if weight is None:
            return None
        weights.append(weight)
    return tuple(weights)


def is_plain_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether x · weightᵀ with the module's dense weight is all that a call of it does.

    Not of a subclass, a parametrised or replaced layer, one with a bias, a hook or a forward of its own (accelerate's and tensor
    parallelism's), nor of a weight that is a tensor of another class (torchao's quantised one, a DTensor).
    """
    return _plain_weight(module) is not None


def _plain_weight(module: nn.Module) -> Tensor | None:
    """The weight of a plain layer, else None.

    Decoding asks some two hundred times a token, so attributes are read without `nn.Module.__getattr__`.
    """
    if type(module) not in LINEAR:
        return None
    state = module.__dict__
    parameters = state["_parameters"]
    weight = parameters["weight"] if "weight" in parameters else state.get("weight")
    has_bias = parameters.get("bias") is not None or "bias" in state
    return weight if type(weight) in DENSE and not has_bias and is_untouched(module) else None


def is_untouched(module: nn.Module) -> bool:
    """Whether a call of the module runs the forward of its class and nothing else: no hooks, and no forward of its own."""
    state = module.__dict__
    return not (
        "forward" in state
        or state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
        or module_hooks._has_any_global_hook()
    )


def at_least_float32(tensor: Tensor) -> Tensor:
    """float64 stays; everything below float32 is raised to it."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


class _FastProducts(TorchFunctionMode):
    """Takes the products of a layer that is not plain, such as those of LoRA's base layer, from `transxssm.ops.linear` too."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is F.linear and not kwargs and len(args) in (2, 3) and (len(args) == 2 or args[2] is None):
            x, weight = args[:2]
            if type(x) is Tensor and type(weight) in DENSE:
                return linear(x, weight)
        return func(*args, **(kwargs or {}))
