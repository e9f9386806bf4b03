"""The laws that make one sequence mixer out of many ways to run it: each holds for y, the final state and all gradients."""

import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.ops.ssd.cases import assert_equal_laws, make_case, results, rotary_tables
from tests.ops.ssd.ways import between_pads, by_steps, chunks_of, in_pieces, separately
from tests.tolerances import assert_close
from transxssm.ops.ssd import SSDBackend, interface, ssd_chunk_scan, ssd_dual_form, ssd_recurrence, ssd_step
from transxssm.ops.ssd.interface import SSD_CHUNK_SCAN

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)


SCANS = {
    "recurrence": lambda case: case.scan(ssd_recurrence),
    "dual form": lambda case: case.scan(ssd_dual_form),
    "chunks of 1": chunks_of(1),
    "chunks of 8": chunks_of(8),
    "default chunks": chunks_of(None),
    "portable": lambda case: case.scan(ssd_chunk_scan, backend="portable", chunk_size=8),
}
EVERY_SCAN = pytest.mark.parametrize("scan", SCANS.values(), ids=SCANS.keys())


# Groups


@EVERY_SCAN
@DTYPES
@pytest.mark.parametrize(("groups", "heads_per_group"), [(1, 4), (3, 2)])
def test_a_group_is_its_map_for_every_head(scan, dtype, groups, heads_per_group, device):
    def expanded(case):
        B, C = (maps.repeat_interleave(heads_per_group, dim=2) for maps in (case.B, case.C))
        return scan(replace(case, B=B, C=C))

    case = make_case(groups=groups, heads_per_group=heads_per_group, dtype=dtype, device=device)
    assert_equal_laws(scan, expanded, case)


# Splits


@EVERY_SCAN
@DTYPES
def test_two_prefills_are_one_at_every_split(scan, dtype, device):
    case = make_case(length=18, dtype=dtype, device=device)
    for split in range(1, 18):
        assert_equal_laws(lambda case, at=split: in_pieces(case, (at, 18 - at), scan), scan, case)


@DTYPES
@pytest.mark.parametrize("without", [(), ("rotary",), ("D",)], ids=str)
def test_prefill_and_steps_are_one_scan_at_every_split(without, dtype, device):
    case = make_case(length=18, batch=3, dtype=dtype, device=device, without=without)
    for prompt in range(1, 18):
        assert_equal_laws(lambda case, at=prompt: by_steps(case, at, chunks_of(8)), chunks_of(8), case)


def test_many_steps_keep_to_the_scan(device):
    case = make_case(length=251, batch=1, dtype=torch.float32, device=device)
    assert_equal_laws(lambda case: by_steps(case, 1, chunks_of(8)), chunks_of(64), case)


def test_a_step_is_pure_and_keeps_the_state_in_float32(device):
    case = make_case(length=1, dtype=torch.bfloat16, device=device)
    state = case.initial_state.clone()
    rotary = tuple(table[:, 0] for table in case.rotary)
    y, new_state = ssd_step(state, case.x[:, 0], case.dt[:, 0], case.A, case.B[:, 0], case.C[:, 0], rotary=rotary)
    assert torch.equal(state, case.initial_state)
    assert new_state.data_ptr() != state.data_ptr()
    assert (y.dtype, new_state.dtype) == (torch.bfloat16, torch.float32)


def test_a_step_takes_a_strided_state(device):
    """A cache may hand over one layer of a larger tensor, or a beam's expansion of one row."""
    case = make_case(length=1, device=device)
    arguments = (case.x[:, 0], case.dt[:, 0], case.A, case.B[:, 0], case.C[:, 0])
    strided = case.initial_state.transpose(0, 1).contiguous().transpose(0, 1)
    transposed = case.initial_state.transpose(2, 3).contiguous().transpose(2, 3)
    expanded = case.initial_state[:1].expand_as(case.initial_state)
    for state in (strided, transposed, expanded):
        for actual, expected in zip(ssd_step(state, *arguments), ssd_step(state.contiguous(), *arguments), strict=True):
            assert_close(actual, expected, torch.float64)


