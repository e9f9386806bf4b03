"""The laws that make one sequence mixer out of many ways to run it: each holds for y, the final state and all gradients."""

import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.ops.ssd.cases import assert_equal_laws, make_case, results, rotary_tables
from tests.ops.ssd.oracle import ssd_oracle
from tests.ops.ssd.ways import (
    between_pads,
    by_steps,
    chunks_of,
    in_pieces,
    one_call_each,
    separately,
    sequences_in_a_row,
)
from tests.tolerances import assert_close
from transxssm.ops.ssd import (
    SSDBackend,
    blocks,
    interface,
    ssd_chunk_scan,
    ssd_chunk_scan_,
    ssd_dual_form,
    ssd_recurrence,
    ssd_step,
)
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
    inputs = (case.x, case.dt, case.A, case.B, case.C, case.D, case.initial_state, cos, sin, case.seq_idx, None)
    *_, states = torch.ops.transxssm.ssd_chunked(*inputs, 8, True, backend, 0)
    *_, expected = torch.ops.transxssm.ssd_chunked(*inputs, 8, True, "chunked", 0)
    assert states.shape[:2] == (5, batch)
    assert_close(states, expected.double(), torch.bfloat16, "states")


# Several sequences in one row are one call each.

ROWS = pytest.mark.parametrize("lengths", [(1, 1, 1), (8, 16), (7, 1, 19, 5), (33,)], ids=str)


@DTYPES
@ROWS
@pytest.mark.parametrize("backend", ["cpp_gemm", "cpp", "chunked", "recurrence"])
@pytest.mark.parametrize("chunk_size", [8, None])
def test_sequences_in_a_row_are_one_call_each(backend, chunk_size, lengths, dtype, device):
    case, cu_seqlens = sequences_in_a_row(lengths, head_dim=32, state_size=32, dtype=dtype, device=device)
    choice = SSD_CHUNK_SCAN.explain(case.x, case.dt, case.A, case.B, case.C, cu_seqlens=cu_seqlens)
    if choice.refusals[backend] is not None:
        pytest.skip(choice.refusals[backend])

    def in_a_row(case):
        return case.scan(ssd_chunk_scan, cu_seqlens=cu_seqlens, chunk_size=chunk_size, backend=backend)

    assert_equal_laws(in_a_row, one_call_each(lengths, ssd_oracle), case, expected_case=case.double())


@pytest.mark.parametrize("scores_in_a_block", [1, 500], ids=["a chunk a block", "a few chunks a block"])
@pytest.mark.parametrize("backend", ["cpp", "chunked"])
def test_sequences_reach_over_blocks_of_chunks(backend, scores_in_a_block, device, monkeypatch):
    case, cu_seqlens = sequences_in_a_row((32, 8, 40), dtype=torch.float32, device=device)
    monkeypatch.setitem(blocks.BLOCK_SCORES, device.type, scores_in_a_block)

    def in_a_row(case):
        return case.scan(ssd_chunk_scan, cu_seqlens=cu_seqlens, chunk_size=8, backend=backend)

    if device.type == "cpu" or backend != "cpp":
        assert_equal_laws(in_a_row, one_call_each((32, 8, 40), ssd_oracle), case, expected_case=case.double())


@pytest.mark.parametrize("without", ["rotary", "D", "initial_state"])
def test_sequences_go_without_options(without, device):
    lengths = (5, 12, 1)
    case, cu_seqlens = sequences_in_a_row(lengths, device=device)
    case = replace(case, **{without: None})
    y, states = case.scan(ssd_chunk_scan, cu_seqlens=cu_seqlens, chunk_size=4)
    if without == "initial_state":
        case = replace(case, initial_state=torch.zeros_like(states))
    expected_y, expected_states = one_call_each(lengths, ssd_oracle)(case)
    assert_close(y, expected_y, torch.float64, "y")
    assert_close(states, expected_states, torch.float64, "states")


def test_what_is_no_number_stays_in_its_sequence(device):
    case, cu_seqlens = sequences_in_a_row((5, 6, 7), dtype=torch.float32, device=device)
    expected_y, expected_states = case.scan(ssd_chunk_scan, cu_seqlens=cu_seqlens, chunk_size=4)
    for tensor in (case.x, case.dt, case.B, case.C):
        tensor[0, 5:11] = torch.nan
    y, states = case.scan(ssd_chunk_scan, cu_seqlens=cu_seqlens, chunk_size=4)
    assert y[0, 5:11].isnan().all()
    assert torch.equal(y[:, :5], expected_y[:, :5])
    assert torch.equal(y[:, 11:], expected_y[:, 11:])
    assert torch.equal(states[::2], expected_states[::2])


