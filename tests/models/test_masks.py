"""Kernels are told of documents and windows by first keys, where they know all that is asked; masks say the same elsewhere."""

import functools

import pytest
import torch
from transformers.cache_utils import DynamicCache, StaticCache
from transformers.masking_utils import create_masks_for_generate

from tests.models.tiny import gradients_of, tiny_config, tokens
from tests.tolerances import assert_close
from transxssm import TransXSSMCache, TransXSSMForCausalLM
from transxssm.models.masks import next_token_masks
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


DOCUMENTS = torch.tensor([[0] * 5 + [1] + [4] * 7, [2] * 13])
PADS = torch.tensor([[0] * 4 + [1] * 9, [0] * 1 + [1] * 9 + [0] * 3])
ROWS = {
    "one document": {},
    "packed": {"seq_idx": DOCUMENTS},
    "padded": {"attention_mask": PADS},
    "packed and padded": {"seq_idx": DOCUMENTS, "attention_mask": PADS},
}


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("variant", ["hybrid", "sliding"])
def test_whole_rows_in_half_precision_on_a_cpu(variant, rows, attended, monkeypatch):
    """They take the kernels, which are told of documents, pads and windows by first keys, and agree with SDPA's masks to the rounding."""
    head = torch.empty(1, 1, 1, 32, dtype=torch.bfloat16)
    if not has_attention_kernels(head, head, head):
        pytest.skip(NO_KERNELS)
    model, ids, options = wide_headed(variant, initializer_range=0.1), tokens(2, 13), ROWS[rows]
    mask = options.get("attention_mask", torch.ones_like(ids))
    is_first = mask.cumsum(-1) * mask == 1  # which a pad would predict
    labels = ids.masked_fill((mask == 0) | is_first, -100)

    def loss_and_gradients():
        loss = model(ids, labels=labels, use_cache=False, **options).loss
        loss.backward()
        return loss.detach(), gradients_of(model)

    loss, gradients = loss_and_gradients()
    kinds = [kind for kind in model.config.layer_types if kind != "linear_attention"]
    assert [first_keys is not None for first_keys in attended] == [
        bool(options) or kind.startswith("sliding") for kind in kinds
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
        ({}, {"attention_mask": torch.tensor([[1] * 3 + [0] + [1] * 9, [1] * 13])}),
        ({"attention_dropout": 0.1}, {}),
        ({"dtype": torch.float32}, {}),
        ({}, {"is_causal": False}),
    ],
    ids=["pads between tokens", "dropout", "float32", "not causal"],
)
def test_what_the_kernels_do_not_know_is_left_to_sdpa(options, arguments, attended):
    assert wide_headed(**options)(tokens(2, 13), use_cache=False, **arguments).logits.isfinite().all()
    assert not attended


def test_a_mask_of_all_pairs_is_not_passed_over(attended):
    model, ids = wide_headed("all_attention").eval(), tokens(2, 13)
    mask = torch.ones(2, 1, 13, 13, dtype=torch.bool).tril()
    mask[..., 3:, 1] = False
    with torch.no_grad():
        got = model(ids, attention_mask=mask, use_cache=False).logits
        assert not attended
        assert not torch.equal(got, model(ids, use_cache=False).logits)


@pytest.mark.parametrize("new_cache", [DynamicCache, functools.partial(StaticCache, max_cache_len=24)])
def test_packed_rows_need_a_cache_that_knows_of_documents(new_cache):
    model = wide_headed()
    with pytest.raises(ValueError, match="packed rows need a cache"):
        model(tokens(2, 13), seq_idx=DOCUMENTS, past_key_values=new_cache(config=model.config))


def test_padded_rows_compile_as_one_graph():
    model, ids = wide_headed().eval(), tokens(2, 13)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        got = compiled(ids, attention_mask=PADS, use_cache=False).logits[PADS.bool()]
        expected = model(ids, attention_mask=PADS, use_cache=False).logits[PADS.bool()]
    assert_close(got, expected, torch.bfloat16, num_ops=16)


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


