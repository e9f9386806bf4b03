"""Something goes wrong in one place of a small model; the place must be named."""

import pytest
import torch
from torch import nn

from transxssm.models import TransXSSMConfig, TransXSSMForCausalLM
from transxssm.training.nonfinite import find_origin


@pytest.fixture
def model():
    config = TransXSSMConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
    )
    return TransXSSMForCausalLM(config).train()


def origin_of(model, labels=None):
    tokens = torch.randint(0, 64, (2, 16))
    return find_origin(model, lambda: model(input_ids=tokens, labels=tokens if labels is None else labels).loss)


def test_a_healthy_model_has_no_origin_and_keeps_no_gradient(model):
    assert origin_of(model) is None
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("parameter", "expected"),
    [
        ("model.embed_tokens.weight", "activation of model.embed_tokens (its weight"),
        ("model.layers.0.ssd.B_proj.weight", "activation of model.layers.0.ssd.B_proj (its weight"),
        ("model.layers.1.input_layernorm.weight", "activation of model.layers.1.input_layernorm (its weight"),
        ("model.layers.1.self_attn.v_proj.weight", "activation of model.layers.1.self_attn.v_proj (its weight"),
        ("model.layers.2.ssd.A_log", "SSD state of model.layers.2.ssd (its A_log"),
        ("model.layers.2.ssd.dt_bias", "SSD state of model.layers.2.ssd (its dt_bias"),
        ("model.layers.2.mlp.down_proj.weight", "activation of model.layers.2.mlp.down_proj (its weight"),
    ],
)
def test_a_bad_parameter_is_traced_to_its_layer(model, parameter, expected):
    with torch.no_grad():
        model.get_parameter(parameter).view(-1)[0] = torch.nan
    assert str(origin_of(model)).startswith(expected)


def test_a_state_that_overflows_is_told_from_the_projections_around_it(model):
    with torch.no_grad():  # x and B are finite, and so large that their product is not
        model.model.layers[2].ssd.x_proj.weight.fill_(1e20)
        model.model.layers[2].ssd.B_proj.weight.fill_(1e20)
        model.model.layers[2].input_layernorm.weight.fill_(1.0)
    assert str(origin_of(model)) == "SSD state of model.layers.2.ssd"


def test_code_of_a_layer_between_its_modules_is_named_by_the_layer(model):
    mlp = model.model.layers[1].mlp
    with torch.no_grad():  # each factor of the gated product is finite, the product is not
        mlp.gate_proj.weight.fill_(1e20)
        mlp.up_proj.weight.fill_(1e20)
    assert str(origin_of(model)) == "activation of model.layers.1.mlp"


def test_an_infinite_loss_of_finite_activations(model):
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(1e20)  # tied to the head: logits beyond float32
        model.model.norm.weight.mul_(1e25)
    assert str(origin_of(model)) == "activation of the loss"


class Poison(torch.autograd.Function):
    """The identity, whose gradient is NaN."""

    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * torch.nan


class PoisonedActivation(nn.Module):
    def forward(self, value):
        return Poison.apply(nn.functional.silu(value))


def test_a_gradient_is_traced_to_the_module_that_passed_it_back(model):
    model.model.layers[1].mlp.act_fn = PoisonedActivation()
    assert str(origin_of(model)) == "gradient of model.layers.1.mlp.act_fn"


def test_a_gradient_from_between_a_mixers_modules_is_named_by_the_mixer(model, monkeypatch):
    from transxssm.models import ssd_mixer

    scan = ssd_mixer.ssd_chunk_scan

    def poisoned_scan(x, dt, A, B, C, **kwargs):
        return scan(x, dt, A, Poison.apply(B), C, **kwargs)

    monkeypatch.setattr(ssd_mixer, "ssd_chunk_scan", poisoned_scan)
    assert str(origin_of(model)) == "gradient of model.layers.2.ssd"  # the last layer: its gradient comes first


def test_a_parameters_own_gradient_is_named_by_the_parameter(model, monkeypatch):
    from transxssm.models import ssd_mixer

    raised, A_log = ssd_mixer.at_least_float32, model.model.layers[2].ssd.A_log
    monkeypatch.setattr(
        ssd_mixer, "at_least_float32", lambda tensor: Poison.apply(tensor) if tensor is A_log else raised(tensor)
    )
    assert str(origin_of(model)) == "gradient of model.layers.2.ssd.A_log"


def test_layers_that_run_again_on_the_way_back_change_nothing(model):
    # transformers 5.17 has only the older of the two names
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    model.config.use_cache = False
    healthy, poisoned = model.model.layers[1].mlp.act_fn, PoisonedActivation()
    for attempt in range(60):  # tensors freed on the way may be taken for later ones, now and then
        model.model.layers[1].mlp.act_fn = healthy
        kept = [torch.zeros(size + 1) for size in range(attempt)]  # moves what is allocated next
        assert origin_of(model) is None
        model.model.layers[1].mlp.act_fn = poisoned
        assert str(origin_of(model)) == "gradient of model.layers.1.mlp.act_fn"
        del kept[::2]
