"""Trains a recipe in a process of its own: RECIPE [section.key=value …] [--resume] [--kill-in-step N] [--shard-on-cpu]
[--stream]."""

import argparse
import dataclasses
import os
import signal

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

from transxssm.training import Recipe, TrainingData, TransXSSMTrainer, load_recipe, text_data, train


def main(*given: object) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--kill-in-step", type=int)
    parser.add_argument("--shard-on-cpu", action="store_true")
    parser.add_argument("--stream", action="store_true")
    arguments = parser.parse_args([*map(str, given)])
    torch.set_num_threads(1)
    if arguments.kill_in_step:
        kill_in_step(arguments.kill_in_step)
    if arguments.shard_on_cpu:
        shard_on_cpu()
    source = streamed_text if arguments.stream else text_data
    train(load_recipe(arguments.recipe, arguments.overrides), resume=arguments.resume, source=source)
    assert not dist.is_initialized()  # NCCL warns of a group that is left


def streamed_text(recipe: Recipe) -> TrainingData:
    """A recipe's text as a stream of several files, as one from the hub is."""
    data = text_data(recipe)
    return dataclasses.replace(data, train=data.train.to_iterable_dataset(num_shards=4), contents={})


def kill_in_step(step: int) -> None:
    """Ends this process as power loss would, after the gradients of a step and before its update."""
    training_step = TransXSSMTrainer.training_step

    def deadly(self, *args, **kwargs):
        loss = training_step(self, *args, **kwargs)
        if self.state.global_step + 1 == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return loss

    TransXSSMTrainer.training_step = deadly


def shard_on_cpu() -> None:
    """Lets accelerate take FSDP's settings on the CPU too, where it otherwise leaves them out, and checks that it does."""
    initialise, training_step = AcceleratorState.__init__, TransXSSMTrainer.training_step

    def with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
        initialise(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)

    def sharded(self, model, *args, **kwargs):
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
        return training_step(self, model, *args, **kwargs)

    AcceleratorState.__init__, TransXSSMTrainer.training_step = with_fsdp, sharded
