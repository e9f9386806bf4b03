"""Whole runs: what a folder holds in the end, and that an interrupted run ends where an uninterrupted one does."""

import dataclasses
import errno
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests import processes
from tests.training.launch import main
from transxssm.data import build_datasets
from transxssm.training import NonFiniteError, SaveError, TransXSSMTrainer, load_recipe, text_data, train
from transxssm.training.checkpoints import last_complete_checkpoint
from transxssm.training.run_folder import plot_loss

SAME_WEIGHTS = 1e-6


def metrics_of(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(run_dir, reference):
    weights, expected = load_file(run_dir / "model.safetensors"), load_file(reference / "model.safetensors")
    assert weights.keys() == expected.keys()
    for name, value in weights.items():
        torch.testing.assert_close(
            value, expected[name], rtol=0, atol=SAME_WEIGHTS, msg=lambda text, n=name: f"{n}: {text}"
        )
    rows, expected_rows = metrics_of(run_dir), metrics_of(reference)
    assert [row["step"] for row in rows] == [row["step"] for row in expected_rows]
    for row, expected_row in zip(rows, expected_rows, strict=True):
        for key in ("tokens", "loss", "grad_norm", "learning_rate", "eval_loss", "eval_bits_per_byte"):
            expected_value = pytest.approx(expected_row[key], rel=SAME_WEIGHTS) if key in expected_row else None
            assert row.get(key) == expected_value, (row["step"], key)
    seconds = [row["train_seconds"] for row in rows]
    assert seconds == sorted(seconds), "time goes on where it stopped"
    summary, expected_summary = (json.loads((folder / "summary.json").read_text()) for folder in (run_dir, reference))
    assert summary["eval_loss"] == pytest.approx(expected_summary["eval_loss"], abs=SAME_WEIGHTS)
    assert summary["train_tokens"] == expected_summary["train_tokens"]


def copy_of(run_dir, recipe):
    """The run, as if it had been started in the recipe's folder."""
    shutil.copytree(run_dir, recipe.output_dir)
    (recipe.output_dir / "recipe.yaml").write_text(recipe.to_yaml())
    return recipe.output_dir


def test_a_finished_run_leaves_everything_in_its_folder(finished_run):
    names = {path.name for path in finished_run.iterdir()}
    assert names == {
        "README.md",
        "checkpoint-15",
        "checkpoint-20",
        "config.json",
        "data.json",
        "generation_config.json",
        "loss.png",
        "metrics.jsonl",
        "model.safetensors",
        "recipe.yaml",
        "summary.json",
        "tensorboard",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert (finished_run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert any((finished_run / "tensorboard").glob("events.out.tfevents.*"))


def test_the_final_model_and_tokenizer_load_through_the_auto_classes(finished_run):
    model = AutoModelForCausalLM.from_pretrained(finished_run)
    tokenizer = AutoTokenizer.from_pretrained(finished_run)
    assert model.config.use_cache
    assert model.config.vocab_size % 64 == 0
    assert model.config.vocab_size >= len(tokenizer)
    assert (model.config.eos_token_id, model.config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    checkpoint = load_file(finished_run / "checkpoint-20" / "model.safetensors")
    for name, value in load_file(finished_run / "model.safetensors").items():
        assert torch.equal(model.get_parameter(name), value)
        assert torch.equal(checkpoint[name], value)


def test_the_summary_is_of_the_last_step_and_consistent(finished_run):
    summary, last = json.loads((finished_run / "summary.json").read_text()), metrics_of(finished_run)[-1]
    model = AutoModelForCausalLM.from_pretrained(finished_run)
    assert summary["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert summary["steps"] == last["step"] == 20
    assert summary["train_tokens"] == last["tokens"]
    assert summary["eval_loss"] == last["eval_loss"] < metrics_of(finished_run)[0]["loss"]
    assert summary["bits_per_byte"] == last["eval_bits_per_byte"]
    assert summary["tokens_per_second"] == pytest.approx(summary["train_tokens"] / summary["train_seconds"], rel=1e-2)
    assert summary["dtype"] == "float32"
    assert summary["versions"]["torch"] == torch.__version__


def test_metrics_have_one_row_per_step(finished_run):
    rows = metrics_of(finished_run)
    steps = [row["step"] for row in rows]
    assert steps == sorted(set(steps))
    assert {1, 2, 5, 10, 15, 20} <= set(steps)
    assert [row["step"] for row in rows if "eval_loss" in row] == [10, 20]


def test_prompts_of_different_lengths_in_one_batch_are_continued_as_each_alone(finished_run):
    model = AutoModelForCausalLM.from_pretrained(finished_run)
    tokenizer = AutoTokenizer.from_pretrained(finished_run)
    prompts = ["def state_1(", "def rotary_22(position):\n    return "]
    settings = {"max_new_tokens": 12, "do_sample": False}
    together = model.generate(**tokenizer(prompts, padding=True, return_tensors="pt"), **settings)
    for prompt, row in zip(prompts, together, strict=True):
        alone = model.generate(**tokenizer(prompt, return_tensors="pt"), **settings)[0]
        assert row[-12:].tolist() == alone[-12:].tolist()


def test_the_run_says_what_is_held_out(recipe, capsys):
    train(recipe("training.max_steps=1"))
    first = capsys.readouterr().err.splitlines()[-4:]
    assert any(line.startswith(f"{recipe().data.corpus}: ") and "characters; held out: " in line for line in first)


def test_without_matplotlib_a_run_leaves_all_but_its_picture_and_says_so(recipe, monkeypatch, caplog):
    monkeypatch.setattr("transxssm.training.loop.plot_loss", plot_loss)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    train(recipe("training.max_steps=1"))
    assert "loss.png is not drawn: matplotlib is not installed: pip install 'transxssm[lab]'" in caplog.text
    assert (recipe().output_dir / "summary.json").exists()
    assert not (recipe().output_dir / "loss.png").exists()


def test_the_stored_recipe_is_the_resolved_one(finished_run):
    assert load_recipe(finished_run / "recipe.yaml").training["lr_scheduler_kwargs"] == {"min_lr_rate": 0.1}


def test_a_run_killed_in_the_middle_resumes_to_the_same_end(recipe, recipe_file, finished_run, tmp_path):
    killed = processes.start(main, recipe_file, "--kill-in-step", 13, output=tmp_path / "said")
    assert processes.exit_codes([killed]) == [-signal.SIGKILL], processes.said(tmp_path / "said")
    run_dir = recipe().output_dir
    assert (
        metrics_of(run_dir)[-1]["step"] == 12
    )  # two steps beyond the checkpoint: these rows must not stay beside their repetition
    assert last_complete_checkpoint(run_dir).name == "checkpoint-10"
    (run_dir / ".unfinished" / "checkpoint-15").mkdir(parents=True)  # as if it had been killed while saving
    train(recipe(), resume=True)
    assert_same_run(run_dir, finished_run)
    assert {path.name for path in run_dir.iterdir()} == {path.name for path in finished_run.iterdir()}


def stop_in_step(monkeypatch, step, stop):
    training_step = TransXSSMTrainer.training_step

    def stopping(self, model, *args, **kwargs):
        if self.state.global_step + 1 == step:
            stop(model)
        return training_step(self, model, *args, **kwargs)

    monkeypatch.setattr(TransXSSMTrainer, "training_step", stopping)


@pytest.mark.parametrize("step", [1, 8, 20])
def test_ctrl_c_saves_a_checkpoint_and_resume_goes_on_from_it(recipe, finished_run, monkeypatch, caplog, step):
    with monkeypatch.context() as patch:
        stop_in_step(patch, step, lambda model: signal.raise_signal(signal.SIGINT))
        told = f"after step {step}.*--resume" if step < 20 else "had finished"
        with pytest.raises(
            KeyboardInterrupt, match=told
        ):  # after the last step too: a study would go on to its next run
            train(recipe())
    assert last_complete_checkpoint(recipe().output_dir).name == f"checkpoint-{step}"
    summary = train(recipe(), resume=True)
    weights = load_file(recipe().output_dir / "model.safetensors")
    for name, value in load_file(finished_run / "model.safetensors").items():
        torch.testing.assert_close(weights[name], value, rtol=0, atol=SAME_WEIGHTS)
    assert summary["steps"] == 20


@pytest.fixture
def in_the_foreground():
    """With Python's own handler of Ctrl-C, which a shell's background job does not have."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("in_the_foreground")
def test_a_second_ctrl_c_stops_at_once_and_keeps_the_last_checkpoint(recipe, monkeypatch):
    def twice(model):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    stop_in_step(monkeypatch, 8, twice)
    with pytest.raises(KeyboardInterrupt):
        train(recipe())
    assert last_complete_checkpoint(recipe().output_dir).name == "checkpoint-5"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_half_written_checkpoint_is_skipped_and_written_again(recipe, finished_run, caplog):
    run_dir = copy_of(finished_run, recipe())
    (run_dir / "summary.json").unlink()
    optimizer = run_dir / "checkpoint-20" / "optimizer.pt"
    optimizer.write_bytes(optimizer.read_bytes()[:1000])
    train(recipe(), resume=True)
    assert "optimizer.pt has 1000 bytes" in caplog.text
    assert "resuming from" in caplog.text
    assert_same_run(run_dir, finished_run)


def test_resuming_after_the_last_step_takes_no_step_more(recipe, finished_run):
    run_dir = copy_of(finished_run, recipe())
    for name in ("summary.json", "model.safetensors"):  # stopped between the last checkpoint and the end
        (run_dir / name).unlink()
    train(recipe(), resume=True)
    assert_same_run(run_dir, finished_run)


def test_resuming_a_finished_run_keeps_its_results(recipe, finished_run, caplog):
    run_dir = copy_of(finished_run, recipe())
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    assert train(recipe(), resume=True) == json.loads((run_dir / "summary.json").read_text())
    assert "has finished already" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")} == before


def test_a_finished_run_can_be_prolonged(recipe, finished_run, caplog):
    copy_of(finished_run, recipe())
    summary = train(recipe("training.max_steps=22"), resume=True)
    assert summary["steps"] == 22
    assert "training.max_steps was 20 and is 22" in caplog.text


def test_a_run_that_ended_before_its_first_checkpoint_starts_from_scratch_and_says_so(recipe, finished_run, caplog):
    with pytest.raises(ValueError, match=r"nothing to resume in .*: it holds no run; leave out --resume"):
        train(recipe(), resume=True)
    recipe().output_dir.mkdir()
    (recipe().output_dir / "recipe.yaml").write_text(recipe().to_yaml())
    train(recipe(), resume=True)
    assert "starting from scratch" in caplog.text
    assert_same_run(recipe().output_dir, finished_run)


def test_a_folder_with_something_in_it_is_not_overwritten(recipe):
    run_dir = recipe().output_dir
    run_dir.mkdir()
    (run_dir / "notes.txt").write_text("mine")
    for resume in (False, True):
        with pytest.raises(ValueError, match=r"something other than a run .*: choose another training\.output_dir"):
            train(recipe(), resume=resume)
    assert [path.name for path in run_dir.iterdir()] == ["notes.txt"]


def test_a_run_folder_that_is_a_file(recipe):
    recipe().output_dir.write_text("")
    with pytest.raises(ValueError, match="is a file"):
        train(recipe())


def test_another_model_or_other_data_is_not_resumed(recipe, finished_run):
    copy_of(finished_run, recipe())
    with pytest.raises(ValueError, match=r"model\.intermediate_size was 96 and is 128; data\.seed was 0 and is 1"):
        train(recipe("model.intermediate_size=128", "data.seed=1"), resume=True)


def test_bad_data_leaves_no_folder_behind(recipe, tmp_path):
    with pytest.raises(ValueError, match="missing"):
        train(recipe(f"data.corpus={tmp_path / 'missing'}"))
    assert not recipe().output_dir.exists()


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(recipe):
    with pytest.raises(ValueError, match=r"model\.vocab_size must be at least the tokenizer's 258: got 256"):
        train(recipe("model.vocab_size=256"))


def test_a_full_disk_keeps_the_checkpoint_before_and_removes_the_half_one(recipe, finished_run, monkeypatch):
    with monkeypatch.context() as patch:
        save = torch.save

        def full_disk(value, path, *args, **kwargs):
            if "checkpoint-10" in str(path) and Path(path).name == "optimizer.pt":
                Path(path).write_bytes(bytes(1000))
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return save(value, path, *args, **kwargs)

        patch.setattr(torch, "save", full_disk)
        with pytest.raises(SaveError, match=r"checkpoint-10.*No space left on device.*checkpoint-5 is whole") as caught:
            train(recipe("training.save_total_limit=1"))
    assert "\n" not in str(caught.value)
    run_dir = recipe().output_dir
    kept = {"checkpoint-5", "data.json", "metrics.jsonl", "recipe.yaml", "tensorboard"}
    assert {path.name for path in run_dir.iterdir()} == kept
    train(recipe("training.save_total_limit=1"), resume=True)
    assert_same_run(run_dir, finished_run)


def test_a_disk_that_fills_up_with_records_is_one_line_too(recipe, monkeypatch):
    def full_disk(self, state):
        if state.global_step == 7:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("transxssm.training.callbacks.MetricsFile._append", full_disk)
    with pytest.raises(SaveError, match=r"the run's records.*No space left on device.*checkpoint-5 is whole"):
        train(recipe())


def test_a_file_size_limit_stops_weights_from_being_half_saved(recipe):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))  # below the size of the weights
        with pytest.raises(SaveError, match=r"checkpoint-5 in .*there is no earlier checkpoint"):
            train(recipe())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(recipe().output_dir.glob("*checkpoint*"))


def test_a_loss_that_is_not_finite_stops_the_run_and_names_step_layer_and_checkpoint(recipe, finished_run, monkeypatch):
    def plant(model):
        with torch.no_grad():
            model.model.layers[2].ssd.A_log[0] = torch.nan

    with monkeypatch.context() as patch:
        stop_in_step(patch, 8, plant)
        with pytest.raises(NonFiniteError) as caught:
            train(recipe())
    message = str(caught.value)
    assert "\n" not in message
    for part in ("step 8", "nan", "SSD state of model.layers.2.ssd", "its A_log was not finite", "checkpoint-5"):
        assert part in message
    run_dir = recipe().output_dir
    assert [path.name for path in run_dir.glob("*checkpoint*")] == ["checkpoint-5"]
    assert all(value.isfinite().all() for value in load_file(run_dir / "checkpoint-5" / "model.safetensors").values())
    train(recipe(), resume=True)
    assert_same_run(run_dir, finished_run)


def test_a_gradient_that_is_not_finite_stops_the_run_before_it_reaches_a_weight(recipe, monkeypatch):
    from transxssm.models import ssd_mixer

    trainers = []

    def poison(model):
        monkeypatch.setattr(ssd_mixer, "ssd_chunk_scan", poisoned)

    scan = ssd_mixer.ssd_chunk_scan

    def poisoned(x, dt, A, B, C, **kwargs):
        y, state = scan(x, dt, A, B, C, **kwargs)
        y.register_hook(lambda gradient: gradient * torch.inf)
        return y, state

    before_save = TransXSSMTrainer._non_finite_error

    def remember(self, *args):
        trainers.append(self)
        return before_save(self, *args)

    monkeypatch.setattr(TransXSSMTrainer, "_non_finite_error", remember)
    stop_in_step(monkeypatch, 3, poison)
    with pytest.raises(
        NonFiniteError, match=r"step 3 is not finite .*gradient of model\.layers\.2\.ssd.*checkpoint is none"
    ):
        train(recipe())
    assert all(parameter.isfinite().all() for parameter in trainers[0].model.parameters())


def test_the_best_model_is_the_one_saved_and_summed_up_if_asked_for(recipe):
    # The highest loss counts as the best here, so that it is not the last one.
    best = ["training.load_best_model_at_end=true", "training.greater_is_better=true", "training.eval_steps=5"]
    summary = train(recipe(*best, "training.save_total_limit=1"))
    run_dir = recipe().output_dir
    losses = {row["step"]: row["eval_loss"] for row in metrics_of(run_dir) if "eval_loss" in row}
    assert summary["eval_loss"] == pytest.approx(losses[5], rel=1e-6)
    assert losses[5] == max(losses.values())
    assert [path.name for path in run_dir.glob("checkpoint-*")] == ["checkpoint-5"]
    final = load_file(run_dir / "model.safetensors")
    for name, value in load_file(run_dir / "checkpoint-5" / "model.safetensors").items():
        assert torch.equal(final[name], value)


def test_a_card_of_ones_own_in_the_run_folder_stays(recipe):
    train(recipe("training.max_steps=5"))
    card = recipe().output_dir / "README.md"
    assert "import transxssm" in card.read_text()
    card.write_text("mine")
    train(recipe(), resume=True)
    assert card.read_text() == "mine"


def test_the_best_by_bits_per_byte_has_the_fewest(recipe):
    best = ["training.load_best_model_at_end=true", "training.metric_for_best_model=bits_per_byte"]
    summary = train(recipe(*best, "training.eval_steps=5", "training.save_total_limit=1"))
    losses = [row["eval_loss"] for row in metrics_of(recipe().output_dir) if "eval_loss" in row]
    assert len(losses) > 1
    assert summary["eval_loss"] == pytest.approx(min(losses), rel=1e-6)
    assert min(losses) < losses[0]


def test_bits_per_byte_of_what_is_no_text_choose_nothing(recipe):
    def source(recipe):
        return dataclasses.replace(text_data(recipe), held_out_bytes=None)

    with pytest.raises(ValueError, match="expected loss or perplexity: what is held out is no text"):
        train(recipe("training.metric_for_best_model=eval_bits_per_byte"), source=source)


def test_a_stream_trains_and_resumes_like_a_table(recipe, monkeypatch):
    def streamed(data, corpus, tokenizer):
        rows = build_datasets(data, corpus, tokenizer)
        streams = {"train": rows.train.to_iterable_dataset(), "held_out": rows.held_out.to_iterable_dataset()}
        return dataclasses.replace(rows, **streams)

    monkeypatch.setattr("transxssm.training.loop.build_datasets", streamed)
    whole = recipe(f"training.output_dir={recipe().output_dir}-whole")
    train(whole)
    with monkeypatch.context() as patch:
        stop_in_step(patch, 10, lambda model: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            train(recipe())
    train(recipe(), resume=True)
    assert_same_run(recipe().output_dir, whole.output_dir)


def test_bfloat16_autocast_trains_close_to_float32(recipe, finished_run):
    summary = train(recipe("training.bf16=true"))
    assert summary["dtype"] == "bfloat16 autocast"
    exact = json.loads((finished_run / "summary.json").read_text())["eval_loss"]
    assert summary["eval_loss"] == pytest.approx(exact, rel=2e-2)
    assert summary["eval_loss"] != exact


def test_a_compiled_model_trains_to_the_same_end(recipe, finished_run):
    """Captured only: generating code would take longer than all other tests of this file."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    compiled = recipe("training.torch_compile=true", "training.torch_compile_backend=aot_eager")
    summary = train(compiled)
    assert_same_run(compiled.output_dir, finished_run)
    assert len(text_data(compiled).train) % 20, "the last batch of an epoch is to be a smaller one"
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    exact = json.loads((finished_run / "summary.json").read_text())["eval_loss"]
    assert summary["eval_loss"] == pytest.approx(exact, rel=1e-5)
