"""Checks of tests/models/test_sharding.py, which several processes run together."""

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

from tests.models.tiny import gradients_of, tiny_config, tiny_model, tokens
from transxssm import TransXSSMCache, TransXSSMForCausalLM

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
    for variant, tied in (("hybrid", False), ("all_ssd", True), ("everything", True), ("everything", False)):
        name = f"{variant}, {'tied' if tied else 'untied'}"
        heads = {"num_key_value_heads": 2} if variant == "everything" else {}
        alone = saved_model(folder / name, variant, tie_word_embeddings=tied, **heads)
        sharded = AutoModelForCausalLM.from_pretrained(
            folder / name, distributed_config=DistributedConfig(tp_size=2), dtype=torch.float32
        )
        ids = tokens(2, 12) % VOCAB_SIZE
        found[name] = {"sharded": outcome(sharded, ids), "alone": outcome(alone, ids)}
    sharded.save_pretrained(folder / "saved")
    dist.barrier()
    again = AutoModelForCausalLM.from_pretrained(folder / "saved").state_dict()
    found["saved as it was"] = all(torch.equal(again[key], weight) for key, weight in alone.state_dict().items())
    saved_model(folder / "one group", "hybrid", ssd_num_groups=1)
    try:
        AutoModelForCausalLM.from_pretrained(folder / "one group", distributed_config=DistributedConfig(tp_size=2))
    except ValueError as error:
        found["one group"] = str(error)
    return found


def fsdp(folder: Path) -> dict[str, Any]:
    """bfloat16 models whose shards two processes have, by each of the ways to it, and each alone."""
    found = {}
    ids = tokens(2, 12) % VOCAB_SIZE
    for variant, tied in (("hybrid", True), ("mamba2", True), ("mamba2", False), ("all_attention", False)):
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


def context_parallel(folder: Path) -> dict[str, Any]:
    """Rows of several documents, and of one, in 1, 2 and 4 parts: logits of whole rows, loss and gradients by the number of parts."""
    groups = {
        4: dist.new_group([0, 1, 2, 3]),
        2: [dist.new_group(pair) for pair in ([0, 1], [2, 3])][dist.get_rank() // 2],
    }
    ids = tokens(2, 24)
    labels = ids.masked_fill(tokens(2, 24, seed=1) % 3 == 0, -100)
    documents = torch.tensor(
        [[5, 12, 5, 2], [1, 5, 17, 1]]
    )  # cuts lie inside them, between them, and behind a document of one token
    inputs = {
        "one document": {},
        "packed": {"seq_idx": torch.stack([torch.arange(4).repeat_interleave(row) for row in documents])},
        "restarts": {"position_ids": torch.cat([torch.arange(length) for length in (7, 12, 5)])[None]},
        "parts of 5 or 10 tokens": {"num_items_in_batch": torch.tensor(11)},
    }
    found: dict[str, Any] = {}
    chosen = {
        "hybrid": ["packed"],
        "mamba2": ["one document", "restarts"],
        "sliding": ["parts of 5 or 10 tokens"],
        "everything": inputs,
    }
    for variant, names in chosen.items():
        model = tiny_model(variant).train()
        for name in names:
            options = inputs[name]
            found[f"{variant}, {name}"] = outcomes = {}
            for size, group in ((1, None), *groups.items()):
                model.enable_context_parallel(group)
                length = 20 if name.startswith("parts") else 24
                output = model(ids[:, :length], labels=labels[:, :length], **options)
                output.loss.backward()
                gradients, logits = gradients_of(model), output.logits.detach()
                if group is not None:
                    for gradient in gradients.values():
                        dist.all_reduce(gradient, group=group)
                        gradient /= size
                    parts = [torch.empty_like(logits) for _ in range(size)]
                    dist.all_gather(parts, logits.contiguous(), group=group)
                    logits = torch.cat(parts, dim=1)
                outcomes[size] = {"loss": output.loss.detach(), "logits": logits, "gradients": gradients}
    found["options"] = context_parallel_with_options(groups[4], ids)
    found["refusals"] = context_parallel_refusals(groups[4])
    return found


def context_parallel_with_options(group: dist.ProcessGroup, ids: Tensor) -> dict[str, Any]:
    """The loss and a gradient of one process and of four that checkpoint gradients, form no logits, are given embeddings, or compile."""
    model = tiny_model("mamba2").train()
    found = {}

    def outcome_of(name: str, **arguments: Any) -> None:
        loss = model(labels=ids, **arguments).loss
        loss.backward()
        gradient = gradients_of(model)["model.layers.0.ssd.x_proj.weight"]
        dist.all_reduce(gradient)
        found[name] = (loss.detach(), gradient / 4)

    outcome_of("alone", input_ids=ids)
    model.enable_context_parallel(group)
    outcome_of("skip_logits", input_ids=ids, skip_logits=True)
    model.gradient_checkpointing_enable()
    outcome_of("gradient checkpointing", input_ids=ids)
    model.gradient_checkpointing_disable()
    embeddings = model.get_input_embeddings()(ids)
    outcome_of("embeddings", inputs_embeds=embeddings)
    return found


def context_parallel_refusals(group: dist.ProcessGroup) -> dict[str, str]:
    """What a model in parts says of what it cannot compute."""
    found = {}

    def refusal_of(name: str, length: int = 24, variant: str = "mamba2", **arguments: Any) -> None:
        implementation = arguments.pop("implementation", "sdpa")
        model = tiny_model(variant, attn_implementation=implementation)
        model.enable_context_parallel(group)
        ids = tokens(1, length)
        try:
            model(ids, **({"cache": {"past_key_values": TransXSSMCache(model.config)}}.get(name, {})), **arguments)
        except ValueError as error:
            found[name] = str(error)

    refusal_of("length", length=22)
    refusal_of("short parts", length=8)
    refusal_of("pads", attention_mask=(tokens(1, 24) != 7).long().index_fill(1, torch.tensor([0]), 0))
    refusal_of("cache")
    refusal_of("eager", implementation="eager")
    return found


CHECKS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "tensor_parallel": tensor_parallel,
    "fsdp": fsdp,
    "context_parallel": context_parallel,
}


def main(check: str, folder: Path) -> None:
    """Leaves what a check has found in `folder`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = CHECKS[check](folder)
    if dist.get_rank() == 0:
        torch.save(found, folder / "found.pt")
    dist.barrier()
    dist.destroy_process_group()