@pytest.mark.parametrize("new_cache", [TransXSSMCache, DynamicCache, functools.partial(StaticCache, max_cache_len=24)])
def test_a_batch_of_prompts_padded_on_the_left_takes_the_kernels(new_cache, attended, monkeypatch):
    """And what is decoded after it agrees with what follows the masked prompt; a static cache is masked as ever."""
    head = torch.empty(1, 1, 1, 32, dtype=torch.bfloat16)
    if not has_attention_kernels(head, head, head):
        pytest.skip(NO_KERNELS)
    model, ids = wide_headed(initializer_range=0.1).eval(), tokens(2, 12)
    mask = torch.tensor([[0] * 4 + [1] * 8, [1] * 12])

    @torch.no_grad()
    def logits():
        cache = new_cache(config=model.config)
        prompt = model(ids[:, :9], attention_mask=mask[:, :9], past_key_values=cache, use_cache=True).logits
        more = model(ids[:, 9:], attention_mask=mask, past_key_values=cache).logits
        return torch.cat((prompt, more), dim=1)[mask.bool()]

    got = logits()
    if isinstance(new_cache, type):
        (first_keys,) = attended
        assert first_keys.tolist() == [[0, 1, 2, 3] + [4] * 5, [0] * 9]
    attended.clear()
    monkeypatch.setattr("transxssm.models.attention.has_attention_kernels", lambda *heads: False)
    assert_close(got, logits(), torch.bfloat16, num_ops=16)
    assert not attended


@pytest.mark.parametrize("variant", ["hybrid", "all_ssd"])
def test_a_mask_of_all_pairs_cannot_say_what_a_state_forgets(variant):
    """It is refused, and generic code is told that attention is not all that the model has."""
    model = wide_headed(variant)
    with pytest.raises(ValueError, match=r"attention_mask must have shape .* got \(1, 1, 5, 5\); pass seq_idx"):
        model(tokens(1, 5), attention_mask=torch.ones(1, 1, 5, 5))
    assert not model.is_backend_compatible()
    assert model._is_stateful


@pytest.mark.parametrize("pads", [None, 0, 3])
def test_the_next_token_behind_a_static_cache_sees_what_transformers_says(pads):
    config = tiny_config("hybrid", attn_implementation="sdpa")
    model, ids, places = TransXSSMForCausalLM(config).eval(), tokens(2, 9), 16
    mask = None if pads is None else torch.ones(2, 10, dtype=torch.long)
    if mask is not None:
        mask[0, :pads] = 0
    cache = StaticCache(config=config, max_cache_len=places)
    with torch.no_grad():
        model(ids, attention_mask=None if mask is None else mask[:, :-1], past_key_values=cache)
    arguments = config, torch.empty(2, 1, 0), mask, cache
    masks, expected = model.create_masks_for_generate(*arguments), create_masks_for_generate(*arguments)
    assert next_token_masks(*arguments) is not None
    assert masks["linear_attention"] is None
    assert torch.equal(masks["full_attention"], expected["full_attention"])


def test_which_tokens_get_their_masks_from_transformers():
    mask = torch.ones(1, 6, dtype=torch.long)
    for variant, length, implementation in [("hybrid", 2, "sdpa"), ("hybrid", 1, "eager"), ("sliding", 1, "sdpa")]:
        config = tiny_config(variant, attn_implementation=implementation)
        given = torch.empty(1, length, 0)
        assert next_token_masks(config, given, mask, StaticCache(config=config, max_cache_len=8)) is None
    config = tiny_config("hybrid", attn_implementation="sdpa")
    assert next_token_masks(config, torch.empty(1, 1, 0), mask, DynamicCache(config=config)) is None
    cache = StaticCache(config=config, max_cache_len=8)
    assert next_token_masks(config, torch.empty(1, 1, 0), mask[:, None, None], cache) is None
