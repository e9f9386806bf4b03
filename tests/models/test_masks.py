"""Kernels are told of documents and windows by first keys, where they know all that is asked; masks say the same elsewhere."""

import pytest
import torch

from tests.models.tiny import gradients_of, tiny_config, tokens
from tests.tolerances import assert_close
from transxssm import TransXSSMForCausalLM
from transxssm.ops import causal_attention, has_attention_kernels

WIDE_HEADS = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "attn_implementation": "sdpa"}
NO_KERNELS = "no attention kernels for this processor"


@pytest.fixture
def attended(monkeypatch):
    """The calls of causal_attention, as they come: their first keys."""
    calls = []

    def spy(q, k, v, first_keys=None, *, scaling):
        calls.append(first_keys)
        return causal_attention(q, k, v, first_keys, scaling=scaling)

    monkeypatch.setattr("transxssm.models.attention.causal_attention", spy)
    return calls


def wide_headed(variant="hybrid", dtype=torch.bfloat16, **overrides):
    torch.manual_seed(1)
    return TransXSSMForCausalLM(tiny_config(variant, **WIDE_HEADS, **overrides)).to(dtype).train()


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "one document"])
@pytest.mark.parametrize("variant", ["hybrid", "sliding"])
def test_whole_rows_in_half_precision_on_a_cpu(variant, packed, attended, monkeypatch):
    """They take the kernels, which are told of documents and windows by first keys, and agree with SDPA's masks to the rounding."""
    head = torch.empty(1, 1, 1, 32, dtype=torch.bfloat16)
    if not has_attention_kernels(head, head, head):
        pytest.skip(NO_KERNELS)
    model, ids = wide_headed(variant, initializer_range=0.1), tokens(2, 13)
    documents = {"seq_idx": torch.tensor([[0] * 5 + [1] + [4] * 7, [2] * 13])} if packed else {}

    def loss_and_gradients():
        loss = model(ids, labels=ids, use_cache=False, **documents).loss
        loss.backward()
        return loss.detach(), gradients_of(model)

    loss, gradients = loss_and_gradients()
    kinds = [kind for kind in model.config.layer_types if kind != "linear_attention"]
    assert [first_keys is not None for first_keys in attended] == [
        packed or kind.startswith("sliding") for kind in kinds
    ]
    attended.clear()
    monkeypatch.setattr("transxssm.models.attention.has_attention_kernels", lambda *heads: False)
    expected_loss, expected = loss_and_gradients()
    assert not attended
    assert_close(loss, expected_loss, torch.bfloat16)
    for name, gradient in gradients.items():
        if not name.endswith(("A_log", "dt_bias", "dt_proj.weight")):  # sums that nearly cancel
            assert_close(gradient, expected[name], torch.bfloat16, name, num_ops=16)


@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        ({}, {"attention_mask": torch.tensor([[0] + [1] * 12, [1] * 13])}),
        ({"attention_dropout": 0.1}, {}),
        ({"dtype": torch.float32}, {}),
        ({}, {"is_causal": False}),
    ],
    ids=["pads", "dropout", "float32", "not causal"],
)
def test_what_the_kernels_do_not_know_is_left_to_sdpa(options, arguments, attended):
    assert wide_headed(**options)(tokens(2, 13), use_cache=False, **arguments).logits.isfinite().all()
    assert not attended


def test_masks_by_kind_name_every_kind():
    model = wide_headed("sliding")
    with pytest.raises(KeyError, match="sliding_attention"):
        model(tokens(1, 9), attention_mask={"full_attention": None, "linear_attention": None}, use_cache=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_without_memory_has_shapes(dtype):
    model = wide_headed("all_attention", dtype).eval().to("meta")
    assert model(tokens(1, 9).to("meta"), use_cache=False).logits.shape == (1, 9, model.config.vocab_size)


def test_a_prompt_with_a_cache_takes_the_kernels_and_what_follows_does_not(attended):
    head = torch.empty(1, 1, 1, 32, dtype=torch.bfloat16)
    if not has_attention_kernels(head, head, head):
        pytest.skip(NO_KERNELS)
    model, ids = wide_headed().eval(), tokens(1, 13)
    with torch.no_grad():
        cache = model(ids[:, :9], use_cache=True).past_key_values
        assert attended == [None]
        model(ids[:, 9:], past_key_values=cache)
    assert attended == [None]
