"""Products of the model's linear layers, which are torch's own modules.

Quantisers look for `type(module) is nn.Linear`, and adapters, sharding and hooks act when a module is called. So the layers are plain
`nn.Linear`, and are called if anything besides torch's own forward may act. Otherwise their product comes from `transxssm.ops.linear`,
which is fast in half precision on any CPU.
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

DENSE = (nn.Parameter, Tensor)  # FSDP1 replaces a parameter by a view
LINEAR = (nn.Linear, NonDynamicallyQuantizableLinear)
HALF_PRECISION = (torch.bfloat16, torch.float16)


def apply_linear(module: nn.Module, x: Tensor) -> Tensor:
    """Computes `module(x)` with the fast products of a CPU, also inside the module of an adapter or a quantiser.

    Args:
        module: a linear layer, or the module by which an adapter or a quantiser has replaced it.
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
    """The weights of the layers, or None if one of them is not plain (`is_plain_linear`)."""
    weights = []
    for module in modules:
        weight = _plain_weight(module)
        if weight is None:
            return None
        weights.append(weight)
    return tuple(weights)


def is_plain_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a call of the module only computes x · weightᵀ with a dense weight.

    This is false for a subclass, a parametrised or replaced layer, a layer with a bias, a hook or a forward of its own (from accelerate or
    tensor parallelism), and a weight of another tensor class (torchao's quantised tensors, a DTensor).
    """
    return _plain_weight(module) is not None


def _plain_weight(module: nn.Module) -> Tensor | None:
    """The weight of a plain layer, or None for another layer.

    Decoding calls this some two hundred times for each token, so that attributes are read without `nn.Module.__getattr__`.
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
    """Upcasts to float32. A float64 tensor stays as it is."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


class _FastProducts(TorchFunctionMode):
    """Redirects the products inside a layer that is not plain, such as LoRA's base layer, to `transxssm.ops.linear`."""

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
