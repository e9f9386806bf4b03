"""Runs a check of tests/models/test_sharding.py in each of two processes: launch.py NAME FOLDER."""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils.dataclasses import get_module_class_from_name
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from tests.models.tiny import tiny_config, tokens
from transxssm import TransXSSMForCausalLM

VOCAB_SIZE = 96  # a process has half of the head's rows


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def saved_model(folder: Path, variant: str, **options: Any) -> TransXSSMForCausalLM:
    """A model in a folder that all processes see; the same in each of them."""
    torch.manual_seed(1)
    model = TransXSSMForCausalLM(tiny_config(variant, vocab_size=VOCAB_SIZE, **options))
    if dist.get_rank() == 0:
        model.save_pretrained(folder)
    dist.barrier()
    return model


def outcome(model: nn.Module, ids: Tensor) -> dict[str, Any]:
    """Loss, logits and gradients of one batch, and what is generated."""
    sharded = {name for name, weight in model.named_parameters() if isinstance(weight, DTensor)}
    dtypes = {name: weight.dtype for name, weight in model.named_parameters()}
    model.train()
    output = model(ids, labels=ids)
    loss = whole(output.loss)
    loss.backward()
    gradients = {name: whole(weight.grad).float() for name, weight in model.named_parameters()}
    generated = model.eval().generate(ids[:, :6], max_new_tokens=5, do_sample=False)
    return {
        "loss": loss.detach().float(),
        "logits": whole(output.logits).detach().float(),
        "generated": generated,
        "gradients": gradients,
        "sharded": sharded,
        "dtypes": dtypes,
    }


def tensor_parallel(folder: Path) -> dict[str, Any]:
    """Models over two processes, and each alone."""
    found = {}
    for variant in ("hybrid", "all_ssd", "everything"):
        for tied in (True, False):
            name = f"{variant}, {'tied' if tied else 'untied'}"
            heads = {"num_key_value_heads": 2} if variant == "everything" else {}
            alone = saved_model(folder / name, variant, tie_word_embeddings=tied, **heads)
            sharded = AutoModelForCausalLM.from_pretrained(
                folder / name, distributed_config=DistributedConfig(tp_size=2), dtype=torch.float32
            )
            ids = tokens(2, 12) % VOCAB_SIZE
            found[name] = {"sharded": outcome(sharded, ids), "alone": outcome(alone, ids)}
    return found


def fsdp(folder: Path) -> dict[str, Any]:
    """bfloat16 models whose shards two processes have, by each of the ways to it, and each alone."""
    found = {}
    ids = tokens(2, 12) % VOCAB_SIZE
    for variant in ("hybrid", "mamba2", "all_attention"):
        for tied in (True, False):
            name = f"{variant}, {'tied' if tied else 'untied'}"
            saved_model(folder / name, variant, tie_word_embeddings=tied)

            def load(path: Path = folder / name, **options: Any) -> TransXSSMForCausalLM:
                return AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, **options)

            found[name] = {
                "alone": outcome(load(), ids),
                "transformers": outcome(load(distributed_config=DistributedConfig(fsdp_size=2)), ids),
                "accelerate": outcome(sharded_by_accelerate(load()), ids),
                "alone, after a step": loss_after_step(load(), ids),
                "FSDP1, after a step": loss_after_step(sharded_by_fsdp1(load()), ids),
            }
    return found


def sharded_by_accelerate(model: TransXSSMForCausalLM) -> nn.Module:
    """FSDP2, in the units that accelerate makes of a model's `_no_split_modules`."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
    )
    accelerator = Accelerator(cpu=True)
    accelerator.state.fsdp_plugin = plugin  # which it leaves out on a CPU
    return fsdp2_prepare_model(accelerator, model)


def sharded_by_fsdp1(model: TransXSSMForCausalLM) -> nn.Module:
    """FSDP1, in the units that accelerate makes of a model's `_no_split_modules`."""
    kinds = {get_module_class_from_name(model, name) for name in model._no_split_modules}
    policy = partial(transformer_auto_wrap_policy, transformer_layer_cls=kinds)
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu"))


def loss_after_step(model: nn.Module, ids: Tensor) -> Tensor:
    """Of gradient descent; FSDP1 shows gradients in pieces."""
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.05)
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    return model(ids, labels=ids).loss.detach()


CHECKS: dict[str, Callable[[Path], dict[str, Any]]] = {"tensor_parallel": tensor_parallel, "fsdp": fsdp}


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    folder = Path(sys.argv[2])
    found = CHECKS[sys.argv[1]](folder)
    if dist.get_rank() == 0:
        torch.save(found, folder / "found.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
