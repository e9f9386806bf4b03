"""What the tests of the evaluations' pictures share."""

import sys
from contextlib import contextmanager

import pytest
from matplotlib.figure import Figure


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draws a picture and gives its axes."""

    def draw(plot, *arguments):
        axes = Figure().subplots()

        @contextmanager
        def picture(path):
            yield axes

        monkeypatch.setattr(sys.modules[plot.__module__], "picture", picture)
        plot(tmp_path / "picture.png", *arguments)
        return axes

    return draw
