import math

import pytest
import torch
import torch.nn.functional as F

from transxssm.data import PackedCollator, build_datasets, build_tokenizer, load_corpus
from transxssm.models import TransXSSMForCausalLM, modeling_transxssm
from transxssm.training import Recipe, TransXSSMTrainer


@pytest.fixture
def build_trainer(recipe):
    def build(*overrides):
        chosen = recipe("training.report_to=none", *overrides)  # TensorBoard's folder would be beside the tests
        corpus = load_corpus(chosen.data)
        tokenizer = build_tokenizer(chosen.data, corpus)
        rows = build_datasets(chosen.data, corpus, tokenizer)
        return TransXSSMTrainer(
            model=TransXSSMForCausalLM(chosen.model_config(vocab_size=320)),
            args=chosen.training_arguments(),
            data_collator=PackedCollator(tokenizer),
            train_dataset=rows.train,
            eval_dataset=rows.held_out,
            held_out_bytes=rows.held_out_bytes,
            processing_class=tokenizer,
        )

    return build


def test_vectors_do_not_decay_and_matrices_do(build_trainer):
    options = ("ssd_skip", "ssd_norm_BC", "ssd_bias_BC", "ssd_output_gate", "qk_norm", "attention_output_gate")
    switches = (f"model.{option}=true" for option in options)
    trainer = build_trainer(*switches, "model.ssd_conv_kernel_size=4", "training.weight_decay=0.3")
    optimizer = trainer.create_optimizer()
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    by_name = {name: decay[id(p)] for name, p in trainer.model.named_parameters()}
    assert len(decay) == len(by_name)
    without = {
        name.rsplit(".", 1)[-1] if "norm" not in name else "norm" for name, value in by_name.items() if value == 0
    }
    assert without == {"norm", "A_log", "dt_bias", "D", "B_bias", "C_bias"}
    assert set(by_name.values()) == {0.0, 0.3}
    for matrix in ("embed_tokens.weight", "layers.0.ssd.conv_weight", "layers.0.ssd.z_proj.weight"):
        assert by_name[f"model.{matrix}"] == 0.3


def test_of_two_gpus_a_process_takes_one_and_names_the_command_for_both(build_trainer, monkeypatch, caplog):
    make = Recipe.training_arguments

    def with_two_gpus(recipe):
        arguments = make(recipe)
        arguments._n_gpu = 2
        return arguments

    class Spread(torch.nn.Module):
        def __init__(self, model):
            raise AssertionError("DataParallel gives a loss for each GPU, which evaluation cannot add up")

    monkeypatch.setattr(Recipe, "training_arguments", with_two_gpus)
    monkeypatch.setattr(torch.nn, "DataParallel", Spread)
    trainer = build_trainer("training.max_steps=1", "training.per_device_train_batch_size=2")
    assert "transxssm train … --gpus all" in caplog.text
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0
    assert trainer.args.train_batch_size == 2


def rows(count: int, length: int = 4) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.ones(count, length, dtype=torch.long), "labels": torch.ones(count, length).long()}


def test_a_smaller_batch_is_filled_up_for_a_compiled_model_alone(build_trainer):
    size = "training.per_device_train_batch_size=5"
    plain, compiled = build_trainer(size), build_trainer(size, "training.torch_compile=true")
    whole, last = rows(5), rows(2)
    assert plain._filled_batch(whole) is whole
    assert plain._filled_batch(last) is last
    assert compiled._filled_batch(last) is last  # nothing larger has been seen: a data set of two rows
    assert compiled._filled_batch(whole) is whole
    filled = compiled._filled_batch(last)
    assert filled["input_ids"].tolist() == [[1] * 4] * 5
    assert filled["labels"].tolist() == [[1] * 4] * 2 + [[-100] * 4] * 3
    assert last["labels"].tolist() == [[1] * 4] * 2


def test_rows_that_a_collator_makes_are_not_filled_up(build_trainer):
    """As where each item is a batch: sixteen short rows, then two long ones."""
    compiled = build_trainer("training.per_device_train_batch_size=1", "training.torch_compile=true")
    compiled._filled_batch(rows(16))
    long = rows(2, 32)
    assert compiled._filled_batch(long) is long


def exact_held_out_nats(trainer):
    """Summed token by token from the logits, one row at a time."""
    nats, tokens = 0.0, 0
    trainer.model.eval()
    for row in trainer.eval_dataset:
        batch = trainer.data_collator([row])
        labels = batch.pop("labels")[0, 1:]
        with torch.no_grad():
            logits = trainer.model(**batch).logits[0, :-1]
        nats += F.cross_entropy(logits.double(), labels, ignore_index=-100, reduction="sum").item()
        tokens += (labels != -100).sum().item()
    return nats, tokens


# 3 leaves a last batch that is short, and rows differ in how many labels they have.
@pytest.mark.parametrize("batch_size", [1, 3, 1000])
def test_held_out_loss_is_all_nats_over_all_tokens_whatever_the_batches(build_trainer, batch_size):
    trainer = build_trainer(f"training.per_device_eval_batch_size={batch_size}")
    nats, tokens = exact_held_out_nats(trainer)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(nats / tokens, rel=1e-6)
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-5)
    assert metrics["eval_bits_per_byte"] == pytest.approx(nats / math.log(2) / trainer.held_out_bytes, rel=1e-6)


@pytest.mark.parametrize("method", ["train", "evaluate"])
def test_neither_training_nor_evaluation_forms_logits(build_trainer, method, monkeypatch):
    trainer = build_trainer("training.max_steps=2")
    called, apply_linear = [], modeling_transxssm.apply_linear
    monkeypatch.setattr(modeling_transxssm, "apply_linear", lambda *args: called.append(args[0]) or apply_linear(*args))
    outputs = []
    trainer.model.register_forward_hook(lambda model, inputs, output: outputs.append(output))
    getattr(trainer, method)()
    assert len(outputs) >= 2
    assert all(output.loss is not None and output.logits is None for output in outputs)
    assert called
    assert trainer.model.lm_head not in called


def test_evaluation_does_not_count_as_training_time(build_trainer, monkeypatch):
    trainer = build_trainer()
    clock = iter(range(0, 10_000, 100))  # every look at the clock is 100 seconds later
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    trainer._start_clock()
    monkeypatch.setattr("transformers.Trainer.evaluate", lambda self: {})
    trainer.evaluate()
    trainer._stop_clock()
    assert trainer.train_seconds == 200  # before and after, not the 100 between


@pytest.mark.parametrize(
    ("processes", "rows", "own"), [(2, 5, [1, 0]), (2, 6, [2, 0]), (2, 7, [2, 1]), (2, 8, [2, 2]), (1, 5, [1])]
)
def test_rows_that_only_fill_up_the_last_round_are_not_counted(build_trainer, monkeypatch, processes, rows, own):
    trainer = build_trainer()
    state = trainer.accelerator.gradient_state
    monkeypatch.setattr(type(state), "end_of_dataloader", True)
    monkeypatch.setattr(type(state), "remainder", rows % (2 * processes))
    for process, expected in enumerate(own):
        monkeypatch.setattr(type(trainer.args), "process_index", process)
        rows_here = 2 if processes > 1 else 1  # one process leaves its last batch short
        assert trainer._rows_of_their_own(rows_here) == expected
