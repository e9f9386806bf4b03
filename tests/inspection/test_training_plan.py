"""What a run would take, held to what was measured on one GPU, and to what more GPUs can change."""

import json
from pathlib import Path

import pytest

from transxssm import TransXSSMConfig
from transxssm.inspection import TRAINING_PER_FORWARD, count_parameters, flops_per_token
from transxssm.inspection.training_plan import MEASURED_RATE, Links, memory_plan, plan_training

MEASURED = Path(__file__).parents[2] / "results" / "gpu" / "throughput.json"
CONFIG = TransXSSMConfig.from_preset("1.3b")
CLOSE = 0.15


def measured(entry, mode, length):
    """The cell of our compiled model, and the rows of its batch."""
    found = json.loads(MEASURED.read_text())[entry]
    cells = [cell for cell in found["cells"] if cell["contender"] == "transxssm-compiled"]
    (cell,) = (cell for cell in cells if (cell["mode"], cell["length"]) == (mode, length))
    return cell, found["settings"]["batch"]


def test_the_rate_is_the_measured_one():
    cell, _ = measured("kernels-train-4k-batch-4", "train", 4096)
    flops = TRAINING_PER_FORWARD * flops_per_token(CONFIG, 4096).total
    assert cell["tokens_per_second"] * flops == pytest.approx(MEASURED_RATE, rel=0.02)


@pytest.mark.parametrize(
    ("entry", "mode", "length"),
    [
        ("kernels-train-4k", "train", 4096),
        ("kernels-train-4k-batch-4", "train", 4096),
        ("kernels-train-1k", "train", 1024),
        ("figure4-kernels-64k", "train-checkpointed", 65536),
    ],
)
def test_memory_is_near_the_measured(entry, mode, length):
    cell, rows = measured(entry, mode, length)  # of bfloat16 weights, without an optimizer
    memory = memory_plan(CONFIG, rows * length, shards=1, is_checkpointing=mode == "train-checkpointed", weight_bytes=2)
    assert memory.weights + memory.activations == pytest.approx(cell["peak_bytes"], rel=CLOSE)


@pytest.mark.parametrize("entry", ["large-1", "large-2", "memory-1", "memory-2"])
def test_steps_and_memory_are_near_the_measured_with_one_gpu_and_two(entry):
    found = json.loads(MEASURED.with_name("scaling.json").read_text())[entry]
    sizes = {"gpus": found["gpus"], "length": found["length"], "rows": found["batch"], "gpu": "h200"}
    data = "ddp" if found["sharding"] == "none" else found["sharding"]
    plan = plans(**sizes)[data, found.get("checkpointing", False)]
    assert plan.memory.total - plan.memory.reserved == pytest.approx(found["peak_bytes"], rel=CLOSE)
    assert plan.step_seconds == pytest.approx(found["step_seconds"], rel=CLOSE)
    assert plan.tokens_per_second == pytest.approx(found["tokens_per_second"], rel=CLOSE)


def plans(**changes):
    sizes = {"gpus": 8, "num_tokens": 1e11, "length": 4096, "rows": 4} | changes
    found = plan_training(CONFIG, **sizes)
    return {(plan.data, plan.is_checkpointing): plan for plan in found}


def test_more_gpus_share_memory_and_time():
    few, many = plans(gpus=8), plans(gpus=64)
    parameters = sum(count_parameters(CONFIG).values())
    assert few["ddp", False].memory.weights == 4 * parameters
    assert few["fsdp", False].memory.weights == 4 * parameters / 8
    assert many["hsdp", False].memory.weights == 4 * parameters / 8
    assert many["fsdp", False].memory.optimizer == 8 * parameters / 64
    assert 1 < few["ddp", False].days / many["ddp", False].days <= 8
    for plan in few.values():
        assert plan.gpu_hours == pytest.approx(8 * 24 * plan.days)
        assert plan.tokens_per_second * plan.days * 86400 == pytest.approx(1e11)


def test_checkpointing_takes_less_memory_and_more_time():
    for way in ("ddp", "fsdp"):
        plain, checkpointing = (plans()[way, is_on] for is_on in (False, True))
        assert checkpointing.memory.total < plain.memory.total
        assert checkpointing.step_seconds > plain.step_seconds


def test_what_fits_comes_first_and_slow_links_are_waited_for():
    ordered = plan_training(CONFIG, gpus=8, num_tokens=1e11, length=65536, rows=1)
    assert ordered[0].fits
    assert not ordered[-1].fits
    shared = plan_training(CONFIG, gpus=8, num_tokens=1e11, length=524288, rows=1, cp=8)
    assert shared[0].fits
    assert not plan_training(CONFIG, gpus=8, num_tokens=1e11, length=524288, rows=1)[0].fits
    quick, slow = (
        plan_training(CONFIG, gpus=64, num_tokens=1e11, length=4096, rows=1, links=Links(3e11, rate))[0]
        for rate in (4e10, 1e8)
    )
    assert quick.communication_seconds < slow.communication_seconds


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"gpus": 0}, "gpus: got 0"),
        ({"rows": 0}, "rows: got 0"),
        ({"gpus": 6, "cp": 4}, "must divide the GPUs"),
        ({"cp": 8, "length": 4100}, "must divide the GPUs and the tokens of a row"),
        ({"gpu": "a100"}, "expected one of h100, h200"),
    ],
)
def test_sizes_that_cannot_be(changes, expected):
    with pytest.raises(ValueError, match=expected):
        plans(**changes)
