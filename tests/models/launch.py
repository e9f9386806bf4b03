"""Runs a check of tests/models/test_sharding.py in each of two processes: launch.py NAME FOLDER."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
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
        "sharded": {name for name, weight in model.named_parameters() if isinstance(weight, DTensor)},
        "dtypes": {name: weight.dtype for name, weight in model.named_parameters()},
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


CHECKS: dict[str, Callable[[Path], dict[str, Any]]] = {"tensor_parallel": tensor_parallel}


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
