"""Layer 2: training, from a recipe to a run folder."""

from transxssm.training.checkpoints import SaveError
from transxssm.training.interrupt import BudgetSpentError, stopped_at
from transxssm.training.loop import TrainingData, text_data, train
from transxssm.training.nonfinite import NonFiniteError
from transxssm.training.recipe import Recipe, bundled_recipes, load_recipe, recipe_of
from transxssm.training.trainer import TransXSSMTrainer

__all__ = [
    "BudgetSpentError",
    "NonFiniteError",
    "Recipe",
    "SaveError",
    "TrainingData",
    "TransXSSMTrainer",
    "bundled_recipes",
    "load_recipe",
    "recipe_of",
    "stopped_at",
    "text_data",
    "train",
]
