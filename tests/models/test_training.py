"""What trainers do to a model: checkpointing, compiling, adapters, classification."""

import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from tests.models.tiny import (
    ALL_VARIANTS,
    VOCAB_SIZE,
    combinations,
    gradients_of,
    logits_of,
    one_of_each,
    pad_rows,
    tiny_config,
    tiny_model,
    tokens,
)
from tests.tolerances import assert_close
from transxssm import TransXSSMForCausalLM, TransXSSMForSequenceClassification
from transxssm.models import modeling_transxssm

PROJECTIONS = [
    *("q_proj", "k_proj", "v_proj", "o_proj", "g_proj", "gate_proj", "up_proj", "down_proj"),
    *("x_proj", "B_proj", "C_proj", "dt_proj", "z_proj", "out_proj"),
]


def losses_of_training(model: nn.Module, num_steps: int, **batch: Tensor) -> list[float]:
    """Losses of AdamW steps on one batch, before each step and after the last."""
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)
    losses = []
    for _ in range(num_steps):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        return [*losses, model(**batch).loss.item()]


@pytest.mark.parametrize("variant", ALL_VARIANTS)
def test_learns_a_batch_by_heart(variant):
    model = tiny_model(variant, dtype=torch.float32).train()
    ids = tokens(4, 12)
    losses = losses_of_training(model, 20, input_ids=ids, labels=ids)
    assert losses[-1] < 0.2 * losses[0]
    prompt = ids[:, :4]
    continued = model.eval().generate(prompt, max_new_tokens=8, do_sample=False)
    assert (continued == ids).float().mean() > 0.9


@pytest.mark.parametrize(("variant", "use_reentrant"), combinations([True, False]))
def test_gradient_checkpointing_changes_no_gradient(variant, use_reentrant):
    model, ids = tiny_model(variant).train(), tokens(2, 12)
    marks = {"seq_idx": torch.tensor([[0] * 5 + [1] * 7, [0] * 12])}
    plain_loss = model(ids, labels=ids, **marks).loss
    plain_loss.backward()
    plain = gradients_of(model)

    calls = 0

    def count(*_) -> None:
        nonlocal calls
        calls += 1

    handles = [layer.input_layernorm.register_forward_pre_hook(count) for layer in model.model.layers]
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    loss = model(ids, labels=ids, **marks).loss
    loss.backward()
    assert calls == 2 * len(handles)  # each layer ran again in backward
    assert_close(loss, plain_loss, torch.float64)
    for name, gradient in gradients_of(model).items():
        assert_close(gradient, plain[name], torch.float64, name=name)


# Capture is what fails where it fails, so the backend is one that generates no code, which takes minutes.
@pytest.mark.slow
def test_compiles_as_one_graph():
    model, ids = tiny_model("everything").train(), tokens(2, 9)
    model(ids, labels=ids, skip_logits=False, use_cache=False).loss.backward()
    expected = gradients_of(model)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    output = compiled(ids, labels=ids, skip_logits=False, use_cache=False)
    assert_close(output.logits, logits_of(model, ids, use_cache=False), torch.float64)
    output.loss.backward()
    for name, gradient in gradients_of(model).items():
        assert_close(gradient, expected[name], torch.float64, name=name)


@pytest.mark.parametrize(
    ("variant", "marked", "dynamic"),
    [
        ("hybrid", "plain", None),
        ("mamba2", "padded", None),
        ("hybrid", "padded", True),
        ("everything", "packed", True),
    ],
)
def test_training_makes_as_few_graphs_as_llama(variant, marked, dynamic):
    """Over lengths beside and between chunks, and over batch sizes: one graph for the first shape, one for all others."""
    graphs, model = [], tiny_model(variant, dtype=torch.float32, **one_of_each(variant)).train()
    torch.compiler.reset()
    compiled = torch.compile(
        model, fullgraph=True, dynamic=dynamic, backend=lambda graph, _: graphs.append(graph) or graph
    )
    for batch, length in ((2, 5), (2, 16), (2, 17), (3, 33), (5, 12)):
        marks = {
            "plain": {},
            "packed": {"position_ids": (torch.arange(length) % 7).expand(batch, -1)},
            "padded": {"attention_mask": (torch.arange(length) > 1).long().expand(batch, -1)},
        }[marked]
        ids = tokens(batch, length)
        compiled(ids, labels=ids, use_cache=False, **marks).loss.backward()
    assert len(graphs) <= (3 if dynamic is None else 1), "the first, other lengths, other batches"


