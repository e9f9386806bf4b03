"""Every operator of the benchmark runs forward and backward, and rivals compute the same."""

import pytest
import torch

from tests.tolerances import assert_close
from transxssm_lab.benchmarking.ops import (
    DIRECTIONS,
    REFERENCES,
    RIVALS,
    OpsSettings,
    build_step,
    num_parts,
    plan,
    variants,
)
from transxssm_lab.benchmarking.steps import seconds_of

CPU = torch.device("cpu")
LENGTH = 65
SETTINGS = OpsSettings(preset="tiny", lengths=(LENGTH, 8192), batch=2)
CONFIG = SETTINGS.model_config()


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("operator", REFERENCES)
def test_every_variant_runs_and_leaves_no_gradient(operator, direction):
    for variant in variants(operator, LENGTH, CPU):
        step = build_step(variant, direction, CONFIG, LENGTH, 2, torch.float32, device=CPU)
        assert seconds_of(step, CPU) > 0
        assert seconds_of(step, CPU) > 0


def outputs(variant: str) -> torch.Tensor:
    return build_step(variant, "forward", CONFIG, LENGTH, 2, torch.float32, device=CPU).run()


@pytest.mark.parametrize(("reference", "rival"), [*RIVALS.items(), ("scan", "scan-32"), ("scan", "dual-form")])
def test_rivals_compute_the_same(reference, rival):
    """The operands are the same random numbers: a comparison of speed is one of the same work."""
    assert_close(outputs(rival), outputs(reference), torch.float32, rival)


def test_the_plan_measures_each_operator_at_each_length_against_its_reference():
    groups = plan(SETTINGS, CONFIG, CPU)
    assert [(group.mode, group.length) for group in groups] == [
        (f"{operator}, {direction}", length)
        for length in SETTINGS.lengths
        for operator in REFERENCES
        for direction in DIRECTIONS
    ]
    for group in groups:
        assert group.entries[0].name == group.reference
    assert sum(group.num_parts for group in groups) + 1 == num_parts(SETTINGS, CPU)


def test_flops_are_counted_for_products_only():
    flops = {entry.name: entry.flops for group in plan(SETTINGS, CONFIG, CPU)[::2] for entry in group.entries}
    assert flops["rms-norm"] is None
    assert flops["swiglu"] is None
    assert flops["linear"] == 2 * 8192 * 2 * CONFIG.hidden_size * CONFIG.intermediate_size


def test_the_quadratic_form_is_left_out_of_long_sequences():
    assert "dual-form" in variants("mixer", 2048, CPU)
    assert "dual-form" not in variants("mixer", 2049, CPU)


def test_the_scan_is_compiled_where_the_compiler_looks_into_it():
    assert "scan-compiled" not in variants("mixer", LENGTH, CPU)
    assert "scan-compiled" in variants("mixer", LENGTH, torch.device("cuda"))


def test_the_compiled_scan_computes_the_same():
    """On a CPU too, where it is not measured."""
    assert_close(outputs("scan-compiled"), outputs("scan"), torch.float32, "scan-compiled")
