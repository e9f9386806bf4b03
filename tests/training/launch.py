"""Trains a recipe in a process of its own: launch.py RECIPE [section.key=value …] [--resume] [--kill-in-step N]."""

import argparse
import os
import signal

import torch

from transxssm.training import TransXSSMTrainer, load_recipe, train


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--kill-in-step", type=int)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.kill_in_step:
        kill_in_step(arguments.kill_in_step)
    train(load_recipe(arguments.recipe, arguments.overrides), resume=arguments.resume)


def kill_in_step(step: int) -> None:
    """Ends this process as power loss would, after the gradients of a step and before its update."""
    training_step = TransXSSMTrainer.training_step

    def deadly(self, *args, **kwargs):
        loss = training_step(self, *args, **kwargs)
        if self.state.global_step + 1 == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return loss

    TransXSSMTrainer.training_step = deadly


if __name__ == "__main__":
    main()
