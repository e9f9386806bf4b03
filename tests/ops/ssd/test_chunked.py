"""The chunked scan against the paper's sums: any chunk, any length, any precision, and at the edges of the number range."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

from tests.ops.ssd.cases import Case, assert_equal_laws, make_case, results
from tests.ops.ssd.oracle import ssd_oracle
from tests.tolerances import assert_close
from transxssm.ops.ssd import ssd_chunk_scan
from transxssm.ops.ssd.blocks import BLOCK_SCORES

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
pytestmark = pytest.mark.usefixtures("with_and_without_kernels")


def chunked(chunk_size: int | None):
    return lambda case: case.scan(ssd_chunk_scan, backend="chunked", chunk_size=chunk_size)


def assert_equals_oracle(case: Case, chunk_size: int | None) -> None:
    assert_equal_laws(chunked(chunk_size), ssd_oracle, case, expected_case=case.double())


@DTYPES
@pytest.mark.parametrize("length", [1, 15, 16, 17, 97, 251])
def test_any_length(length, dtype, device):
    assert_equals_oracle(make_case(length=length, dtype=dtype, device=device), chunk_size=16)


@DTYPES
@pytest.mark.parametrize("chunk_size", [1, 2, 7, 31, 32, 33, 1000, None])
def test_any_chunk_size(chunk_size, dtype, device):
    assert_equals_oracle(make_case(length=32, dtype=dtype, device=device), chunk_size)


@DTYPES
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("groups", "heads_per_group"), [(1, 1), (1, 4), (3, 1), (2, 3)])
def test_any_grouping(batch, groups, heads_per_group, dtype, device):
    case = make_case(batch=batch, groups=groups, heads_per_group=heads_per_group, dtype=dtype, device=device)
    assert_equals_oracle(case, chunk_size=8)


@DTYPES
def test_widths_of_a_real_model(dtype, device):
    case = make_case(batch=1, length=130, groups=1, head_dim=64, state_size=128, dtype=dtype, device=device)
    assert_equals_oracle(case, chunk_size=64)


@DTYPES
@pytest.mark.parametrize(
    "documents", [(8, 8), (16, 3), (7, 9), (9, 7), (1,) * 19, (3, 1, 1, 20, 2), (30, 1), (1, 30)], ids=str
)
def test_document_boundaries_on_beside_and_inside_chunks(documents, dtype, device):
    assert_equals_oracle(make_case(documents=documents, dtype=dtype, device=device), chunk_size=8)


@given(data=st.data())
def test_any_shape_and_any_options(data, device):
    documents = data.draw(st.lists(st.integers(1, 20), min_size=1, max_size=5))
    case = make_case(
        batch=data.draw(st.sampled_from([1, 3])),
        groups=data.draw(st.integers(1, 3)),
        heads_per_group=data.draw(st.integers(1, 3)),
        head_dim=data.draw(st.integers(1, 5)),
        state_size=2 * data.draw(st.integers(1, 4)),
        documents=documents,
        without=data.draw(st.lists(st.sampled_from(["D", "initial_state", "rotary", "seq_idx"]), unique=True)),
        dtype=data.draw(st.sampled_from([torch.float64, torch.float32])),
        seed=data.draw(st.integers(0, 2**16)),
        device=device,
    )
    assert_equals_oracle(case, chunk_size=data.draw(st.integers(1, sum(documents) + 2)))


def with_time_steps(case: Case, log_decay: torch.Tensor) -> Case:
    """The case with dt·A = `log_decay`, (t,) or anything that broadcasts to (b, t, h), and A = −16."""
    A = torch.full_like(case.A, -16)
    return replace(case, A=A, dt=(log_decay.to(A) / -16).expand_as(case.dt).contiguous())


EXTREMES = {
    "all gone at each step": torch.full((40, 1), -50.0),
    "nothing happens": torch.zeros(40, 1),
    "gone and kept in turn": torch.tensor([-50.0, 0.0] * 20)[:, None],
    "kept, gone once, kept": torch.tensor([-0.01] * 20 + [-50.0] + [-0.01] * 19)[:, None],
    "from keeping to losing": -torch.logspace(-4, 1.69, 40)[:, None],
}


@DTYPES
@pytest.mark.parametrize("log_decay", EXTREMES.values(), ids=EXTREMES.keys())
@pytest.mark.parametrize("documents", [(40,), (17, 23)], ids=str)
def test_extreme_decays(documents, log_decay, dtype, device):
    case = make_case(documents=documents, dtype=dtype, device=device)
    case = with_time_steps(case, log_decay)
    for name, result in results(chunked(16), case).items():
        assert result.isfinite().all(), name
    assert_equals_oracle(case, chunk_size=16)


def test_small_decays_after_large_ones_keep_their_digits(device):
    """After 50 tokens that lose everything, L still needs exp(−0.01) to seven digits, out of sums near −2500."""
    case = make_case(length=64, dtype=torch.float32, device=device)
    case = with_time_steps(case, torch.tensor([-50.0] * 50 + [-0.01] * 14)[:, None])
    for name, actual, expected in zip(("y", "final state"), chunked(64)(case), ssd_oracle(case.double()), strict=True):
        assert_close(actual, expected, torch.float32, name)


def test_a_long_sequence_stays_bounded(device):
    """‖S_t‖ ≤ u_t with u_t = e^{dt A} u_{t−1} + dt ‖x_t‖ ‖B_t‖ (Principle 4): a rotation adds no energy."""
    case = make_case(batch=1, length=2000, dtype=torch.float32, device=device, without=("initial_state",))
    _, state = case.scan(ssd_chunk_scan)
    bound = torch.zeros_like(case.dt[:, 0])
    B_norm = case.B.norm(dim=-1).repeat_interleave(2, dim=-1)
    for t in range(2000):
        bound = (case.dt[:, t] * case.A).exp() * bound + case.dt[:, t] * case.x[:, t].norm(dim=-1) * B_norm[:, t]
    assert (state.flatten(2).norm(dim=-1) <= bound * 1.00001).all()


@pytest.mark.parametrize("documents", [(5,), (2, 3)], ids=str)
def test_gradients_against_finite_differences(documents, device):
    case = make_case(batch=1, groups=1, head_dim=2, state_size=2, documents=documents, device=device)
    names = ("x", "dt", "A", "B", "C", "D", "initial_state")

    def scan(*tensors):
        return chunked(2)(replace(case, **dict(zip(names, tensors, strict=True))))

    leaves = [getattr(case, name).clone().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(scan, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_changes_nothing(dtype, device):
    case = make_case(length=40, dtype=dtype, device=device)
    plain = results(chunked(16), case)

    def under_autocast(case):
        with torch.autocast(device.type, dtype=torch.bfloat16):
            return chunked(16)(case)

    for name, result in results(under_autocast, case).items():
        assert result.dtype == plain[name].dtype
        assert torch.equal(result, plain[name]), name


def test_b_and_c_in_autocast_precision_beside_fp32_x(device):
    """A projection under autocast gives bfloat16 B and C where a float32 skip may have promoted x."""
    case = make_case(length=40, dtype=torch.float32, device=device)
    mixed = replace(case, B=case.B.bfloat16(), C=case.C.bfloat16())
    expected = replace(mixed, B=mixed.B.float(), C=mixed.C.float())
    y, state = chunked(16)(mixed)
    wanted_y, wanted_state = chunked(16)(expected)
    assert_close(y, wanted_y, torch.float32)
    assert_close(state, wanted_state, torch.float32)


def test_strided_inputs(device):
    """Slices of one wide projection, as a fused layer hands them over, and a state that a beam search has expanded."""
    case = make_case(length=20, device=device)

    def strided(tensor: torch.Tensor) -> torch.Tensor:
        wide = torch.stack((tensor, tensor + 1), dim=-1).transpose(0, 1).contiguous().transpose(0, 1)
        return wide[..., 0]

    state = case.initial_state[:1]
    views = replace(case.map_time(strided), initial_state=state.expand_as(case.initial_state))
    dense = replace(case, initial_state=state.repeat(2, 1, 1, 1))
    for actual, expected in zip(chunked(8)(views), chunked(8)(dense), strict=True):
        assert_close(actual, expected, torch.float64)


def test_arguments_are_left_as_they_were(device):
    case = make_case(documents=(10, 9), device=device)
    before = replace(
        case, **{name: getattr(case, name).clone() for name in ("x", "dt", "A", "B", "C", "D", "initial_state")}
    )
    chunked(8)(case)
    for name in ("x", "dt", "A", "B", "C", "D", "initial_state"):
        assert torch.equal(getattr(case, name), getattr(before, name)), name


@pytest.mark.parametrize("scores_in_a_block", [1, 500], ids=["a chunk a block", "a few chunks a block"])
@pytest.mark.parametrize("documents", [(37,), (9, 13, 15)], ids=str)
def test_chunks_in_several_blocks(scores_in_a_block, documents, device, monkeypatch):
    """States, their gradients and documents pass from block to block as from chunk to chunk."""
    monkeypatch.setitem(BLOCK_SCORES, device.type, scores_in_a_block)
    assert_equals_oracle(make_case(documents=documents, device=device), chunk_size=4)


@pytest.mark.parametrize("fast", [True, False], ids=["products in hardware", "no products in hardware"])
@pytest.mark.parametrize("documents", [(37,), (9, 13, 15)], ids=str)
def test_half_operands_on_any_cpu(documents, fast, device, monkeypatch):
    """Operands stay in bfloat16 where it is multiplied in hardware, and are raised to float32 where it is not."""
    monkeypatch.setattr("transxssm.ops.ssd.blocks.has_fast_products", lambda *_: fast)
    assert_equals_oracle(make_case(documents=documents, dtype=torch.bfloat16, device=device), chunk_size=8)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    for module in ("blocks", "chunked"):
        monkeypatch.setattr(f"transxssm.ops.ssd.{module}.is_on_cpu", lambda _: False)


@DTYPES
@pytest.mark.parametrize("documents", [(37,), (9, 13, 15), (1,) * 20], ids=str)
def test_the_way_of_gpus(documents, dtype, device, as_on_a_gpu):
    assert_equals_oracle(make_case(documents=documents, dtype=dtype, device=device), chunk_size=4)


@pytest.fixture
def compiled_scan():
    """The scan under the compiler, and the operators that a backend is given to compile, forward and backward."""
    targets = []

    def keep(graph, example_inputs):
        targets.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return make_boxed_func(graph.forward)

    torch.compiler.reset()
    return torch.compile(ssd_chunk_scan, fullgraph=True, backend=aot_autograd(fw_compiler=keep)), targets


@pytest.mark.parametrize("documents", [(37,), (9, 13, 15)], ids=str)
def test_the_way_of_gpus_compiled(documents, device, as_on_a_gpu, compiled_scan):
    """There the compiler looks into the scan, and into its backward pass."""
    compiled, targets = compiled_scan
    case = make_case(documents=documents, device=device)
    assert_equal_laws(lambda case: case.scan(compiled, chunk_size=8), ssd_oracle, case)
    assert sum(target.startswith("aten.baddbmm") for target in targets) >= 4
    assert not any(target.startswith("transxssm") for target in targets)


def test_a_cpu_compiles_around_the_operators(compiled_scan):
    compiled, targets = compiled_scan
    results(lambda case: case.scan(compiled, chunk_size=8), make_case())
    assert [target for target in targets if target.startswith("transxssm")] == [
        "transxssm.ssd_chunked.default",
        "transxssm.ssd_chunked_backward.default",
    ]


def test_compiled_gradients_of_the_final_state_alone(device, as_on_a_gpu, compiled_scan):
    """Which torch 2.11 lost, as it traced an `autograd.Function` in Python."""
    compiled, _ = compiled_scan
    case = make_case(device=device)
    gradients = {}
    for name, scan in {"compiled": compiled, "plain": ssd_chunk_scan}.items():
        x = case.x.detach().requires_grad_()
        _, state = replace(case, x=x).scan(scan, chunk_size=8)
        (gradients[name],) = torch.autograd.grad(state.square().sum(), x)
    assert_close(gradients["compiled"], gradients["plain"], torch.float64)
