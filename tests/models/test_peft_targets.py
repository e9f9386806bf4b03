"""What PEFT adapts where it is not told, and which of its methods without target modules fit a model of states."""

import peft
import pytest
import torch
from peft.utils import constants
from torch import nn

from tests.models.tiny import WITH_ATTENTION, logits_of, tiny_model, tokens
from transxssm.models.peft_targets import add_peft_targets

# The options of a method that fit a model 32 wide.
METHODS = {
    "lora": peft.LoraConfig(r=4, init_lora_weights=False),
    "ia3": peft.IA3Config(init_ia3_weights=False),
    "adalora": peft.AdaLoraConfig(total_step=10, init_r=4, target_r=2, init_lora_weights=False),
    "oft": peft.OFTConfig(oft_block_size=4, init_weights=False),
    "vera": peft.VeraConfig(r=4, init_weights=False),
    "norms": peft.LNTuningConfig(),
    "prompt": peft.PromptTuningConfig(num_virtual_tokens=4),
    "p": peft.PromptEncoderConfig(num_virtual_tokens=4, encoder_hidden_size=8),
}
LORA_TARGETS = ["q_proj", "v_proj", "C_proj", "x_proj"]
FLOAT32 = {"dtype": torch.float32}


def adapted_layers(model: nn.Module) -> set[str]:
    """Where an adapter is: "self_attn.q_proj" and so on, whatever the layer's number."""
    return {
        ".".join(name.split(".")[-2:])
        for name, module in model.named_modules()
        if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer)
    }


@pytest.mark.parametrize("variant", ["hybrid", "all_ssd", "all_attention"])
class TestDefaults:
    def test_lora_adapts_values_and_queries_and_what_stands_for_them_in_a_state(self, variant):
        model = peft.get_peft_model(tiny_model(variant, **FLOAT32), peft.LoraConfig(task_type="CAUSAL_LM"))
        expected = set()
        if variant != "all_ssd":
            expected |= {"self_attn.q_proj", "self_attn.v_proj"}
        if variant != "all_attention":
            expected |= {"ssd.C_proj", "ssd.x_proj"}
        assert adapted_layers(model) == expected

    @pytest.mark.parametrize("method", METHODS)
    def test_a_method_learns_and_generates_without_being_told_the_layers(self, variant, method):
        config = METHODS[method]
        config.task_type = "CAUSAL_LM"
        base, ids = tiny_model(variant, **FLOAT32), tokens(2, 9)
        plain = logits_of(base, ids)
        model = peft.get_peft_model(base, config).train()
        arguments = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        model(**arguments, labels=ids).loss.backward()
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        assert any(weight.grad is not None and weight.grad.norm() > 0 for weight in trained)
        torch.optim.SGD(trained, lr=1.0).step()
        model.eval()
        with torch.no_grad():
            assert (model(**arguments).logits[:, -9:] - plain).abs().max() > 1e-4
        assert model.generate(**arguments, max_new_tokens=3, do_sample=False).shape == (2, 12)


def test_every_table_that_knows_llama_knows_the_model():
    tables = {
        name: table
        for name, table in vars(constants).items()
        if name.startswith("TRANSFORMERS_MODELS_TO_") and isinstance(table, dict) and "llama" in table
    }
    assert len(tables) > 10
    for name, table in tables.items():
        assert set(table["llama"]) <= set(table["transxssm"]), name
    assert constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING["transxssm"] == ["down_proj"]


def test_peft_may_be_imported_first():
    add_peft_targets("another")
    try:
        assert constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING["another"] == LORA_TARGETS
    finally:
        for table in vars(constants).values():
            if isinstance(table, dict):
                table.pop("another", None)


@pytest.mark.parametrize("variant", WITH_ATTENTION)
def test_prefix_tuning_is_for_models_of_attention_alone(variant):
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model, ids = peft.get_peft_model(tiny_model(variant, **FLOAT32), config), tokens(2, 9)
    arguments = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    if variant == "all_attention":
        assert model(**arguments).loss.isfinite()
    else:
        with pytest.raises(ValueError, match="an SSD layer has none: use prompt tuning"):
            model(**arguments)
