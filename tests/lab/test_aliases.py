"""Benchmarks and studies can be imported by the names they had inside the product, and say the new ones."""

import importlib
import sys

import pytest


@pytest.mark.parametrize("name", ["benchmarking", "studies"])
def test_old_names_lead_to_the_new_ones(monkeypatch, name):
    monkeypatch.delitem(sys.modules, f"transxssm.{name}", raising=False)
    with pytest.warns(FutureWarning, match=f"transxssm.{name} is now transxssm_lab.{name}"):
        old = importlib.import_module(f"transxssm.{name}")
    new = importlib.import_module(f"transxssm_lab.{name}")
    assert old.__all__ == new.__all__
    assert all(getattr(old, public) is getattr(new, public) for public in new.__all__)
