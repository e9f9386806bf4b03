"""A model that several processes share (gloo, on the CPU) computes what one process does."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests import processes
from tests.models.launch import main
from tests.tolerances import assert_close, relative_error


def found_by(check: str, folder: Path, *, number: int = 2) -> dict[str, Any]:
    """What launch.py's check of this name gives in so many processes."""
    output = folder / "said"
    codes = processes.exit_codes(processes.start_ranks(number, main, check, folder, output=output))
    said = processes.said(output)
    assert codes == [0] * number, said[-4000:]
    assert "match nothing" not in said  # rules of a plan without a module
    return torch.load(folder / "found.pt", weights_only=False)


@pytest.mark.slow
def test_tensor_parallel(tmp_path):
    found = found_by("tensor_parallel", tmp_path)
    assert found.pop("saved as it was")
    assert "got ssd_num_groups=1, expected a multiple of 2" in found.pop("one group")
    for name, models in found.items():
        sharded, alone = models["sharded"], models["alone"]
        for part in (".mlp.up_proj.", ".ssd.x_proj.", ".ssd.out_proj.", ".ssd.dynamics.A_log"):
            assert any(part in weight for weight in sharded["sharded"]), (name, part)
        assert "model.embed_tokens.weight" in sharded["sharded"], name
        assert ("lm_head.weight" in sharded["sharded"]) == ("untied" in name), name
        assert_close(sharded["loss"], alone["loss"], torch.float32, name)
        assert_close(sharded["logits"], alone["logits"], torch.float32, name)
        assert torch.equal(sharded["generated"], alone["generated"]), name
        assert sharded["gradients"].keys() == alone["gradients"].keys()
        for weight, gradient in sharded["gradients"].items():
            assert_close(gradient, alone["gradients"][weight], torch.float32, f"{name}: {weight}", num_ops=4)


@pytest.mark.slow
def test_fsdp_of_a_bfloat16_model_whose_decays_are_float32(tmp_path):
    for name, models in found_by("fsdp", tmp_path).items():
        alone = models["alone"]
        if "attention" not in name:
            assert set(alone["dtypes"].values()) == {torch.bfloat16, torch.float32}
        for way in ("transformers", "accelerate"):
            sharded, where = models[way], f"{name}, by {way}"
            assert sharded["dtypes"] == alone["dtypes"], where
            assert sharded["sharded"] == alone["dtypes"].keys(), where
            assert_close(sharded["loss"], alone["loss"], torch.float32, where)
            assert torch.equal(sharded["logits"], alone["logits"]), where
            assert torch.equal(sharded["generated"], alone["generated"]), where
            for weight, gradient in sharded["gradients"].items():  # the loss's own is rounded to bfloat16 elsewhere
                assert relative_error(gradient, alone["gradients"][weight]) < 0.1, f"{where}: {weight}"
        after, expected = models["FSDP1, after a step"].item(), models["alone, after a step"].item()
        assert after == pytest.approx(expected, rel=0.01), name
        assert after < 0.99 * alone["loss"].item(), name


@pytest.mark.slow
def test_context_parallel(tmp_path):
    found = found_by("context_parallel", tmp_path, number=4)
    options, refusals = found.pop("options"), found.pop("refusals")
    for name, outcomes in found.items():
        alone = outcomes.pop(1)
        assert outcomes.keys() == {2, 4}
        for size, outcome in outcomes.items():
            where = f"{name}, {size} parts"
            assert_close(outcome["loss"], alone["loss"], torch.float64, where)
            assert_close(outcome["logits"], alone["logits"], torch.float64, where)
            assert outcome["gradients"].keys() == alone["gradients"].keys()
            for weight, gradient in outcome["gradients"].items():
                assert_close(gradient, alone["gradients"][weight], torch.float64, f"{where}: {weight}", num_ops=4)

    loss, gradient = options.pop("alone")
    for name, (actual_loss, actual_gradient) in options.items():
        assert_close(actual_loss, loss, torch.float64, name)
        assert_close(actual_gradient, gradient, torch.float64, name, num_ops=4)

    expected = {
        "length": "expected a multiple of 4, 12 or more",
        "short parts": "expected a multiple of 4, 12 or more",
        "pads": "rows without pads",
        "cache": "expected none",
        "eager": "expected 'sdpa'",
    }
    assert refusals.keys() == expected.keys()
    for name, message in refusals.items():
        assert expected[name] in message
