"""The command line's fixtures, since benchmarks and studies are commands too."""

from tests.cli.conftest import _own_settings, corpus, error_of, recipe, run
from tests.training.conftest import _empty_pictures

__all__ = ["_empty_pictures", "_own_settings", "corpus", "error_of", "recipe", "run"]
