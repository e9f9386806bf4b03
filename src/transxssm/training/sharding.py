"""Parallelism in a run: data parallelism with whole weights (DDP) or shards (torch's FSDP2), context and tensor parallelism.

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
from torch.distributed.checkpoint.api import CheckpointException
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

from transxssm.models import TransXSSMConfig, TransXSSMForCausalLM
from transxssm.models.configuration_transxssm import SSD_LAYER_TYPE
from transxssm.models.ssd_mixer import name_in_checkpoints
from transxssm.models.tensor_parallel import divide_heads, refusal_of_heads

DATA_PARALLEL = ("ddp", "fsdp", "hsdp")
# Weights are gathered unrounded, and autocast rounds operands of products, as in one process. FSDP's mixed precision would also round
# the vectors of norms and the decays of SSD layers. Gradients are summed in float32.
POLICY = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)


@dataclass(frozen=True)
class Parallelism:
    """The setting `training.parallelism`.

    Args:
        data: "ddp" replicates the model in each process, "fsdp" shards it over all, "hsdp" shards it over those of a machine.
        cp: processes that share the tokens of each row (context parallelism).
        tp: processes that share the heads of each layer (tensor parallelism).
    """

    data: str = "ddp"
    cp: int = 1
    tp: int = 1

    @property
    def sharing(self) -> int:
        """Number of processes that compute the same rows together."""
        return self.cp * self.tp

    @classmethod
    def of(cls, given: str | Mapping[str, Any] | None) -> "Parallelism":
        """Reads a recipe's value, which is a word for `data`, or a mapping.

        Raises:
            ValueError: a key or value is unknown.
        """
        fields = {"data": given} if isinstance(given, str) else dict(given or {})
        unknown = fields.keys() - {"data", "cp", "tp"}
        if unknown:
            raise ValueError(f"unknown key training.parallelism.{min(unknown)}: expected data, cp or tp")
        parallelism = cls(**fields)
        if parallelism.data not in DATA_PARALLEL:
            raise ValueError(
                f"training.parallelism.data: got {parallelism.data!r}, expected one of {', '.join(DATA_PARALLEL)}"
            )
        for name in ("cp", "tp"):
            number = getattr(parallelism, name)
            if type(number) is not int or number < 1:
                raise ValueError(
                    f"training.parallelism.{name}: got {number!r}, expected a whole number of processes from 1 on"
                )
        if parallelism.cp > 1 and parallelism.tp > 1:
            raise ValueError(
                f"training.parallelism: got cp={parallelism.cp} and tp={parallelism.tp}, expected one of them"
            )
        return parallelism

    def check(
        self,
        processes: int,
        sequence_length: int,
        *,
        config: TransXSSMConfig | None,
        uses_accelerate_fsdp: bool,
        compiles: bool = False,
    ) -> None:
        """Checks that so many processes can share a run.

        Args:
            sequence_length: tokens in a row.
            config: configuration of the model, or None if it is not a TransXSSM.
            uses_accelerate_fsdp: whether `training.fsdp` or accelerate's environment requests sharding.

        Raises:
            ValueError: they cannot.
        """
        if self == Parallelism():
            return
        got = f"got {processes} process{'es' if processes > 1 else ''}"
        for name, number in (("cp", self.cp), ("tp", self.tp)):
            if processes % number:
                raise ValueError(
                    f"training.parallelism.{name}={number}: {got}, expected a multiple of {number} (transxssm train … --gpus {number})"
                )
        if self.tp > 1 and self.data == "ddp" and processes > self.tp:
            raise ValueError(
                f"training.parallelism.tp={self.tp} with data: ddp: {got}, expected {self.tp}; for more, data: fsdp shares weights among "
                "the processes that have the same heads"
            )
        if sequence_length % self.cp:
            raise ValueError(
                f"training.parallelism.cp={self.cp} cuts rows into equal parts: got data.sequence_length={sequence_length}, expected a "
                f"multiple of {self.cp}"
            )
        if config is None:
            raise ValueError(
                "training.parallelism is for model.architecture transxssm: a baseline is sharded by training.fsdp"
            )
        if uses_accelerate_fsdp:
            raise ValueError(
                "training.parallelism and training.fsdp (or accelerate's FSDP) both shard: leave out either"
            )
        if self.tp > 1:
            self._check_heads(config, compiles)

    def _check_heads(self, config: TransXSSMConfig, compiles: bool) -> None:
        names = ["ssd_num_heads", "ssd_num_groups"] if SSD_LAYER_TYPE in config.layer_types else []
        names += ["num_attention_heads", "num_key_value_heads"] if config.has_attention else []
        refusal = refusal_of_heads(self.tp, **{name: getattr(config, name) for name in names})
        if refusal is not None:
            raise ValueError(f"training.parallelism.tp: {refusal}")
        if compiles:
            raise ValueError(
                "training.torch_compile: got true with training.parallelism.tp, which is not compiled; leave out either"
            )


def shard(model: TransXSSMForCausalLM, mesh: DeviceMesh) -> None:
    """Shards a model in place. A layer is gathered while it runs; embeddings, last norm and head for the whole step.

    The head has no unit of its own, since that would require calling it, and the loss is computed without calling the head.

    Args:
        mesh: the processes over which gradients are averaged. If there are two dimensions, the first replicates and the second shards
            (HSDP).
    """
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=POLICY)
    fully_shard(model, mesh=mesh, mp_policy=POLICY, reshard_after_forward=False)


def mesh_of(parallelism: Parallelism, device_type: str) -> DeviceMesh:
    """The processes over which gradients are averaged and, in another dimension, those that share heads by tensor parallelism.

    Processes that share a row also average gradients, since each has the loss of the whole row.
    """
    world = dist.get_world_size()
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    replicas = world // local if parallelism.data == "hsdp" else 1
    sizes = {"dp_replicate": replicas, "dp_shard": world // replicas // parallelism.tp, "tp": parallelism.tp}
    kept = {
        name: size
        for name, size in sizes.items()
        if name == "dp_shard" or (name == "tp" and size > 1) or (name == "dp_replicate" and parallelism.data == "hsdp")
    }
    return init_device_mesh(device_type, tuple(kept.values()), mesh_dim_names=tuple(kept))


def share_weights(model: TransXSSMForCausalLM, parallelism: Parallelism, mesh: DeviceMesh) -> None:
    """Divides heads, then shards the weights of each process.

    Args:
        mesh: the mesh from `mesh_of`.
    """
    names = [name for name in mesh.mesh_dim_names or () if name != "tp"]
    if parallelism.tp > 1:
        divide_heads(model, mesh["tp"])
    if parallelism.data != "ddp" and mesh.size() > parallelism.tp:
        shard(model, mesh[tuple(names)] if len(names) > 1 else mesh[names[0]])


def is_sharded(model: nn.Module) -> bool:
    return any(isinstance(weight, DTensor) for weight in model.parameters())


def keep_two_groups(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Makes two parameter groups, with and without weight decay, so that checkpoints have the same groups under every parallelism.

    Trainer makes a group for each mesh, whose weights one kernel can update.
    """
    order = {id(weight): number for number, weight in enumerate(model.parameters())}
    merged: dict[float, dict[str, Any]] = {}
    for group in optimizer.param_groups:
        merged.setdefault(group["weight_decay"], {**group, "params": []})["params"] += group["params"]
    for group in merged.values():
        group["params"].sort(key=lambda weight: order[id(weight)])
    optimizer.param_groups[:] = merged.values()
    update_one_by_one(optimizer)


