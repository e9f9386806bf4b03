"""The scan's Triton kernels are the paper's sums: on a GPU at any size, on a CPU, through Triton's interpreter, at small ones."""

from dataclasses import replace

import pytest
import torch

from tests import gpu_kernels
from tests.ops.ssd.cases import assert_equal_laws, make_case, results
from tests.ops.ssd.oracle import ssd_oracle
from tests.ops.ssd.ways import one_call_each, sequences_in_a_row
from tests.tolerances import TOLERANCES
from transxssm.ops import dispatch
from transxssm.ops.ssd import SSDBackend, ssd_chunk_scan
from transxssm.ops.ssd.interface import SSD_CHUNK_SCAN

pytestmark = pytest.mark.usefixtures("scan_kernels")


@pytest.fixture(autouse=True)
def scan_kernels(monkeypatch, device):
    """On a CPU the interpreter computes; memory that is not written stays NaN."""
    gpu_kernels.install(monkeypatch, device, scans=True)
    dispatch._say_once.cache_clear()
    from transxssm.ops.ssd.triton import launch, scan

    class Poisoned:
        """torch, but that its empty tensors hold NaN."""

        def __getattr__(self, name):
            return getattr(torch, name)

        @staticmethod
        def empty(*shape, **options):
            return poisoned(torch.empty(*shape, **options))

        @staticmethod
        def empty_like(tensor, **options):
            return poisoned(torch.empty_like(tensor, **options))

    def poisoned(tensor):
        return tensor if isinstance(tensor, torch._subclasses.FakeTensor) else tensor.fill_(torch.nan)

    for module in (launch, scan):
        monkeypatch.setattr(module, "torch", Poisoned())


def kernels(chunk_size=None):
    return lambda case: case.scan(ssd_chunk_scan, backend="triton", chunk_size=chunk_size)


def dtypes_of(device: torch.device) -> list[torch.dtype]:
    """The interpreter multiplies bfloat16 as if it were integers."""
    return [torch.float32] if device.type == "cpu" else [torch.float32, torch.bfloat16]


@pytest.mark.parametrize(
    ("sizes", "chunk_size"),
    [
        pytest.param({"length": 1, "batch": 3}, None, id="one token"),
        pytest.param({"length": 33, "groups": 1, "heads_per_group": 3}, 16, id="a token in the last chunk"),
        pytest.param(
            {"length": 32, "groups": 3, "heads_per_group": 1, "without": ("D", "initial_state")}, 16, id="whole chunks"
        ),
        pytest.param(
            {"length": 50, "batch": 1, "heads_per_group": 6, "groups": 1}, 32, id="several programs for a group"
        ),
        pytest.param({"length": 37, "batch": 1, "state_size": 5, "without": ("rotary",)}, 64, id="an odd state"),
        pytest.param({"length": 20, "batch": 1, "groups": 1, "head_dim": 80, "state_size": 36}, 16, id="wide heads"),
        pytest.param({"documents": (16, 3, 1, 1, 20)}, 16, id="documents"),
    ],
)
def test_is_the_recurrence(sizes, chunk_size, device):
    for dtype in dtypes_of(device):
        case = make_case(dtype=dtype, device=device, **sizes)
        assert_equal_laws(kernels(chunk_size), ssd_oracle, case, expected_case=case.double())


@pytest.mark.parametrize("lengths", [(1, 16, 20), (33, 2)], ids=str)
def test_sequences_in_a_row_are_one_call_each(lengths, device):
    for dtype in dtypes_of(device):
        case, cu_seqlens = sequences_in_a_row(lengths, dtype=dtype, device=device)

        def in_a_row(case, cu_seqlens=cu_seqlens):
            return case.scan(ssd_chunk_scan, cu_seqlens=cu_seqlens, chunk_size=16, backend="triton")

        assert_equal_laws(in_a_row, one_call_each(lengths, ssd_oracle), case, expected_case=case.double())


def test_half_precision_inputs(device):
    """float16 stands for both half types where the interpreter computes."""
    case = make_case(length=20, batch=1, dtype=torch.float16, device=device)
    for name, tensor in results(kernels(16), case).items():
        wanted = results(ssd_oracle, case.double())[name]
        assert (tensor.double() - wanted).norm() <= TOLERANCES[torch.bfloat16] * wanted.norm(), name


def test_views_and_one_row_of_angles(device):
    """x, B and C as the model splits them out of one projection; cos and sin of one row for the batch."""
    case = make_case(
        length=20, batch=2, groups=2, heads_per_group=2, head_dim=4, state_size=8, dtype=torch.float32, device=device
    )
    wide = torch.cat([case.x.flatten(2), case.B.flatten(2), case.C.flatten(2)], dim=-1)
    x, B, C = wide.split([16, 16, 16], dim=-1)
    rotary = tuple(table[:1] for table in case.rotary)
    views = replace(
        case,
        x=x.unflatten(-1, (4, 4)),
        B=B.unflatten(-1, (2, 8)),
        C=C.unflatten(-1, (2, 8)),
        dt=case.dt.mT.contiguous().mT,
        rotary=rotary,
    )
    assert not views.x.is_contiguous()
    expected = replace(case, rotary=tuple(table.expand(2, -1, -1) for table in rotary))
    assert_equal_laws(kernels(16), ssd_oracle, views, expected_case=expected.double())


def test_two_runs_give_the_same_bits(device):
    case = make_case(length=40, batch=1, dtype=torch.float32, device=device)
    first, second = results(kernels(16), case), results(kernels(16), case)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_gradients_of_one_output_alone(device):
    case = make_case(length=20, batch=1, dtype=torch.float32, device=device)
    for place in (0, 1):
        grads = []
        for scan, given in ((kernels(16), case), (ssd_oracle, case.double())):
            B = given.B.detach().requires_grad_()
            grads.append(torch.autograd.grad(scan(replace(given, B=B))[place].square().sum(), B)[0].double())
        assert (grads[0] - grads[1]).norm() <= TOLERANCES[torch.float32] * grads[1].norm()


def test_the_first_backend_that_takes_the_call_is_chosen(device):
    case = make_case(length=3, dtype=torch.float32, device=device)
    choice = SSD_CHUNK_SCAN.explain(case.x, case.dt, case.A, case.B, case.C)
    assert list(choice.refusals) == list(SSDBackend)
    assert choice.backend == "triton"


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ({"head_dim": 130}, "head_dim of at most 64, or an even one up to 128: got 130"),
        ({"head_dim": 65}, "head_dim of at most 64, or an even one up to 128: got 65"),
        ({"state_size": 258}, "state size of at most 256: got 258"),
        ({"dtype": torch.float64}, "float32, bfloat16 and float16: got"),
    ],
)
def test_what_the_kernels_refuse(sizes, reason, device, caplog):
    case = make_case(**({"length": 2, "dtype": torch.float32} | sizes), device=device)
    with pytest.raises(ValueError, match=f"ssd_chunk_scan cannot be computed by the backend 'triton': .*{reason}"):
        kernels()(case)
    dispatch._say_once.cache_clear()
    case.scan(ssd_chunk_scan)  # another backend takes it
    assert any("slower than it could" in message for message in caplog.messages) == (case.x.dtype != torch.float64)


def test_tensors_of_another_device_are_refused(device, monkeypatch):
    monkeypatch.setattr(dispatch, "_TRITON_DEVICE", "another")
    with pytest.raises(ValueError, match="'triton': it is for tensors on a CUDA device"):
        kernels()(make_case(length=2, dtype=torch.float32, device=device))