# Packed documents


@EVERY_SCAN
@DTYPES
@pytest.mark.parametrize("documents", [(8, 8), (9, 10), (7, 1, 1, 12), (1, 17, 3)], ids=str)
def test_packed_documents_are_separate_ones(scan, documents, dtype, device):
    """The initial state is the first document's alone, the final state the last one's, and no gradient crosses."""
    case = make_case(documents=documents, dtype=dtype, device=device)
    assert_equal_laws(scan, separately(documents, scan), case)


@given(documents=st.lists(st.integers(1, 12), min_size=1, max_size=6), chunk_size=st.integers(1, 20))
def test_any_documents_in_any_chunks(documents, chunk_size, device):
    scan = chunks_of(chunk_size)
    assert_equal_laws(scan, separately(documents, scan), make_case(documents=documents, device=device))


def test_rows_may_pack_differently(device):
    case = make_case(batch=2, length=12, device=device)
    boundaries = ((5, 7), (10, 2))
    seq_idx = torch.tensor([[0] * first + [1] * second for first, second in boundaries], device=device)
    y, state = chunks_of(4)(replace(case, seq_idx=seq_idx))
    for row, documents in enumerate(boundaries):
        alone = case.map_time(lambda tensor, row=row: tensor[row : row + 1])
        alone = replace(alone, initial_state=case.initial_state[row : row + 1])
        wanted_y, wanted_state = in_pieces(alone, documents, chunks_of(4), carry_state=False)
        assert_close(y[row : row + 1], wanted_y, torch.float64, "y")
        assert_close(state[row : row + 1], wanted_state, torch.float64, "final state")


@EVERY_SCAN
def test_packing_and_splitting_commute(scan, device):
    """A packed prompt fed in two calls, cut inside a document: the state of the document that is cut goes over."""
    case = make_case(documents=(6, 9, 4), device=device)
    for split in (7, 10, 14, 16, 18):
        assert_equal_laws(lambda case, at=split: in_pieces(case, (at, 19 - at), scan), scan, case)


# Pads


@EVERY_SCAN
@DTYPES
@pytest.mark.parametrize(("left", "right"), [(1, 0), (8, 0), (13, 0), (0, 1), (0, 8), (5, 6)])
def test_pads_leave_no_trace(scan, left, right, dtype, device):
    case = make_case(length=17, dtype=dtype, device=device)
    assert_equal_laws(lambda case: between_pads(case, left, right, scan), scan, case)


def test_a_padded_step_leaves_the_state_alone(device):
    case = make_case(length=1, device=device)
    zero = torch.zeros_like(case.dt[:, 0])
    _, state = ssd_step(case.initial_state, case.x[:, 0], zero, case.A, case.B[:, 0], case.C[:, 0])
    assert torch.equal(state, case.initial_state)


# Positions


@EVERY_SCAN
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shift", [1, 100_000])
def test_a_shift_of_all_positions_changes_nothing(scan, shift, dtype, device):
    """Only distances count (Eq. 1). A state carries its own positions along: shifted in, it comes out shifted as much."""
    length, width = 19, 4
    positions = torch.arange(length)[None]
    cos, sin = rotary_tables(torch.tensor([[shift]]), width, dtype, device)  # (1, 1, n/2)

    def rotated(state: Tensor, sine: Tensor) -> Tensor:
        first, second = state.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sine, second * cos + first * sine), dim=-1)

    def shifted(case):
        rotary = rotary_tables(positions + shift, width, dtype, device)
        y, state = scan(replace(case, rotary=rotary, initial_state=rotated(case.initial_state, sin)))
        return y, rotated(state, -sin)

    case = make_case(length=length, state_size=width, dtype=dtype, device=device)
    case = replace(case, rotary=rotary_tables(positions, width, dtype, device))
    assert_equal_laws(shifted, scan, case)


