"""The share of the scan: nested events count once, and renamed operators are an error."""

from types import SimpleNamespace

import pytest
import torch

from tests.models.tiny import tiny_config
from transxssm_lab.benchmarking.contenders import build_step
from transxssm_lab.benchmarking.ssd_share import share_of, ssd_share
from transxssm_lab.benchmarking.steps import Entry
from transxssm_lab.benchmarking.workers import Setup

SETUP = Setup(torch.device("cpu"), 1)


def event(name, seconds, parent=None):
    return SimpleNamespace(name=name, cpu_time_total=1e6 * seconds, cpu_parent=parent)


def test_an_operator_inside_itself_counts_once():
    outer = event("transxssm::ssd_chunked", 2.0)
    between = event("aten::mm", 1.9, outer)
    inner = event("transxssm::ssd_chunked", 1.8, between)
    backward = event("transxssm::ssd_chunked_backward", 3.0)
    share = share_of([outer, between, inner, backward], 10.0, on_device=False)
    assert share == {"step_seconds": 10.0, "forward_seconds": 2.0, "backward_seconds": 3.0, "share": 0.5}


def test_renamed_operators_are_an_error():
    with pytest.raises(RuntimeError, match=r"got \['transxssm::scan'\]"):
        share_of([event("transxssm::scan", 1.0), event("aten::mm", 1.0)], 1.0, on_device=False)


def test_a_real_step():
    arguments = ("transxssm", tiny_config(), "train", 12, 1, torch.float32)
    share = ssd_share(print, SETUP, Entry("transxssm", build_step, arguments, num_tokens=12, flops=1.0))
    assert share["forward_seconds"] > 0
    assert share["backward_seconds"] > 0
    assert 0 < share["share"] < 1
    assert share["share"] == pytest.approx(
        (share["forward_seconds"] + share["backward_seconds"]) / share["step_seconds"]
    )