@pytest.mark.parametrize("backend", [None, "recurrence"])
def test_states_are_read_from_slots_and_written_to_them(backend, device):
    """Slots lie apart; one begins from zero whatever its slot holds; what is not named stays as it is, bit by bit."""
    lengths, named = (7, 1, 9), torch.tensor([4, 0, 3], device=device)
    case, cu_seqlens = sequences_in_a_row(lengths, dtype=torch.float32, device=device)
    memory = torch.full((6, case.initial_state[0].numel() + 5), torch.nan, device=device)
    cache = memory[:, :-5].unflatten(1, case.initial_state.shape[1:])
    cache[named[:2]] = case.initial_state[:2]
    case.initial_state[2] = 0.0  # whose slot holds NaN
    expected_y, expected_states = case.scan(ssd_chunk_scan, cu_seqlens=cu_seqlens)
    before = memory.clone()
    arguments = {"rotary": case.rotary, "D": case.D, "cu_seqlens": cu_seqlens, "backend": backend}
    has_state = torch.tensor([True, True, False], device=device)
    y = ssd_chunk_scan_(
        *(cache, case.x, case.dt, case.A, case.B, case.C),
        state_indices=named,
        has_initial_state=has_state,
        **arguments,
    )
    assert_close(y, expected_y, torch.float32, "y")
    assert_close(cache[named], expected_states, torch.float32, "states")
    before[:, :-5].unflatten(1, case.initial_state.shape[1:])[named] = cache[named]
    assert torch.equal(memory.nan_to_num(99.0), before.nan_to_num(99.0))


def test_rows_may_have_slots_too(device):
    case = make_case(batch=3, length=9, device=device)
    cache, named = torch.randn(5, *case.initial_state.shape[1:], dtype=torch.float64, device=device), [4, 1, 2]
    cache[named] = case.initial_state
    expected_y, expected_states = case.scan(ssd_chunk_scan)
    indices = torch.tensor(named, dtype=torch.int32, device=device)
    arguments = (cache, case.x, case.dt, case.A, case.B, case.C)
    y = ssd_chunk_scan_(*arguments, rotary=case.rotary, D=case.D, state_indices=indices)
    assert torch.equal(y, expected_y)
    assert torch.equal(cache[named], expected_states)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cu_seqlens": [0, 4, 4, 9]}, r"increase from 0 to the number of tokens, 9.*got \[0, 4, 4, 9\]"),
        ({"cu_seqlens": [0, 4]}, r"increase from 0 to the number of tokens, 9.*got \[0, 4\]"),
        ({"cu_seqlens": [1, 9]}, r"increase from 0 to the number of tokens, 9.*got \[1, 9\]"),
        ({"cu_seqlens": [9]}, r"\(s \+ 1,\) integers on the CPU.*got \(1,\)"),
        ({"cu_seqlens": [0.0, 9.0]}, r"\(s \+ 1,\) integers on the CPU.*torch.float32"),
        ({"cu_seqlens": [0, 4, 9], "backend": "portable"}, "'portable': one graph for any length knows no bounds"),
        ({"cu_seqlens": [0, 4, 9], "state_indices": [1, 1]}, "none twice: got slot 1"),
        ({"cu_seqlens": [0, 4, 9], "state_indices": [0, 5]}, "slots 0 … 3: got 5"),
        ({"cu_seqlens": [0, 4, 9], "has_initial_state": [True]}, r"has_initial_state must be \(2,\) bool"),
        ({"cu_seqlens": [0, 4, 9], "has_initial_state": [1, 0]}, r"has_initial_state must be \(2,\) bool"),
        ({"cu_seqlens": [0, 4, 9], "backend": "nothing"}, "unknown backend 'nothing'"),
    ],
)
def test_sequences_that_do_not_fit_are_refused(options, message):
    case = make_case(batch=1, length=9, dtype=torch.float32)
    cache = torch.randn(4, *case.initial_state.shape[1:])
    before = cache.clone()
    given = {name: torch.tensor(value) if isinstance(value, list) else value for name, value in options.items()}
    given = {"state_indices": torch.arange(len(given["cu_seqlens"]) - 1)} | given
    with pytest.raises(ValueError, match=message):
        ssd_chunk_scan_(cache, case.x, case.dt, case.A, case.B, case.C, **given)
    assert torch.equal(cache, before)


def test_sequences_need_a_row_of_their_own():
    case = make_case(batch=2, length=9, documents=(4, 5))
    with pytest.raises(ValueError, match="side by side in one row: got 2 rows"):
        case.scan(ssd_chunk_scan, cu_seqlens=torch.tensor([0, 4, 9]))
    row = replace(make_case(batch=1, documents=(4, 5)), initial_state=None)
    with pytest.raises(ValueError, match="either documents"):
        row.scan(ssd_chunk_scan, cu_seqlens=torch.tensor([0, 4, 9]))


def test_a_scan_in_place_has_no_gradients():
    case = make_case(batch=1, length=3, dtype=torch.float32)
    with pytest.raises(ValueError, match="written in place has no gradients"):
        ssd_chunk_scan_(
            *(case.initial_state, case.x.requires_grad_(), case.dt, case.A, case.B, case.C),
            state_indices=torch.tensor([0]),
        )


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
