"""Who has the GPU's kernels, and who does not."""

import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch

from transxssm.ops.gpu import dispatch, gpu_kernels_of, has_gpu_kernels


def test_who_has_kernels(device, kernels, monkeypatch):
    tensor = torch.zeros(2, device=device)
    assert has_gpu_kernels(tensor, None, tensor.bfloat16())
    assert not has_gpu_kernels(tensor, tensor.double())
    assert not has_gpu_kernels(tensor, torch.zeros(2, device="meta"))

    class Subclass(torch.Tensor):
        pass

    assert not has_gpu_kernels(tensor, tensor.as_subclass(Subclass))
    assert has_gpu_kernels(tensor, torch.nn.Parameter(tensor))
    compiled = torch.compile(lambda x: x + has_gpu_kernels(x), fullgraph=True, backend="eager")
    assert [compiled(each).sum() for each in (tensor, tensor.double(), tensor.as_subclass(Subclass))] == [2, 0, 0]
    answers = []
    torch.vmap(lambda row: answers.append(has_gpu_kernels(row)) or row)(torch.zeros(2, 2, device=device))
    assert answers == [False]
    assert gpu_kernels_of(tensor.device)
    monkeypatch.setattr(dispatch, "_is_supported", lambda index: False)
    assert not has_gpu_kernels(tensor)
    assert not gpu_kernels_of(tensor.device)


@pytest.mark.parametrize("number", range(1, 70))
def test_power_of_2(number):
    side = dispatch.power_of_2(number)
    assert side.bit_count() == 1
    assert side // 2 < number <= side


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_old_gpus_take_torch(capability, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(dispatch, "_triton_compiles", lambda: True)
    assert dispatch._is_supported(0) == expected


@pytest.fixture
def asked_anew():
    dispatch._triton_compiles.cache_clear()
    yield
    dispatch._triton_compiles.cache_clear()


@pytest.mark.usefixtures("asked_anew")
class TestTriton:
    def test_it_is_switched_off(self, monkeypatch, recwarn):
        monkeypatch.setenv("TRANSXSSM_GPU_KERNELS", "0")
        assert not dispatch._triton_compiles()
        assert not recwarn

    def test_it_is_not_there(self, monkeypatch, recwarn):
        monkeypatch.setattr(dispatch, "find_spec", lambda name: None)
        assert not dispatch._triton_compiles()
        assert not recwarn

    def test_it_has_no_compiler(self, monkeypatch):
        driver = pytest.importorskip("triton.runtime").driver

        class WithoutCompiler:
            def get_current_device(self):
                raise RuntimeError("Failed to find C compiler")

        monkeypatch.setattr(driver, "_active", WithoutCompiler(), raising=False)
        with pytest.warns(
            UserWarning, match=r"slower; TRANSXSSM_GPU_KERNELS=0 .* RuntimeError: Failed to find C compiler"
        ):
            assert not dispatch._triton_compiles()
        assert not dispatch._triton_compiles(), "asked once"

    def test_it_compiles(self, monkeypatch):
        driver = pytest.importorskip("triton.runtime").driver

        class WithCompiler:
            def get_current_device(self):
                return 0

        monkeypatch.setattr(driver, "_active", WithCompiler(), raising=False)
        assert dispatch._triton_compiles()


def test_without_triton_the_ops_are_there():
    """As on a Mac, and beside a torch for CPUs."""
    code = (
        "import sys; sys.modules['triton'] = None; import torch, transxssm; from transxssm.ops.ssd import ssd_step_; "
        "ssd_step_(torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2), torch.ones(1, 1), -torch.ones(1), *torch.ones(2, 1, 1, 2))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_launches_go_where_the_tensors_are(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert isinstance(dispatch.launched_on(torch.device("cuda:1")), torch.cuda.device)
    assert isinstance(dispatch.launched_on(torch.device("cuda:0")), nullcontext)
    assert isinstance(dispatch.launched_on(torch.device("cpu")), nullcontext)
