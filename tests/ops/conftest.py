"""Ops with the CPU's kernels and without them, and with the GPU's."""

import pytest

from tests import gpu_kernels
from transxssm.ops import dispatch
from transxssm.ops.csrc import compiled_library


@pytest.fixture(params=["kernels", "operations"])
def with_and_without_kernels(request, monkeypatch, device):
    """Once with the CPU's kernels, once with torch's operations, which are what other devices and other machines have."""
    if request.param == "operations":
        monkeypatch.setattr(dispatch, "_reason_without_library", lambda: "none in this test")
    elif device.type != "cpu" or compiled_library() is None:
        pytest.skip("no kernels here")


@pytest.fixture
def kernels(monkeypatch, device):
    """The modules of the GPU's kernels, by name: on a GPU, or on a CPU through Triton's interpreter."""
    return gpu_kernels.install(monkeypatch, device)
