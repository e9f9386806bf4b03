"""Tensor parallelism: each process of a group has some of the heads and groups of every layer, and all rows.

transformers' plan shards linear layers (`TransXSSMConfig.base_model_tp_plan`). An SSD layer also has parameters of heads, groups or
channels outside of linear layers. The styles of this module, which the plan names, give each process its share of them.

Letters: b batch, t time, e channels.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES, TensorParallelLayer

HEADS, MIXER, WIDE_NORM, ATTENTION = (
    "transxssm_heads",
    "transxssm_mixer",
    "transxssm_wide_norm",
    "transxssm_attention",
)


class _SumOfGradients(torch.autograd.Function):
    """A tensor that all processes hold and each uses in part. Its gradient is the sum over the processes."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class _Sum(torch.autograd.Function):
    """The sum over processes, with which each computes its own part."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = tensor.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


def refusal_of_heads(processes: int, **numbers: int) -> str | None:
    """Why heads and groups cannot be divided evenly among so many processes, or None if they can.

    Args:
        numbers: numbers of heads or groups, by the name of the field in the configuration.
    """
    for name, number in numbers.items():
        if number % processes:
            return (
                f"tensor parallelism over {processes} processes gives each of them whole heads and groups: got {name}={number}, "
                f"expected a multiple of {processes}"
            )
    return None


@contextmanager
def _own(module: Any, **replacements: Tensor) -> Iterator[None]:
    """Replaces, for one call of a module, its sharded parameters by this process's tensors, and others as given."""
    parameters = module._parameters
    given = dict(parameters)
    shards = {name: weight.to_local() for name, weight in given.items() if isinstance(weight, DTensor)}
    parameters.update({**shards, **replacements})
    try:
        yield
    finally:
        parameters.update(given)


class _OwnParameters(TensorParallelLayer):
    """Parameters whose first axis is divided among processes. A module computes with its own share."""

    def shard_param(self, module: nn.Module, param: str, mesh: DeviceMesh) -> None:
        weight = module._parameters.get(param)
        if weight is not None:
            sharded = distribute_tensor(weight, mesh, [Shard(0)], src_data_rank=None)
            module._parameters[param] = nn.Parameter(sharded, requires_grad=weight.requires_grad)

    def install_forward(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        forward = module.forward

        def with_own(*args: Any, **kwargs: Any) -> Any:
            with _own(module, **self.replacements(module, mesh)):
                return forward(*args, **kwargs)

        module.forward = with_own
        return module

    def replacements(self, module: nn.Module, mesh: DeviceMesh) -> dict[str, Tensor]:
        return {}


class _Mixer(_OwnParameters):
    """An SSD layer's parameters beside its linear layers: the biases of B and C, and the convolution.

    The channels of the convolution are those of x, then of B, then of C, so that the channels of a process are not contiguous. Every
    process holds all of them, a few thousand numbers.
    """

    def shard_param(self, module: nn.Module, param: str, mesh: DeviceMesh) -> None:
        if param != "conv_weight":
            super().shard_param(module, param, mesh)

    def install_forward(self, module: Any, mesh: DeviceMesh) -> nn.Module:
        refusal = refusal_of_heads(mesh.size(), ssd_num_heads=module.num_heads, ssd_num_groups=module.num_groups)
        if refusal is not None:
            raise ValueError(refusal)
        return super().install_forward(module, mesh)

    def replacements(self, module: Any, mesh: DeviceMesh) -> dict[str, Tensor]:
        if module.conv_weight is None:
            return {}
        whole: Tensor = _SumOfGradients.apply(module.conv_weight, mesh.get_group())
        rank, size = mesh.get_local_rank(), mesh.size()
        sections = whole.split(module.split_sizes)
        return {"conv_weight": torch.cat([section.chunk(size)[rank] for section in sections])}


class _WideNorm(_OwnParameters):
    """RMSNorm over channels that are divided among processes, which sum the squares of all channels."""

    def install_forward(self, module: Any, mesh: DeviceMesh) -> nn.Module:
        def normalised(x: Tensor) -> Tensor:
            weight = module.weight
            own = weight.to_local() if isinstance(weight, DTensor) else weight
            wide = x if x.dtype == torch.float64 else x.float()
            squares: Tensor = _Sum.apply(wide.square().sum(-1, keepdim=True), mesh.get_group())
            scale = torch.rsqrt(squares / (own.shape[0] * mesh.size()) + module.variance_epsilon)
            return (wide * scale * own).to(x.dtype)

        module.forward = normalised
        return module


class _Attention(TensorParallelLayer):
    """An attention layer, which is sharded by its linear layers if its heads can be divided."""

    def install_forward(self, module: Any, mesh: DeviceMesh) -> nn.Module:
        heads = {name: getattr(module.config, name) for name in ("num_attention_heads", "num_key_value_heads")}
        refusal = refusal_of_heads(mesh.size(), **heads)
        if refusal is not None:
            raise ValueError(refusal)
        return module


def divide_heads(model: Any, mesh: DeviceMesh) -> None:
    """Divides a model that every process holds whole, in place and by its plan, as transformers does while it loads a model.

    Args:
        mesh: the processes that share heads, in one dimension.
    """
    plan: dict[str, str] = model.tp_plan

    def style_of(name: str) -> TensorParallelLayer | None:
        style = plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", name))
        return None if style is None else ALL_PARALLEL_STYLES[style]

    for name, module in list(model.named_modules()):
        own = style_of(name) if name else None
        for parameter, _ in list(module.named_parameters(recurse=False)):
            style = style_of(f"{name}.{parameter}") or own
            if style is not None:
                style.shard_param(module, parameter, mesh)
        if own is not None:
            own.install_forward(module, mesh)
    model.tie_weights()


def register_styles() -> None:
    """Registers the styles with transformers by their names."""
    styles: dict[str, Callable[[], TensorParallelLayer]] = {
        HEADS: _OwnParameters,
        MIXER: _Mixer,
        WIDE_NORM: _WideNorm,
        ATTENTION: _Attention,
    }
    for name, style in styles.items():
        ALL_PARALLEL_STYLES.register(name, style())