def with_lora(model: TransXSSMForCausalLM) -> peft.PeftModel:
    """Adapters on every projection; a constant rank, and no dropout, so that a loss is a number."""
    return peft.get_peft_model(
        model, peft.LoraConfig(r=4, lora_alpha=16, target_modules=PROJECTIONS, task_type="CAUSAL_LM")
    )


@pytest.mark.parametrize("variant", ["hybrid", "everything", "all_ssd"])
class TestLora:
    def test_adapts_every_projection(self, variant):
        model = with_lora(tiny_model(variant, dtype=torch.float32))
        linear = {name for name, module in model.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)}
        bare = {
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and "lora_" not in name and "base_layer" not in name
        }
        assert linear
        assert [name.rsplit(".", 1)[-1] for name in bare] == ["lm_head"]

    def test_trains_and_leaves_the_base_alone(self, variant):
        model = with_lora(tiny_model(variant, dtype=torch.float32)).train()
        before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        ids = tokens(4, 12)
        losses = losses_of_training(model, 10, input_ids=ids, labels=ids)
        assert losses[-1] < 0.7 * losses[0]
        for name, weight in model.named_parameters():
            assert torch.equal(weight, before[name]) == ("lora_" not in name), name

    def test_merges_and_comes_back_from_a_file(self, variant, tmp_path):
        model = with_lora(tiny_model(variant, dtype=torch.float32))
        ids = tokens(4, 12)
        losses_of_training(model, 3, input_ids=ids, labels=ids)
        model.eval()
        adapted = logits_of(model, ids)
        assert (adapted - logits_of(tiny_model(variant, dtype=torch.float32), ids)).abs().max() > 1e-2
        generated = model.generate(input_ids=ids[:, :4], max_new_tokens=3, do_sample=False)
        model.save_pretrained(tmp_path)
        loaded = peft.PeftModel.from_pretrained(tiny_model(variant, dtype=torch.float32), tmp_path).eval()
        assert torch.equal(logits_of(loaded, ids), adapted)

        merged = model.merge_and_unload()
        assert type(merged) is TransXSSMForCausalLM
        assert_close(logits_of(merged, ids), adapted, torch.float32)
        assert torch.equal(merged.generate(ids[:, :4], max_new_tokens=3, do_sample=False), generated)


def test_an_adapted_head_is_in_the_loss():
    """The fused loss reads the head's weight; with an adapter on the head that is not all of it."""
    model = peft.get_peft_model(
        tiny_model(dtype=torch.float32, tie_word_embeddings=False),
        peft.LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False),
    )
    ids = tokens(2, 9)
    logits = logits_of(model, ids)
    expected = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert_close(model(input_ids=ids, labels=ids).loss, expected, torch.float32)


@pytest.mark.parametrize("variant", ALL_VARIANTS)
class TestSequenceClassification:
    PAD = 0

    def classifier(self, variant: str) -> TransXSSMForSequenceClassification:
        torch.manual_seed(1)
        config = tiny_config(variant, num_labels=3, pad_token_id=self.PAD)
        return TransXSSMForSequenceClassification(config)

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_reads_the_last_token_that_is_no_pad(self, variant, side):
        model = self.classifier(variant).double().eval()
        rows = [tokens(1, length, seed=length)[0] for length in (9, 4)]
        ids, mask = pad_rows(rows, [0, 5 if side == "left" else 0], 9)
        ids = ids.masked_fill(mask == 0, self.PAD)  # the head finds the last token by its id
        with torch.no_grad():
            padded = model(ids, attention_mask=mask).logits
            alone = torch.cat([model(row[None]).logits for row in rows])
        assert_close(padded, alone, torch.float64)

    def test_trains_on_a_padded_batch(self, variant):
        ids, mask = pad_rows([tokens(1, length, seed=length)[0] for length in (9, 4, 6)], [0, 0, 0], 9)
        ids = ids.masked_fill(mask == 0, self.PAD)
        batch = {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 1, 2])}
        losses = losses_of_training(self.classifier(variant).train(), 8, **batch)
        assert losses[-1] < 0.5 * losses[0]
        assert all(map(math.isfinite, losses))


def trainer_of(
    model: nn.Module, folder: Path, kind: type[Trainer] = Trainer, compute_loss_func: Any = None, **settings: Any
) -> Trainer:
    arguments = TrainingArguments(str(folder), use_cpu=True, report_to=[], disable_tqdm=True, **settings)
    rows = [{"input_ids": ids, "labels": ids} for ids in tokens(4, 8)]
    return kind(
        model.float(),
        arguments,
        train_dataset=rows,
        eval_dataset=rows,
        compute_loss_func=compute_loss_func,
        compute_metrics=lambda prediction: {"rows": len(prediction.label_ids)},
    )


