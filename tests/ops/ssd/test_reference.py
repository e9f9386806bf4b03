"""The two references against the paper's sums, which `tests.ops.ssd.oracle` evaluates on its own."""

import pytest
import torch

from tests.ops.ssd.cases import assert_equal_laws, make_case, results
from tests.ops.ssd.oracle import ssd_oracle
from tests.tolerances import assert_close
from transxssm.ops.ssd import ssd_dual_form, ssd_recurrence

REFERENCES = pytest.mark.parametrize("reference", [ssd_recurrence, ssd_dual_form])
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)


@REFERENCES
@DTYPES
@pytest.mark.parametrize(
    "sizes",
    [
        {"length": 1, "batch": 1, "groups": 1},
        {"length": 37, "batch": 3, "groups": 1, "heads_per_group": 3},
        {"length": 23, "groups": 3, "heads_per_group": 1, "head_dim": 1, "state_size": 2},
        {"documents": (5, 1, 12, 7)},
        {"documents": (1, 1, 9), "without": ("initial_state",)},
        {"without": ("D", "initial_state", "rotary"), "state_size": 5},
    ],
    ids=str,
)
def test_references_equal_the_paper(reference, dtype, sizes, device):
    case = make_case(dtype=dtype, device=device, **sizes)
    assert_equal_laws(lambda case: case.scan(reference), ssd_oracle, case, expected_case=case.double())


@REFERENCES
def test_a_value_by_hand(reference):
    """Two tokens, one coordinate each way: S_1 = ½·4·1, then S_2 = ½·S_1 + 1·3·2, read with C = 1 and 5, and D = 10."""

    def number(*values: float) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64).view(1, -1, 1, 1)

    dt = torch.tensor([[[0.5], [1.0]]], dtype=torch.float64)
    A = torch.tensor([0.5], dtype=torch.float64).log()
    D = torch.tensor([10.0], dtype=torch.float64)
    y, state = reference(number(4, 3), dt, A, number(1, 2), number(1, 5), D=D)
    assert_close(state, torch.full((1, 1, 1, 1), 7.0), torch.float64)
    assert_close(y.flatten(), torch.tensor([2 + 40.0, 7 * 5 + 30.0]), torch.float64)


def test_the_oracle_sees_positions_documents_and_the_initial_state():
    """The oracle itself is sensitive to what the laws are about: without one of them its numbers are others."""
    full = results(ssd_oracle, make_case(documents=(8, 11)))["y"]
    for without in ("rotary", "seq_idx", "initial_state", "D"):
        other = results(ssd_oracle, make_case(documents=(8, 11), without=(without,)))["y"]
        assert (full - other).norm() > 1e-3 * full.norm()
