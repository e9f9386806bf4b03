"""Quantised as Llama is: every linear layer but the head and the time steps' projection, with the values of the quantised weights."""

from pathlib import Path

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    PreTrainedModel,
    QuantoConfig,
    TorchAoConfig,
)

from tests.models.test_training import losses_of_training
from tests.models.tiny import logits_of, tiny_config, tokens
from tests.tolerances import relative_error
from transxssm import TransXSSMForCausalLM
from transxssm.models.baselines import llama_config

# Widths that quantisers' blocks divide.
SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2, "initializer_range": 0.05}


def bitsandbytes_4bit() -> BitsAndBytesConfig:
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")


def bitsandbytes_8bit() -> BitsAndBytesConfig:
    return BitsAndBytesConfig(load_in_8bit=True)


def torchao_8bit() -> TorchAoConfig:
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def quanto_8bit() -> QuantoConfig:
    return QuantoConfig(weights="int8")


# With the package, and the largest change of the logits: that of 4 bits or of 8 to a random weight.
LOADERS = [
    pytest.param(bitsandbytes_4bit, "bitsandbytes", 0.5, id="bitsandbytes 4 bit"),
    pytest.param(bitsandbytes_8bit, "bitsandbytes", 0.05, id="bitsandbytes 8 bit"),
    pytest.param(torchao_8bit, "torchao", 0.05, id="torchao"),
    pytest.param(quanto_8bit, "optimum.quanto", 0.05, id="quanto"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Checkpoints of ours with all options, and of a Llama."""
    config = tiny_config("everything", **SIZES, num_key_value_heads=2)
    llama = LlamaConfig(**{**llama_config(config).to_dict(), "intermediate_size": 256})
    paths = {}
    for name, of in (("ours", config), ("llama", llama)):
        torch.manual_seed(1)
        paths[name] = tmp_path_factory.mktemp(name)
        AutoModelForCausalLM.from_config(of).save_pretrained(paths[name])
    return paths


def is_quantised(module: nn.Module) -> bool:
    return type(module) is not nn.Linear or type(module.weight) is not nn.Parameter


def quantised_names(model: PreTrainedModel) -> set[str]:
    """The last parts of the names of layers that are products, and are not plain any more."""
    products = {
        name.rsplit(".", 1)[-1]: module
        for name, module in model.named_modules()
        if name.endswith(("_proj", "lm_head")) and not name.endswith("dt_proj")
    }
    return {name for name, module in products.items() if is_quantised(module)}


def load(folder: Path, make, package: str, dtype: torch.dtype) -> PreTrainedModel:
    pytest.importorskip(package)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=make(), device_map="cpu", dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("make", "package", "tolerance"), LOADERS)
class TestLoading:
    def test_quantises_what_it_does_of_llama(self, folders, make, package, tolerance, dtype):
        model, llama = (load(folders[name], make, package, dtype) for name in ("ours", "llama"))
        own = {"x_proj", "B_proj", "C_proj", "z_proj", "out_proj", "g_proj"}
        assert quantised_names(llama) >= {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
        assert quantised_names(model) == quantised_names(llama) | own

    def test_computes_generates_and_has_a_loss(self, folders, make, package, tolerance, dtype):
        model, ids = load(folders["ours"], make, package, dtype).eval(), tokens(2, 12)
        whole = TransXSSMForCausalLM.from_pretrained(folders["ours"]).eval()
        logits = logits_of(model, ids)
        assert 0 < relative_error(logits.float(), logits_of(whole, ids)) < tolerance
        generated = model.generate(ids, max_new_tokens=5, do_sample=False)
        assert torch.equal(generated[:, 12], logits[:, -1].argmax(-1))
        for training in (False, True):
            with torch.no_grad():
                loss = model.train(training)(ids, labels=ids).loss
            expected = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
            assert loss.item() == pytest.approx(expected.item(), rel=0.01)


def test_four_bits_compute_what_their_values_do(folders):
    model, ids = load(folders["ours"], bitsandbytes_4bit, "bitsandbytes", torch.bfloat16).eval(), tokens(2, 12)
    from bitsandbytes.functional import dequantize_4bit

    dense = TransXSSMForCausalLM.from_pretrained(folders["ours"]).eval()
    with torch.no_grad():
        for name, module in model.named_modules():
            if hasattr(module, "quant_state") and module.quant_state is not None:
                dense.get_submodule(name).weight.copy_(dequantize_4bit(module.weight.data, module.weight.quant_state))
    assert relative_error(logits_of(model, ids).float(), logits_of(dense, ids)) < 0.05  # bfloat16


@pytest.mark.parametrize("make", [bitsandbytes_4bit, bitsandbytes_8bit])
def test_bitsandbytes_takes_less_memory_comes_back_from_a_file_and_trains_an_adapter(folders, make, tmp_path):
    whole = TransXSSMForCausalLM.from_pretrained(folders["ours"])
    model, ids = load(folders["ours"], make, "bitsandbytes", torch.bfloat16).eval(), tokens(4, 12)
    assert model.get_memory_footprint() < 0.4 * whole.get_memory_footprint()
    model.save_pretrained(
        tmp_path
    )  # before it runs: 4-bit weights that a CPU has packed for itself are saved wrongly, Llama's too
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu").eval()
    assert torch.equal(logits_of(loaded, ids), logits_of(model, ids))
    model = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu")
    adapted = peft.get_peft_model(
        peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False),
        peft.LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    losses = losses_of_training(adapted.train(), 8, input_ids=ids, labels=ids)
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_torchao_in_place_quantises_the_head_too(folders, dtype):
    """The loss takes what the head computes, not its weight, whose class has no such product."""
    quantization = pytest.importorskip("torchao.quantization")
    model, ids = TransXSSMForCausalLM.from_pretrained(folders["ours"], dtype=dtype), tokens(2, 12)
    expected = model(ids, labels=ids).loss.item()
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    assert "lm_head" in quantised_names(model)
    for training in (False, True):
        assert model.train(training)(ids, labels=ids).loss.item() == pytest.approx(expected, rel=0.01)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
def test_quantize_dynamic(folders):
    model, ids = TransXSSMForCausalLM.from_pretrained(folders["ours"]).eval(), tokens(2, 12)
    expected = logits_of(model, ids)
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    names = {
        name for name, module in quantised.named_modules() if isinstance(module, torch.ao.nn.quantized.dynamic.Linear)
    }
    assert {"lm_head", "model.layers.1.ssd.x_proj", "model.layers.0.self_attn.q_proj"} <= names
    assert 0 < relative_error(logits_of(quantised, ids), expected) < 0.1
    assert quantised(ids, labels=ids).loss.isfinite()
