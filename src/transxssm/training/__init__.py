"""Layer 2: training, from a recipe to a run folder."""

from transxssm.training.checkpoints import SaveError
from transxssm.training.loop import train
from transxssm.training.nonfinite import NonFiniteError
from transxssm.training.recipe import Recipe, bundled_recipes, load_recipe
from transxssm.training.trainer import TransXSSMTrainer

__all__ = [
    "NonFiniteError",
    "Recipe",
    "SaveError",
    "TransXSSMTrainer",
    "bundled_recipes",
    "load_recipe",
    "train",
]
