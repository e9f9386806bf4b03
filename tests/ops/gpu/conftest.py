"""The GPU's kernels, on a GPU, or on a CPU through Triton's interpreter."""

import pytest

from tests import gpu_kernels


@pytest.fixture
def kernels(monkeypatch, device):
    """Their modules, by name."""
    return gpu_kernels.install(monkeypatch, device)