def test_positions_matter(device):
    """The other side of the shift law: a document read at twice the distances gives another result."""
    case = make_case(length=19, device=device)
    y, _ = chunks_of(8)(replace(case, rotary=rotary_tables(torch.arange(19)[None], 4, torch.float64, device)))
    stretched, _ = chunks_of(8)(
        replace(case, rotary=rotary_tables(2 * torch.arange(19)[None], 4, torch.float64, device))
    )
    assert (y - stretched).norm() > 1e-2 * y.norm()


def test_one_table_serves_all_rows(device):
    case = make_case(batch=3, device=device)
    shared = tuple(table[:1] for table in case.rotary)
    per_row = tuple(table.expand(3, -1, -1) for table in shared)
    assert_equal_laws(
        lambda case: chunks_of(8)(replace(case, rotary=shared)),
        lambda case: chunks_of(8)(replace(case, rotary=per_row)),
        case,
    )


# Results


@EVERY_SCAN
@DTYPES
def test_y_has_the_dtype_of_x_and_the_state_stays_precise(scan, dtype, device):
    case = make_case(dtype=dtype, device=device)
    y, state = scan(case)
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    assert (y.dtype, y.shape) == (dtype, case.x.shape)
    assert (state.dtype, state.shape) == (precise, case.initial_state.shape)


@pytest.mark.parametrize("backend", [None, *SSDBackend])
def test_the_backend_that_is_asked_for_computes(backend, device, monkeypatch):
    """All backends give one result, so only a marked one shows which of them ran."""
    case = make_case(device=device, dtype=torch.float32)
    taken = []
    monkeypatch.setattr(interface, "ssd_triton", lambda *_, **__: taken.append("triton") or (None, None))
    monkeypatch.setattr(interface, "ssd_portable", lambda *_, **__: taken.append("portable") or (None, None))
    monkeypatch.setattr(interface, "ssd_recurrence", lambda *_, **__: taken.append("recurrence") or (None, None))
    monkeypatch.setattr(interface, "ssd_chunked", lambda *_, backend, **__: taken.append(backend) or (None, None))
    choice = SSD_CHUNK_SCAN.explain(case.x, case.dt, case.A, case.B, case.C)
    if backend is not None and choice.refusals[backend] is not None:
        with pytest.raises(ValueError, match=re.escape(choice.refusals[backend])):
            case.scan(ssd_chunk_scan, backend=backend)
        return
    case.scan(ssd_chunk_scan, backend=backend)
    assert taken == [choice.backend if backend is None else backend]


@pytest.mark.parametrize("backend", ["cpp_gemm", "cpp", "chunked"])
@pytest.mark.parametrize("batch", [1, 3])
def test_every_chunked_backend_leaves_the_same_states_for_the_backward_pass(backend, batch, device):
    """What one of them saves, any of them can read: with several rows, chunks and rows must not change places."""
    case = make_case(batch=batch, length=37, groups=1, head_dim=32, state_size=32, dtype=torch.bfloat16, device=device)
    choice = SSD_CHUNK_SCAN.explain(case.x, case.dt, case.A, case.B, case.C)
    if choice.refusals[backend] is not None:
        pytest.skip(choice.refusals[backend])
    cos, sin = case.rotary or (None, None)
    inputs = (case.x, case.dt, case.A, case.B, case.C, case.D, case.initial_state, cos, sin, case.seq_idx)
    *_, states = torch.ops.transxssm.ssd_chunked(*inputs, 8, True, backend, 0)
    *_, expected = torch.ops.transxssm.ssd_chunked(*inputs, 8, True, "chunked", 0)
    assert states.shape[:2] == (5, batch)
    assert_close(states, expected.double(), torch.bfloat16, "states")


# Errors: each names what it got and what it expected.


