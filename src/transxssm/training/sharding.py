"""How processes share a run: data parallelism with whole weights (DDP) or with shards of them (torch's FSDP2), and parts of rows.

Weights, gradients and optimizer states of a sharded model are `DTensor`s; checkpoints hold its weights whole, as any other's.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from transxssm.models import TransXSSMForCausalLM
from transxssm.models.ssd_mixer import name_in_checkpoints

DATA_PARALLEL = ("ddp", "fsdp", "hsdp")
# Weights are gathered as they are, and rounded by autocast where it multiplies them, as in one process. FSDP would round the vectors of
# norms and the decays of SSD layers too. Gradients are summed in float32.
POLICY = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)


@dataclass(frozen=True)
class Parallelism:
    """The setting `training.parallelism`.

    Args:
        data: "ddp", each process has the whole model; "fsdp", all of them share it; "hsdp", those of a machine share it.
        cp: processes that share the tokens of each row (context parallelism).
    """

    data: str = "ddp"
    cp: int = 1

    @classmethod
    def of(cls, given: str | Mapping[str, Any] | None) -> "Parallelism":
        """Of a recipe's value, which is one word for `data`, or a mapping.

        Raises:
            ValueError: an unknown key or value.
        """
        fields = {"data": given} if isinstance(given, str) else dict(given or {})
        unknown = fields.keys() - {"data", "cp"}
        if unknown:
            raise ValueError(f"unknown key training.parallelism.{min(unknown)}: expected data or cp")
        parallelism = cls(**fields)
        if parallelism.data not in DATA_PARALLEL:
            raise ValueError(
                f"training.parallelism.data: got {parallelism.data!r}, expected one of {', '.join(DATA_PARALLEL)}"
            )
        if type(parallelism.cp) is not int or parallelism.cp < 1:
            raise ValueError(
                f"training.parallelism.cp: got {parallelism.cp!r}, expected a whole number of processes from 1 on"
            )
        return parallelism

    def check(self, processes: int, sequence_length: int, *, is_own_model: bool, uses_accelerate_fsdp: bool) -> None:
        """Checks that so many processes can share a run.

        Args:
            sequence_length: tokens of a row.
            is_own_model: the model is a TransXSSM.
            uses_accelerate_fsdp: sharding is asked for through `training.fsdp` or accelerate's environment.

        Raises:
            ValueError: they cannot.
        """
        if self == Parallelism():
            return
        if processes % self.cp:
            raise ValueError(
                f"training.parallelism.cp={self.cp}: got {processes} process{'es' if processes > 1 else ''}, expected a multiple of "
                f"{self.cp} (transxssm train … --gpus {self.cp})"
            )
        if sequence_length % self.cp:
            raise ValueError(
                f"training.parallelism.cp={self.cp} cuts rows into equal parts: got data.sequence_length={sequence_length}, expected a "
                f"multiple of {self.cp}"
            )
        if not is_own_model:
            raise ValueError(
                "training.parallelism is for model.architecture transxssm: a baseline is sharded by training.fsdp"
            )
        if uses_accelerate_fsdp:
            raise ValueError(
                "training.parallelism and training.fsdp (or accelerate's FSDP) both shard: leave out either"
            )


def shard(model: TransXSSMForCausalLM, mesh: DeviceMesh) -> None:
    """Shards a model in place: every layer is gathered for its own turn; embeddings, last norm and head, for the whole step.

    The head has no unit of its own, which would call for its logits: the loss is formed without them.

    Args:
        mesh: over whose processes gradients are averaged. Of two dimensions the second shards, and the first replicates (HSDP).
    """
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=POLICY)
    fully_shard(model, mesh=mesh, mp_policy=POLICY, reshard_after_forward=False)


def mesh_of(parallelism: Parallelism, device_type: str) -> DeviceMesh:
    """The processes over which gradients are averaged: all of them. A row's processes average too, since its loss is that of the whole."""
    world = dist.get_world_size()
    if parallelism.data == "hsdp":
        local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
        return init_device_mesh(device_type, (world // local, local), mesh_dim_names=("replicate", "shard"))
    return init_device_mesh(device_type, (world,), mesh_dim_names=("shard",))


def is_sharded(model: nn.Module) -> bool:
    return any(isinstance(weight, DTensor) for weight in model.parameters())


def compile_layers(model: TransXSSMForCausalLM) -> None:
    """Compiles layer by layer, which takes a graph for each kind of layer in place of one for each layer.

    To be called after `shard`, whose hooks stay outside of the graphs.
    """
    for layer in model.model.layers:
        layer.forward = torch.compile(layer.forward)


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights of a sharded model on the CPU of the first process, tied ones once; empty in the others. All processes call it."""
    tied = getattr(model, "all_tied_weights_keys", {})
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights: dict[str, Any] = get_model_state_dict(model, options=options)
    return {name: weight for name, weight in weights.items() if name not in tied}


@torch.no_grad()
def load_whole_weights(model: nn.Module, checkpoint: Path) -> None:
    """Puts the safetensors of a checkpoint into a sharded model, each process its shards."""
    saved: dict[str, Tensor] = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        saved |= load_file(file)
    for name, weight in model.named_parameters():
        weight.copy_(_sharded_like(weight, saved[name_in_checkpoints(name)]))


def save_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Each process writes its shards of the optimizer's state, by the names of the weights."""
    save({"optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=folder)


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Reads what any number of processes has written by `save_optimizer`, into a model that is sharded in any way, or not at all."""
    state = {"optimizer": get_optimizer_state_dict(model, optimizer)}
    load(state, checkpoint_id=folder)
    set_optimizer_state_dict(model, optimizer, state["optimizer"])


def load_whole_optimizer(optimizer: torch.optim.Optimizer, file: Path) -> None:
    """Reads an optimizer's state that one process has written for whole weights into one for shards."""
    saved = torch.load(file, map_location="cpu", weights_only=True)
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    for number, state in saved["state"].items():
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == weights[number].shape:
                state[key] = _sharded_like(weights[number], value)
    optimizer.load_state_dict(saved)


def _sharded_like(weight: Tensor, whole: Tensor) -> Tensor:
    if not isinstance(weight, DTensor):
        return whole.to(weight.device)
    return distribute_tensor(whole.to(weight.device), weight.device_mesh, weight.placements, src_data_rank=None)
