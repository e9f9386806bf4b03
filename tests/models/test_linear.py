"""The model's linear layers are torch's own, and whatever acts on such a layer acts in the model and in its loss."""

import copy
import pickle

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize

from tests.models.tiny import ALL_VARIANTS, logits_of, tiny_model, tokens
from tests.tolerances import assert_close
from transxssm.models import linear as linear_layers
from transxssm.models.linear import apply_linear, is_plain_linear


@pytest.mark.parametrize("variant", ALL_VARIANTS)
def test_layers_are_of_torchs_own_types(variant):
    kinds = {name.rsplit(".", 1)[-1]: type(module) for name, module in tiny_model(variant).named_modules()}
    kinds = {name: kind for name, kind in kinds.items() if issubclass(kind, nn.Linear)}
    if "dt_proj" in kinds:  # the one that quantisers pass by
        assert kinds.pop("dt_proj") is NonDynamicallyQuantizableLinear
    assert {"gate_proj", "up_proj", "down_proj", "lm_head"} < kinds.keys()
    assert set(kinds.values()) == {nn.Linear}


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


class WatchedWeight(Tensor):
    """A weight of another class, as torchao's quantisers and DTensor bring it."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.linear:
            return 2 * F.linear(args[0], args[1].as_subclass(Tensor))
        return super().__torch_function__(func, types, args, kwargs or {})


def own_forward(layer: nn.Linear) -> None:
    forward = layer.forward
    layer.forward = lambda x: 2 * forward(x)


# Each doubles what a layer gives.
CHANGES = {
    "hook before": lambda layer: layer.register_forward_pre_hook(lambda _, args: (2 * args[0],)),
    "hook behind": lambda layer: layer.register_forward_hook(lambda _, args, output: 2 * output),
    "own forward": own_forward,
    "parametrised weight": lambda layer: parametrize.register_parametrization(layer, "weight", Doubled()),
    "weight of another class": lambda layer: setattr(
        layer, "weight", nn.Parameter(layer.weight.detach().as_subclass(WatchedWeight))
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_whatever_acts_on_a_layer_acts_on_its_product(change, dtype):
    layer, x = nn.Linear(6, 5, bias=False).to(dtype), torch.randn(3, 6).to(dtype)
    assert is_plain_linear(layer)
    expected = 2 * apply_linear(layer, x)
    change(layer)
    assert not is_plain_linear(layer)
    assert_close(torch.as_tensor(apply_linear(layer, x)), expected, dtype)


def test_a_bias_and_a_gradients_hook_count():
    layer, x = nn.Linear(6, 5), torch.randn(3, 6, requires_grad=True)
    assert_close(apply_linear(layer, x), layer(x), torch.float32)
    layer, seen = nn.Linear(6, 5, bias=False), []
    layer.register_full_backward_hook(lambda *_: seen.append("backward"))
    apply_linear(layer, x).sum().backward()
    assert seen == ["backward"]


def test_a_hook_on_all_modules_sees_each_layer():
    model, seen = tiny_model(), set()
    names = {module: name for name, module in model.named_modules()}
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.add(names[module]))
    try:
        logits_of(model, tokens(1, 5))
    finally:
        handle.remove()
    assert {name for name, module in model.named_modules() if isinstance(module, nn.Linear)} <= seen


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_whatever_acts_on_the_head_acts_on_the_loss(change, training):
    model, ids = tiny_model(tie_word_embeddings=False, dtype=torch.float32).train(training), tokens(2, 9)
    plain = model(ids, labels=ids).loss
    change(model.lm_head)
    output = model(ids, labels=ids, skip_logits=False)
    expected = F.cross_entropy(torch.as_tensor(output.logits)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert_close(torch.as_tensor(output.loss), expected, torch.float32)
    assert abs(output.loss.item() - plain.item()) > 0.01
    output.loss.backward()
    assert all(weight.grad is not None for weight in model.parameters())


def test_a_head_that_is_called_is_called_once():
    model, ids, calls = tiny_model(dtype=torch.float32), tokens(2, 9), []
    expected = logits_of(model, ids)
    model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    output = model(ids, labels=ids, logits_to_keep=3)
    assert_close(output.logits, expected[:, -3:], torch.float32)
    assert len(calls) == 1


def test_a_resized_head_keeps_the_loss_without_logits(monkeypatch):
    model, ids = tiny_model(dtype=torch.float32), tokens(2, 9)
    model.resize_token_embeddings(128, mean_resizing=False)
    expected = F.cross_entropy(logits_of(model, ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    monkeypatch.delattr(F, "cross_entropy")
    assert_close(model(ids, labels=ids).loss, expected, torch.float32)


def test_an_adapters_layers_have_the_fast_products_too(monkeypatch):
    """LoRA calls the layer that it adapts, and its own."""
    seen = []
    fast = linear_layers.linear
    monkeypatch.setattr(linear_layers, "linear", lambda x, weight: seen.append(weight) or fast(x, weight))
    model = tiny_model(dtype=torch.bfloat16)
    peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"]), autocast_adapter_dtype=False)
    logits_of(model, tokens(1, 5))
    layer = model.model.layers[1].self_attn.q_proj
    for weight in (layer.base_layer.weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight):
        assert any(weight is other for other in seen)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_computes_with_its_own_weights(duplicate):
    model, ids = tiny_model(dtype=torch.float32), tokens(2, 9)
    expected = logits_of(model, ids)
    other = duplicate(model)
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    assert torch.equal(logits_of(other, ids), expected)