def saying(*words: str) -> str:
    """A pattern for a message that holds all these words, in any order."""
    return "".join(f"(?=.*{re.escape(word)})" for word in words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"x": torch.zeros(2, 5, 4)}, ["x", "(b, t, h, p)", "(2, 5, 4)"]),
        ({"x": torch.zeros(2, 0, 4, 3)}, ["at least one token", "(2, 0, 4, 3)"]),
        ({"dt": torch.zeros(2, 5, 3)}, ["dt", "(2, 5, 4)", "(2, 5, 3)"]),
        ({"A": torch.zeros(2)}, ["A", "(4,)", "(2,)"]),
        ({"B": torch.zeros(2, 6, 2, 4)}, ["B", "(2, 5, ", "(2, 6, 2, 4)"]),
        ({"C": torch.zeros(2, 5, 1, 4)}, ["C", "(2, 5, 2, 4)", "(2, 5, 1, 4)"]),
        ({"B": torch.zeros(2, 5, 3, 4), "C": torch.zeros(2, 5, 3, 4)}, ["multiple", "4 heads", "3 groups"]),
        ({"D": torch.zeros(3)}, ["D", "(4,)", "(3,)"]),
        ({"initial_state": torch.zeros(2, 4, 4, 3)}, ["state", "(2, 4, 3, 4)", "(2, 4, 4, 3)"]),
        ({"seq_idx": torch.zeros(2, 4, dtype=torch.int64)}, ["seq_idx", "(2, 5)", "(2, 4)"]),
        ({"rotary": (torch.zeros(2, 5, 4), torch.zeros(2, 5, 4))}, ["rotary", "(2 or 1, 5, 2)", "(2, 5, 4)"]),
        ({"rotary": (torch.zeros(3, 5, 2), torch.zeros(3, 5, 2))}, ["rotary", "(2 or 1, 5, 2)", "(3, 5, 2)"]),
        ({"rotary": (torch.zeros(1, 5, 2), torch.zeros(1, 4, 2))}, ["sin", "(2 or 1, 5, 2)", "(1, 4, 2)"]),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_a_wrong_shape_is_named(changes, words):
    case = replace(make_case(length=5, dtype=torch.float32), **changes)
    with pytest.raises(ValueError, match=saying(*words)):
        case.scan(ssd_chunk_scan)


@pytest.mark.parametrize("chunk_size", [0, -1])
def test_a_chunk_holds_a_token(chunk_size):
    with pytest.raises(ValueError, match=rf"chunk_size must be at least 1 token: got {chunk_size}"):
        make_case().scan(ssd_chunk_scan, chunk_size=chunk_size)


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match=r"'magic'.*triton, cpp_gemm, cpp, chunked, portable, recurrence"):
        make_case().scan(ssd_chunk_scan, backend="magic")


@pytest.mark.parametrize(
    ("position", "shape", "words"),
    [
        (0, (2, 4, 4, 3), ["state", "(2, 4, 3, 4)", "(2, 4, 4, 3)"]),
        (1, (2, 1, 4, 3), ["x", "(b, h, p)", "(2, 1, 4, 3)"]),
        (2, (2, 3), ["dt", "(2, 4)", "(2, 3)"]),
        (4, (2, 1, 2, 4), ["B", "(2, 1, 2, 4)"]),
        (5, (2, 2, 6), ["C", "(2, 2, 4)", "(2, 2, 6)"]),
    ],
)
def test_a_step_names_a_wrong_shape(position, shape, words):
    case = make_case(length=1, dtype=torch.float32)
    arguments = [case.initial_state, case.x[:, 0], case.dt[:, 0], case.A, case.B[:, 0], case.C[:, 0]]
    arguments[position] = torch.zeros(shape)
    with pytest.raises(ValueError, match=saying(*words)):
        ssd_step(*arguments)


def test_results_covers_every_gradient():
    """The comparison the laws rest on looks at all nine results."""
    names = set(results(chunks_of(8), make_case()))
    inputs = {"x", "dt", "A", "B", "C", "D", "initial_state"}
    assert names == {"y", "final state"} | {f"gradient of {name}" for name in inputs}
