"""The laws of the scan at the layer shapes of the paper's models, on the device of `--device`.

The other tests of the scan run at sizes of a few tokens, heads and states, where an error of indexing shows and an error of scale
does not. Here are the presets' heads, at up to 64K tokens on a GPU. A CPU runs the same tests with few heads and tokens, so that
they are known to work before a GPU is at hand.

The oracle is the same scan in float64 at another chunk size, which test_chunked.py holds to the paper's sums at small sizes. Every
law puts one way to run the scan, in float32 or bfloat16, against the plain way in float64, so that an error counts once.
"""

import pytest
import torch

from tests.ops.ssd.cases import Case, Law, assert_equal_laws, make_case, results
from tests.ops.ssd.ways import between_pads, by_steps, chunks_of, in_pieces, separately
from tests.real_sizes import COMPILER, DTYPES, PRESETS, documents_of
from tests.tolerances import assert_close
from transxssm import TransXSSMConfig
from transxssm.ops.ssd import ssd_chunk_scan, ssd_recurrence

CPU_GROUPS = {"320m": 2, "1.3b": 4}
LENGTHS = {"cuda": (1024, 4096, 16384, 65536), "cpu": (33, 130, 520, 1030)}
LAW_LENGTHS = {"cuda": (4096, 16384), "cpu": (260,)}
ORACLE_CHUNK_SIZE = {"cuda": 127, "cpu": 31}  # prime: its boundaries are none of the default chunks'
NUM_STEPS = 5
NUM_PADS = 37

pytestmark = [PRESETS, DTYPES]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`length` and `law_length` are those of the device."""
    device_type = torch.device(metafunc.config.getoption("--device")).type
    for name, lengths in {"length": LENGTHS, "law_length": LAW_LENGTHS}.items():
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, lengths[device_type])


def layer_case(preset: str, dtype: torch.dtype, device: torch.device, **lengths) -> Case:
    """Random inputs of one row for a layer of the preset, with every option; on a CPU for a few of its heads."""
    config = TransXSSMConfig.from_preset(preset)
    return make_case(
        batch=1,
        groups=CPU_GROUPS[preset] if device.type == "cpu" else config.ssd_num_groups,
        heads_per_group=config.ssd_num_heads // config.ssd_num_groups,
        head_dim=config.ssd_head_dim,
        state_size=config.ssd_state_size,
        dtype=dtype,
        device=device,
        **lengths,
    )


DEFAULT_CHUNKS = chunks_of(None)


def oracle(device: torch.device) -> Law:
    return chunks_of(ORACLE_CHUNK_SIZE[device.type])


def test_equals_the_oracle(preset, dtype, length, device):
    case = layer_case(preset, dtype, device, documents=documents_of(length))
    assert_equal_laws(DEFAULT_CHUNKS, oracle(device), case, expected_case=case.double())


def test_equals_the_recurrence(preset, dtype, device):
    """Token by token in float64, forward only: its backward pass would keep a state for every token."""
    case = layer_case(preset, dtype, device, documents=documents_of(LENGTHS[device.type][0]))
    with torch.no_grad():
        wanted = case.double().scan(ssd_recurrence)
        for name, actual, expected in zip(("y", "final state"), DEFAULT_CHUNKS(case), wanted, strict=True):
            assert_close(actual, expected, dtype, name)


def test_packed_documents_are_separate_ones(preset, dtype, law_length, device):
    documents = documents_of(law_length)
    case = layer_case(preset, dtype, device, documents=documents)
    assert_equal_laws(DEFAULT_CHUNKS, separately(documents, oracle(device)), case, expected_case=case.double())


def test_two_prefills_are_one(preset, dtype, law_length, device):
    """Split at an odd place inside the last document."""
    split = law_length // 2 | 1
    case = layer_case(preset, dtype, device, documents=documents_of(law_length))
    pieces = (split, law_length - split)
    assert_equal_laws(
        lambda case: in_pieces(case, pieces, DEFAULT_CHUNKS), oracle(device), case, expected_case=case.double()
    )


def test_prefill_and_steps_are_one_scan(preset, dtype, law_length, device):
    case = layer_case(preset, dtype, device, documents=documents_of(law_length))
    assert_equal_laws(
        lambda case: by_steps(case, law_length - NUM_STEPS, DEFAULT_CHUNKS),
        oracle(device),
        case,
        expected_case=case.double(),
    )


def test_pads_on_the_left_leave_no_trace(preset, dtype, law_length, device):
    case = layer_case(preset, dtype, device, length=law_length)
    assert_equal_laws(
        lambda case: between_pads(case, NUM_PADS, 0, DEFAULT_CHUNKS),
        oracle(device),
        case,
        expected_case=case.double(),
    )


def test_compiles_as_one_graph(preset, dtype, device):
    """A GPU's compiler fuses the scan, which rounds elsewhere; a CPU's calls the operator of eager mode."""
    case = layer_case(preset, dtype, device, documents=documents_of(LAW_LENGTHS[device.type][0]))
    torch.compiler.reset()
    compiled = torch.compile(ssd_chunk_scan, fullgraph=True, backend=COMPILER[device.type])
    assert_equal_laws(lambda case: case.scan(compiled), DEFAULT_CHUNKS, case)


def test_two_runs_are_equal_to_the_bit(preset, dtype, law_length, device):
    """A run that is resumed can only end as one that wasn't if no sum depends on which thread came first."""
    case = layer_case(preset, dtype, device, documents=documents_of(law_length))
    first = results(DEFAULT_CHUNKS, case)
    for name, result in results(DEFAULT_CHUNKS, case).items():
        assert torch.equal(result, first[name]), name
