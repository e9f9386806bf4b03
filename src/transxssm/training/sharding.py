"""A model whose weights, gradients and optimizer states several processes share: torch's FSDP2, layer by layer."""

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from transxssm.models import TransXSSMForCausalLM

# Weights are gathered as they are, and rounded by autocast where it multiplies them, as in one process. FSDP would round the vectors of
# norms and the decays of SSD layers too. Gradients are summed in float32.
POLICY = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)


def shard(model: TransXSSMForCausalLM, mesh: DeviceMesh) -> None:
    """Shards a model in place: every layer is gathered for its own turn; embeddings, last norm and head, for the whole step.

    The head has no unit of its own, which would call for its logits: the loss is formed without them.

    Args:
        mesh: over whose processes gradients are averaged. Of two dimensions the second shards, and the first replicates (HSDP).
    """
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=POLICY)
    fully_shard(model, mesh=mesh, mp_policy=POLICY, reshard_after_forward=False)


def compile_layers(model: TransXSSMForCausalLM) -> None:
    """Compiles layer by layer, which takes a graph for each kind of layer in place of one for each layer.

    To be called after `shard`, whose hooks stay outside of the graphs.
    """
    for layer in model.model.layers:
        layer.forward = torch.compile(layer.forward)