@pytest.mark.parametrize("label_names", [None, ["labels"]], ids=str)
def test_trainer_evaluates(tmp_path, label_names):
    """It finds the labels by the names in forward's signature, and what to leave out of the predictions in the config."""
    model = tiny_model()
    trainer = trainer_of(model, tmp_path, label_names=label_names)
    assert trainer.label_names == ["labels"]
    metrics = trainer.evaluate()
    with torch.no_grad():
        expected = model(tokens(4, 8), labels=tokens(4, 8)).loss.item()
    assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert metrics["eval_rows"] == 4


def test_a_loss_of_ones_own_reads_the_logits_in_training(tmp_path):
    """As tutorials write it, in `Trainer.compute_loss` and as `compute_loss_func`."""

    def loss_of(outputs: Any, labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
        logits = outputs.logits[:, :-1].flatten(0, 1)
        return F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch

    class WithOwnLoss(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = model(**inputs)
            loss = loss_of(outputs, inputs["labels"], num_items_in_batch)
            return (loss, outputs) if return_outputs else loss

    losses = []
    for kind, options in ((Trainer, {}), (WithOwnLoss, {}), (Trainer, {"compute_loss_func": loss_of})):
        trainer = trainer_of(tiny_model(), tmp_path, kind, max_steps=2, **options)
        losses.append(trainer.train().training_loss)
    assert losses == pytest.approx(losses[:1] * 3, rel=1e-5)


def test_a_trainer_can_skip_the_logits(tmp_path, monkeypatch):
    """As the guide on training says it."""
    apply_linear = modeling_transxssm.apply_linear

    def watched(layer: nn.Module, x: Tensor) -> Tensor:
        if layer.out_features == VOCAB_SIZE:
            calls.append(layer.training)
        return apply_linear(layer, x)

    monkeypatch.setattr(modeling_transxssm, "apply_linear", watched)

    class Skipping(Trainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            return super().compute_loss(model, {**inputs, "skip_logits": model.training}, *args, **kwargs)

    calls: list[bool] = []
    losses = {}
    for kind in (Trainer, Skipping):
        model = tiny_model()
        trainer = trainer_of(model, tmp_path, kind, max_steps=2)
        calls.clear()
        losses[kind] = trainer.train().training_loss
        assert calls == ([True] * 2 if kind is Trainer else [])
        assert trainer.evaluate()["eval_rows"] == 4
        assert calls[-1] is False
    assert losses[Skipping] == pytest.approx(losses[Trainer], rel=1e-6)


def test_trainer_evaluates_a_classifier(tmp_path):
    model = TransXSSMForSequenceClassification(tiny_config(num_labels=3)).eval()
    trainer = trainer_of(model, tmp_path)
    trainer.eval_dataset = [{"input_ids": ids, "labels": 1} for ids in tokens(4, 8)]
    assert trainer.evaluate()["eval_rows"] == 4


def test_a_classifiers_loss_is_a_mean_however_the_batch_is_cut(tmp_path):
    """Its loss knows nothing of `num_items_in_batch`, so that Trainer must divide by the number of accumulated batches."""
    config = tiny_config(num_labels=3)
    rows = [{"input_ids": ids, "labels": i % 3} for i, ids in enumerate(tokens(8, 8))]
    logs = []
    for batch_size, steps in ((8, 1), (2, 4)):
        torch.manual_seed(1)
        trainer = trainer_of(
            TransXSSMForSequenceClassification(config),
            tmp_path,
            max_steps=1,
            logging_steps=1,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=steps,
        )
        trainer.train_dataset = rows
        trainer.train()
        logs.append(trainer.state.log_history[0])
    for name in ("loss", "grad_norm"):
        assert logs[1][name] == pytest.approx(logs[0][name], rel=1e-5), name


def test_trainers_label_smoothing_smooths_the_next_token(tmp_path):
    model, ids = tiny_model(), tokens(2, 8)
    trainer = trainer_of(model, tmp_path, label_smoothing_factor=0.1)
    loss = trainer.compute_loss(model, {"input_ids": ids, "labels": ids.clone()})
    logits = logits_of(model, ids)[:, :-1].flatten(0, 1)
    assert_close(loss, F.cross_entropy(logits, ids[:, 1:].flatten(), label_smoothing=0.1), torch.float32)
