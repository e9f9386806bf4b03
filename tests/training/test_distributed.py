"""Two processes on the CPU (gloo) against one with twice the batch: the same losses, evaluations and weights."""

import errno
import json
import shutil
from argparse import Namespace

import pytest
import torch
import yaml
from accelerate.commands.launch import launch_command, launch_command_parser
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemWriter

from tests import processes
from tests.models.tiny import tiny_config, tiny_model
from tests.training.conftest import write_recipe
from tests.training.launch import main, streamed_text
from transxssm.training import load_recipe, train
from transxssm.training.sharding import Parallelism, save_optimizer

SAME = 1e-5  # gradients of two halves are summed in another order

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


@pytest.fixture
def run(tmp_path):
    """Trains in two processes with the environment that `torchrun` gives them."""

    def run_both(*arguments, fails=False):
        output = tmp_path / "said"
        codes = processes.exit_codes(processes.start_ranks(2, main, *arguments, output=output))
        assert any(codes) == fails, processes.said(output)[-4000:]

    return run_both


@pytest.fixture
def accelerate_launch(run, tmp_path, monkeypatch):
    """Trains in two processes with the environment that `accelerate launch` gives them, for some settings of FSDP."""

    def launch(*arguments, fails=False, **settings):
        def start(options: Namespace) -> None:
            run(*options.training_script_args, fails=fails)

        config = tmp_path / "fsdp2.yaml"
        config.write_text(yaml.safe_dump(FSDP2 | settings))
        command = ["--config_file", config, "--main_process_port", "0", "launch.py", *arguments, "--shard-on-cpu"]
        monkeypatch.setattr("torch.distributed.run.run", start)
        launch_command(launch_command_parser().parse_args([*map(str, command)]))

    return launch


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
def test_two_processes_train_as_one_with_twice_the_batch(run, recipe_file, recipe, one_process):
    run(recipe_file, *STEPS, "training.per_device_train_batch_size=4")
    assert_same_as_one_process(recipe().output_dir, one_process)


@pytest.mark.slow
def test_a_sharded_run_goes_on_in_one_process(run, recipe_file, recipe, one_process):
    sharded = ["training.per_device_train_batch_size=4", "training.parallelism=fsdp"]
    run(recipe_file, *STEPS, *sharded, "--kill-in-step", 5, fails=True)
    assert (recipe().output_dir / "checkpoint-3" / "optimizer").is_dir()
    whole = load_recipe(recipe_file, [*STEPS, "training.per_device_train_batch_size=4"])
    train(whole, resume=True)
    assert_same_as_one_process(recipe().output_dir, one_process, processes=1)


@pytest.mark.slow
def test_a_run_of_one_process_goes_on_sharded_and_with_shared_rows(run, recipe_file, recipe, one_process):
    folder = recipe().output_dir
    folder.mkdir()
    shutil.copy(one_process / "recipe.yaml", folder)
    shutil.copytree(one_process / "checkpoint-3", folder / "checkpoint-3")
    shared = ["training.per_device_train_batch_size=8", "training.parallelism={data: fsdp, cp: 2}"]
    run(recipe_file, *STEPS, *shared, "--resume")
    assert_same_as_one_process(folder, one_process)


@pytest.mark.slow
def test_a_stream_goes_on_where_it_was_whoever_reads_it(run, recipe_file, recipe, corpus, tmp_path):
    """Two processes that share rows, then two with rows of their own, then one: the rows of one process, each once."""
    (tmp_path / "alone").mkdir()
    settings = [*STEPS, "training.per_device_train_batch_size=8", "training.save_steps=1"]
    alone = load_recipe(write_recipe(tmp_path / "alone", corpus), settings)
    train(alone, source=streamed_text)
    shared, own = ["training.parallelism.cp=2"], ["training.per_device_train_batch_size=4"]
    run(recipe_file, *settings, *shared, "--stream", "--kill-in-step", 4, fails=True)
    run(recipe_file, *settings, *own, "--stream", "--resume", "--kill-in-step", 6, fails=True)
    assert (recipe().output_dir / "checkpoint-5").is_dir()
    train(load_recipe(recipe_file, settings), resume=True, source=streamed_text)
    assert_same_as_one_process(recipe().output_dir, alone.output_dir, processes=1)


@pytest.mark.slow
def test_a_run_of_one_process_goes_on_with_heads_divided_and_then_alone(run, recipe_file, recipe, corpus, tmp_path):
    (tmp_path / "alone").mkdir()
    settings = [*STEPS, "model.ssd_num_groups=2", "training.per_device_train_batch_size=8"]
    settings += ["training.save_steps=1", "training.save_total_limit=6"]
    alone = load_recipe(write_recipe(tmp_path / "alone", corpus), settings)
    train(alone)
    folder = recipe().output_dir
    folder.mkdir()
    shutil.copy(alone.output_dir / "recipe.yaml", folder)
    shutil.copytree(alone.output_dir / "checkpoint-3", folder / "checkpoint-3")
    divided = ["training.parallelism.tp=2", "--resume", "--kill-in-step", 6]
    run(recipe_file, *settings, *divided, fails=True)
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
    accelerate_launch, recipe_file, recipe, one_process
):
    # accelerate knows FSDP on accelerators only; on the CPU launch.py overrules it, and torch shards there as well.
    arguments = [recipe_file, *STEPS, "training.per_device_train_batch_size=4"]
    accelerate_launch(*arguments, "--kill-in-step", 5, fails=True)
    accelerate_launch(*arguments, "--resume")
    assert_same_as_one_process(recipe().output_dir, one_process)


@pytest.mark.slow
def test_mixed_precision_under_fsdp2_rounds_no_loss(accelerate_launch, recipe_file, recipe, one_process):
    """accelerate's policy rounds what modules return to bfloat16: the loss of a step, and the sum over a held-out batch."""
    overrides = ["training.per_device_train_batch_size=4", "training.bf16=true"]
    accelerate_launch(recipe_file, *STEPS, *overrides, mixed_precision="bf16")
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
