"""`explain` says what a call takes, by the arguments of the call itself, and its documentation lists what there is."""

import re
from pathlib import Path

import pytest
import torch

from transxssm.ops import explain, linear, ssd_chunk_scan, ssd_step_
from transxssm.ops.explain import OPS

PAGE = Path(__file__).parents[2] / "docs" / "which-implementation-runs.md"


def test_it_takes_an_op_or_its_name_with_the_ops_own_arguments():
    x, weight = torch.randn(64, 8), torch.randn(5, 8)
    assert explain(linear, x, weight) == explain("linear", x, weight)
    assert explain(linear, x, weight).backend == "torch"
    scan = (torch.randn(1, 5, 2, 4), torch.rand(1, 5, 2), -torch.rand(2), *torch.randn(2, 1, 5, 1, 6))
    tables = tuple(torch.randn(2, 1, 5, 3))
    choice = explain(ssd_chunk_scan, *(each.double() for each in scan), rotary=tables, chunk_size=4)
    assert choice.backend == "chunked"
    assert choice.refusals["cpp"] == "the C++ kernels take float32 and bfloat16"
    state = torch.zeros(1, 2, 4, 6).double()
    assert (
        explain(ssd_step_, state, *(each[:, 0].double() if each.dim() > 1 else each.double() for each in scan)).backend
        == "torch"
    )


def test_gradients_count():
    x, weight = torch.randn(2, 64), torch.randn(64, requires_grad=True)
    assert explain("rms_norm", x, weight, 1e-6).backend != "torch"
    with torch.no_grad():
        choice = explain("rms_norm", x, weight, 1e-6)
    assert choice.backend == "torch"
    assert "without gradients" in choice.refusals["blocks"]


def test_an_unknown_op_is_refused():
    with pytest.raises(ValueError, match="unknown op 'scan': expected one of ssd_chunk_scan, ssd_step"):
        explain("scan")


@pytest.mark.parametrize("name", OPS)
def test_the_page_lists_the_implementations_in_their_order(name):
    section = re.search(rf"^### `{name}`\n(.*?)(?=^##|\Z)", PAGE.read_text(encoding="utf-8"), re.S | re.M)
    assert section is not None
    listed = re.findall(r"^\d+\. `(\w+)`: ", section.group(1), re.M)
    assert listed == [str(backend.name) for backend in OPS[name].backends]


def test_the_page_lists_no_other_op():
    assert re.findall(r"^### `(\w+)`$", PAGE.read_text(encoding="utf-8"), re.M) == list(OPS)


@pytest.mark.parametrize("name", OPS)
def test_the_last_backend_takes_every_call(name):
    last = OPS[name].backends[-1]
    assert last.refusal(None) is None
    assert last.shortfall(None) is None
