"""What the tests at real sizes share: the paper's two presets, and what they leave out where there is no GPU."""

import pytest
import torch

PRESETS = pytest.mark.parametrize("preset", ["320m", "1.3b"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
# What `torch.compile` generates code with. On a CPU nothing: that would take longer than all the rest, and capture is what fails.
COMPILER = {"cuda": "inductor", "cpu": "aot_eager"}


def documents_of(length: int) -> tuple[int, int, int]:
    """Lengths of three documents in a row, odd and one of them a single token, so that boundaries lie inside chunks."""
    first = length // 3 | 1
    return first, 1, length - first - 1