def update_one_by_one(optimizer: torch.optim.Optimizer) -> None:
    """Switches off the kernel for several weights, which must be on one mesh."""
    for group in optimizer.param_groups:
        group |= {name: False for name in ("foreach", "fused") if name in group}


def compile_layers(model: TransXSSMForCausalLM) -> None:
    """Compiles layer by layer, so that there is one graph for each kind of layer and not for each layer.

    Call it after `shard`, so that its hooks stay outside of the graphs.
    """
    for layer in model.model.layers:
        layer.forward = torch.compile(layer.forward)


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights of a sharded model on the CPU of the first process, tied ones once. Empty in the others. All processes must call it."""
    tied = getattr(model, "all_tied_weights_keys", {})
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights: dict[str, Any] = get_model_state_dict(model, options=options)
    return {name: weight for name, weight in weights.items() if name not in tied}


@torch.no_grad()
def load_whole_weights(model: nn.Module, checkpoint: Path) -> None:
    """Loads the safetensors of a checkpoint into a sharded model. Each process loads its shards."""
    saved: dict[str, Tensor] = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        saved |= load_file(file)
    for name, weight in model.named_parameters():
        weight.copy_(_sharded_like(weight, saved[name_in_checkpoints(name)]))


def save_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Writes this process's shards of the optimizer's state, by the names of the weights.

    Raises:
        RuntimeError: a process could not write its shards. The cause says why.
    """
    try:
        save({"optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=folder)
    except CheckpointException as error:  # not an Exception, and its message has the traceback of every process
        cause, _ = next(iter(error.failures.values()))
        raise RuntimeError(str(cause)) from cause


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Reads the state that `save_optimizer` has written in any number of processes, for a model with any sharding or none."""
    state = {"optimizer": get_optimizer_state_dict(model, optimizer)}
    load(state, checkpoint_id=folder)
    set_optimizer_state_dict(model, optimizer, state["optimizer"])


def load_whole_optimizer(optimizer: torch.optim.Optimizer, file: Path) -> None:
    """Reads an optimizer's state that one process has written for whole weights into an optimizer of shards."""
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
