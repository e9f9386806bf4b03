"""The command line's fixtures, since benchmarks and studies are commands too."""

from tests.cli.conftest import _own_settings, corpus, error_of, recipe, run

__all__ = ["_own_settings", "corpus", "error_of", "recipe", "run"]
