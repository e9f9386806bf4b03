"""TRL's trainers, given a folder or a model, as its guide starts them; what they pack or leave unpadded has the loss of its parts."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)

from tests.serving.checkpoints import write_random_checkpoint
from tests.tolerances import assert_close
from transxssm import TransXSSMForCausalLM, TransXSSMForSequenceClassification

COMMON = {
    "max_steps": 2,
    "logging_steps": 1,
    "per_device_train_batch_size": 2,
    "use_cpu": True,
    "bf16": False,
    "report_to": [],
    "disable_tqdm": True,
    "save_strategy": "no",
}
TEXTS = [f"def f{i}(x):\n    return x + {'1' * (1 + i % 5)}\n" for i in range(24)]
SFT = {
    "bfd": {"packing": True, "packing_strategy": "bfd", "max_length": 64},
    "wrapped": {"packing": True, "packing_strategy": "wrapped", "max_length": 64},
    "padding-free": {"padding_free": True, "max_length": None},
    "padded": {"max_length": None},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_random_checkpoint(
        tmp_path_factory.mktemp("trl") / "model", layer_types=["linear_attention", "full_attention"]
    )


def build(kind: type, config: type, columns: dict[str, Any], **settings: Any) -> Callable[..., Any]:
    """A way to make a trainer of this kind for a model, in a folder."""

    def trainer(model: Any, tokenizer: Any, folder: Path) -> Any:
        options = {"reward_funcs": lambda completions, **_: [float(len(text)) for text in completions]}
        return kind(
            model=model,
            args=config(str(folder), **COMMON, **settings),
            train_dataset=Dataset.from_dict(columns),
            processing_class=tokenizer,
            **(options if kind is GRPOTrainer else {}),
        )

    return trainer


PAIRS = {"prompt": TEXTS, "chosen": ["    # right\n"] * 24, "rejected": ["    # wrong\n"] * 24}
TRAINERS = {
    **{f"sft-{name}": build(SFTTrainer, SFTConfig, {"text": TEXTS}, **settings) for name, settings in SFT.items()},
    "dpo": build(DPOTrainer, DPOConfig, PAIRS),
    "grpo": build(GRPOTrainer, GRPOConfig, {"prompt": TEXTS}, num_generations=2, max_completion_length=8),
    "reward": build(RewardTrainer, RewardConfig, PAIRS),
}


@pytest.fixture
def start(checkpoint, tmp_path):
    """Starts a trainer by its name on the checkpoint, given as a path or loaded."""

    def start(name: str, given: str) -> Any:
        model: Any = str(checkpoint)
        if given == "model" and name == "reward":
            model = TransXSSMForSequenceClassification.from_pretrained(checkpoint, num_labels=1, dtype=torch.float32)
        elif given == "model":
            model = TransXSSMForCausalLM.from_pretrained(checkpoint)
        return TRAINERS[name](model, AutoTokenizer.from_pretrained(checkpoint), tmp_path / "run")

    return start


@pytest.mark.parametrize(
    ("name", "given"),
    [*((name, "path") for name in TRAINERS), *((name, "model") for name in ("sft-padded", "dpo", "reward"))],
)
def test_two_steps(name, given, start):
    trainer = start(name, given)
    before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == 2
    assert all(map(math.isfinite, losses))
    moved = [name for name, weight in trainer.model.named_parameters() if not torch.equal(weight, before[name])]
    assert any(".ssd." in name for name in moved)
    assert any(".self_attn." in name for name in moved)


@pytest.mark.parametrize("name", ["sft-bfd", "sft-padding-free"])
def test_a_row_of_many_documents_has_the_loss_of_each_alone(name, start):
    """TRL says where documents begin in position_ids alone."""
    trainer = start(name, "model")
    model = trainer.model.eval()
    batch = next(iter(trainer.get_train_dataloader()))
    starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    assert len(starts) > 1
    documents = batch["input_ids"][0].tensor_split(starts[1:])
    with torch.no_grad():
        nats = sum(model(row[None], labels=row[None]).loss * (len(row) - 1) for row in documents)
        loss = trainer.compute_loss(model, batch)
    assert_close(loss, nats / sum(len(row) - 1 for row in documents), torch.float32)


def test_lora_without_target_modules(checkpoint, tmp_path):
    trainer = SFTTrainer(
        model=str(checkpoint),
        args=SFTConfig(str(tmp_path), **COMMON),
        train_dataset=Dataset.from_dict({"text": TEXTS}),
        processing_class=AutoTokenizer.from_pretrained(checkpoint),
        peft_config=LoraConfig(),
    )
    assert math.isfinite(trainer.train().training_loss)
