"""Two processes on the CPU (gloo) against one with twice the batch: the same losses, evaluations and weights."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemWriter

from tests.models.tiny import tiny_config, tiny_model
from tests.training.conftest import write_recipe
from tests.training.launch import streamed_text
from transxssm.training import load_recipe, train
from transxssm.training.sharding import Parallelism, save_optimizer

SAME = 1e-5  # gradients of two halves are summed in another order

LAUNCH = str(Path(__file__).with_name("launch.py"))
STEPS = ["training.max_steps=6", "training.logging_steps=1", "training.save_steps=3", "training.eval_steps=3"]
FSDP2 = {
    "compute_environment": "LOCAL_MACHINE",
    "distributed_type": "FSDP",
    "fsdp_config": {
        "fsdp_version": 2,
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_state_dict_type": "SHARDED_STATE_DICT",
    },
    "mixed_precision": "no",
    "num_machines": 1,
    "num_processes": 2,
    "use_cpu": True,
}


@pytest.fixture(scope="module")
def one_process(tmp_path_factory, corpus):
    recipe = load_recipe(
        write_recipe(tmp_path_factory.mktemp("one"), corpus), [*STEPS, "training.per_device_train_batch_size=8"]
    )
    train(recipe)
    return recipe.output_dir


def run(*command, expect=0):
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}  # gloo's barrier would look for a GPU per process
    finished = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (finished.returncode == 0) == (expect == 0), finished.stderr[-4000:]
    return finished


def assert_same_as_one_process(run_dir, one_process, *, processes=2):
    rows, expected_rows = (
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (run_dir, one_process)
    )
    assert [row["step"] for row in rows] == [row["step"] for row in expected_rows]
    for row, expected in zip(rows, expected_rows, strict=True):
        for key in expected.keys() & {"tokens", "loss", "grad_norm", "eval_loss", "eval_bits_per_byte"}:
            assert row[key] == pytest.approx(expected[key], rel=SAME), (row["step"], key)
    weights, expected_weights = load_file(run_dir / "model.safetensors"), load_file(one_process / "model.safetensors")
    assert weights.keys() == expected_weights.keys()
    for name, value in weights.items():
        torch.testing.assert_close(value, expected_weights[name], rtol=0, atol=SAME)
    summary, expected_summary = (json.loads((folder / "summary.json").read_text()) for folder in (run_dir, one_process))
    assert summary["parameters"] == expected_summary["parameters"]
    assert summary["processes"] == processes


@pytest.mark.slow
def test_two_processes_train_as_one_with_twice_the_batch(recipe_file, recipe, one_process):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    run(*torchrun, LAUNCH, recipe_file, *STEPS, "training.per_device_train_batch_size=4")
    assert_same_as_one_process(recipe().output_dir, one_process)


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", LAUNCH]


@pytest.mark.slow
def test_a_sharded_run_goes_on_in_one_process(recipe_file, recipe, one_process):
    run(
        *TORCHRUN,
        recipe_file,
        *STEPS,
        "training.per_device_train_batch_size=4",
        "training.parallelism=fsdp",
        "--kill-in-step",
        "5",
        expect=1,
    )
    assert (recipe().output_dir / "checkpoint-3" / "optimizer").is_dir()
    whole = load_recipe(recipe_file, [*STEPS, "training.per_device_train_batch_size=4"])
    train(whole, resume=True)
    assert_same_as_one_process(recipe().output_dir, one_process, processes=1)


@pytest.mark.slow
def test_a_run_of_one_process_goes_on_sharded_and_with_shared_rows(recipe_file, recipe, one_process):
    folder = recipe().output_dir
    folder.mkdir()
    shutil.copy(one_process / "recipe.yaml", folder)
    shutil.copytree(one_process / "checkpoint-3", folder / "checkpoint-3")
    shared = ["training.per_device_train_batch_size=8", "training.parallelism={data: fsdp, cp: 2}"]
    run(*TORCHRUN, recipe_file, *STEPS, *shared, "--resume")
    assert_same_as_one_process(folder, one_process)


@pytest.mark.slow
def test_a_stream_goes_on_where_it_was_whoever_reads_it(recipe_file, recipe, corpus, tmp_path):
    """Two processes that share rows, then two with rows of their own, then one: the rows of one process, each once."""
    (tmp_path / "alone").mkdir()
    settings = [*STEPS, "training.per_device_train_batch_size=8", "training.save_steps=1"]
    alone = load_recipe(write_recipe(tmp_path / "alone", corpus), settings)
    train(alone, source=streamed_text)
    shared, own = ["training.parallelism.cp=2"], ["training.per_device_train_batch_size=4"]
    run(*TORCHRUN, recipe_file, *settings, *shared, "--stream", "--kill-in-step", "4", expect=1)
    run(*TORCHRUN, recipe_file, *settings, *own, "--stream", "--resume", "--kill-in-step", "6", expect=1)
    assert (recipe().output_dir / "checkpoint-5").is_dir()
    train(load_recipe(recipe_file, settings), resume=True, source=streamed_text)
    assert_same_as_one_process(recipe().output_dir, alone.output_dir, processes=1)


@pytest.mark.slow
def test_a_run_of_one_process_goes_on_with_heads_divided_and_then_alone(recipe_file, recipe, corpus, tmp_path):
    (tmp_path / "alone").mkdir()
    settings = [*STEPS, "model.ssd_num_groups=2", "training.per_device_train_batch_size=8"]
    settings += ["training.save_steps=1", "training.save_total_limit=6"]
    alone = load_recipe(write_recipe(tmp_path / "alone", corpus), settings)
    train(alone)
    folder = recipe().output_dir
    folder.mkdir()
    shutil.copy(alone.output_dir / "recipe.yaml", folder)
    shutil.copytree(alone.output_dir / "checkpoint-3", folder / "checkpoint-3")
    divided = ["training.parallelism.tp=2", "--resume", "--kill-in-step", "6"]
    run(*TORCHRUN, recipe_file, *settings, *divided, expect=1)
    assert (folder / "checkpoint-5" / "optimizer").is_dir()
    train(load_recipe(recipe_file, settings), resume=True)
    assert_same_as_one_process(folder, alone.output_dir, processes=1)


def test_a_full_disk_under_the_shards_of_an_optimizer_is_an_error_with_its_cause(tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    model = tiny_model()
    monkeypatch.setattr(FileSystemWriter, "write_data", full)
    with pytest.raises(RuntimeError, match="No space left") as failure:
        save_optimizer(model, torch.optim.AdamW(model.parameters()), tmp_path / "optimizer")
    assert failure.value.__cause__.errno == errno.ENOSPC


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("training.parallelism=zero", "expected one of ddp, fsdp, hsdp"),
        ("training.parallelism.cp=0", "expected a whole number of processes from 1 on"),
        ("training.parallelism.tensor=2", "expected data, cp or tp"),
        ("training.parallelism.tp=two", "expected a whole number of processes from 1 on"),
        ("training.parallelism={cp: 2, tp: 2}", "got cp=2 and tp=2, expected one of them"),
        ("training.parallelism=3", "training.parallelism: got 3"),
    ],
)
def test_wrong_settings_are_found_when_the_recipe_is_read(recipe_file, setting, expected):
    with pytest.raises(ValueError, match=expected):
        load_recipe(recipe_file, [setting])


@pytest.mark.parametrize(
    ("parallelism", "processes", "options", "expected"),
    [
        (Parallelism(cp=2), 1, {}, "got 1 process, expected a multiple of 2"),
        (Parallelism(cp=2), 3, {}, "got 3 processes, expected a multiple of 2"),
        (Parallelism(cp=4), 4, {}, "data.sequence_length=66, expected a multiple of 4"),
        (Parallelism("fsdp"), 2, {"config": None}, "is for model.architecture transxssm"),
        (Parallelism("fsdp"), 2, {"uses_accelerate_fsdp": True}, "leave out either"),
        (Parallelism(tp=2), 3, {}, "got 3 processes, expected a multiple of 2"),
        (Parallelism(tp=2), 4, {}, "got 4 processes, expected 2; for more, data: fsdp"),
        (Parallelism(tp=3), 3, {}, "got ssd_num_heads=4, expected a multiple of 3"),
        (Parallelism(tp=2), 2, {"config": tiny_config(ssd_num_groups=1)}, "got ssd_num_groups=1, expected a multiple"),
        (Parallelism(tp=2), 2, {"config": tiny_config(num_key_value_heads=1)}, "got num_key_value_heads=1"),
        (Parallelism(tp=2), 2, {"compiles": True}, "training.torch_compile: got true"),
    ],
)
def test_what_processes_cannot_share(parallelism, processes, options, expected):
    with pytest.raises(ValueError, match=expected):
        parallelism.check(processes, 66, **({"config": tiny_config(), "uses_accelerate_fsdp": False} | options))


@pytest.mark.slow
def test_the_same_recipe_shards_with_fsdp2_under_accelerate_launch_and_resumes(
    recipe_file, recipe, one_process, tmp_path
):
    # accelerate knows FSDP on accelerators only; on the CPU launch.py overrules it, and torch shards there as well.
    config = tmp_path / "fsdp2.yaml"
    config.write_text(yaml.safe_dump(FSDP2))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, "--main_process_port", "0"]
    command = [*launch, LAUNCH, recipe_file, *STEPS, "training.per_device_train_batch_size=4", "--shard-on-cpu"]
    run(*command, "--kill-in-step", "5", expect=1)
    run(*command, "--resume")
    assert_same_as_one_process(recipe().output_dir, one_process)


@pytest.mark.slow
def test_mixed_precision_under_fsdp2_rounds_no_loss(recipe_file, recipe, one_process, tmp_path):
    """accelerate's policy rounds what modules return to bfloat16: the loss of a step, and the sum over a held-out batch."""
    config = tmp_path / "fsdp2.yaml"
    config.write_text(yaml.safe_dump(FSDP2 | {"mixed_precision": "bf16"}))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, "--main_process_port", "0"]
    overrides = ["training.per_device_train_batch_size=4", "training.bf16=true"]
    run(*launch, LAUNCH, recipe_file, *STEPS, *overrides, "--shard-on-cpu")
    rows, expected_rows = (
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (recipe().output_dir, one_process)
    )
    for row, expected in zip(rows, expected_rows, strict=True):
        losses = {key: row[key] for key in row.keys() & {"loss", "eval_loss"}}
        assert losses
        for key, loss in losses.items():
            assert loss != torch.tensor(loss).bfloat16().item(), (row["step"], key)
            assert loss == pytest.approx(expected[key], rel=1e-3), (row["step"], key)
