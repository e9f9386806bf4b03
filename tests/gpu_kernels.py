"""The GPU's kernels in tests: those of a GPU, or on a CPU, through Triton's interpreter."""

from importlib import import_module
from types import ModuleType, SimpleNamespace

import pytest
import torch

from transxssm.ops import dispatch

MODULES = {
    "step": "transxssm.ops.ssd.triton.step",
    "single_query_attention": "transxssm.ops.single_query_attention_triton",
    "cross_entropy": "transxssm.ops.linear_cross_entropy_triton",
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float32: torch.float32, torch.bfloat16: torch.bfloat16, torch.float16: torch.bfloat16}


def install(monkeypatch: pytest.MonkeyPatch, device: torch.device, *, scans: bool = False) -> SimpleNamespace:
    """The kernels' modules, by name; on a CPU the ops take them there for this test.

    Args:
        scans: with the kernels of the scan, which the interpreter takes seconds for, and whose bfloat16 products it gets wrong.
    """
    if device.type != "cuda":
        knobs = pytest.importorskip("triton", reason="no Triton, whose interpreter would run the kernels").knobs
        if not knobs.runtime.interpret:
            pytest.skip("Triton was imported to compile, not to interpret")
        monkeypatch.setattr(dispatch, "_TRITON_DEVICE", device.type)
        monkeypatch.setattr(dispatch, "reason_without_triton", lambda index: None)
        if not scans:
            monkeypatch.setattr("transxssm.ops.ssd.triton.scan.triton_refusal", lambda *tensors: "not in this test")
    return SimpleNamespace(**{name: import_module(path) for name, path in MODULES.items()})


def counted(monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str) -> list[int]:
    """A list that grows by one at each call of a module's function."""
    calls: list[int] = []
    function = getattr(module, name)

    def call(*arguments, **options):
        calls.append(1)
        return function(*arguments, **options)

    monkeypatch.setattr(module, name, call)
    return calls
