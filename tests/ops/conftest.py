"""Ops that have kernels for CPUs are tested with and without them."""

import pytest

from transxssm.ops.csrc import launch
from transxssm.ops.csrc.build import compiled_library


@pytest.fixture(params=["kernels", "operations"])
def with_and_without_kernels(request, monkeypatch, device):
    """Once with the CPU's kernels, once with torch's operations, which are what other devices and other machines have."""
    if request.param == "operations":
        monkeypatch.setattr(launch, "compiled_library", lambda: None)
    elif device.type != "cpu" or compiled_library() is None:
        pytest.skip("no kernels here")
