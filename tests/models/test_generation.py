"""`generate` as its users call it, held to a greedy loop that runs the whole text again for every token."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from tests.models.tiny import (
    ALL_VARIANTS,
    SLIDING,
    VOCAB_SIZE,
    WITH_ATTENTION,
    logits_of,
    pad_rows,
    tiny_config,
    tiny_model,
    tokens,
    transformers_is_wrong,
)
from transxssm import TransXSSMCache, TransXSSMForCausalLM

NEW_TOKENS = 6


def greedy_by_hand(model: TransXSSMForCausalLM, ids: Tensor, num_tokens: int = NEW_TOKENS) -> Tensor:
    """The oracle: no cache, no mask, no `generate`."""
    for _ in range(num_tokens):
        ids = torch.cat((ids, logits_of(model, ids, use_cache=False)[:, -1:].argmax(-1)), dim=1)
    return ids


def generate(model: TransXSSMForCausalLM, ids: Tensor | None = None, **arguments) -> Tensor:
    settings = {"do_sample": False, "max_new_tokens": NEW_TOKENS, **arguments}
    return model.generate(ids, **settings)


WAYS: dict[str, dict[str, Any]] = {
    "cache": {},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
}
CHUNKS = {f"chunks of {size}": {"prefill_chunk_size": size} for size in (1, 3, 20)}


@pytest.mark.parametrize("variant", ALL_VARIANTS)
class TestGreedy:
    @pytest.fixture
    def model(self, variant) -> TransXSSMForCausalLM:
        return tiny_model(variant)

    def test_follows_the_argmax(self, model, variant):
        ids = tokens(2, 7)
        expected = greedy_by_hand(model, ids)
        for way, arguments in (WAYS | CHUNKS).items():
            if way == "static cache" and transformers_is_wrong(variant, SLIDING):
                continue
            assert torch.equal(generate(model, ids, **arguments), expected), way

    def test_left_padded_batch_is_each_row_alone(self, model, variant):
        rows = [tokens(1, length, seed=length)[0] for length in (9, 3, 6)]
        ids, mask = pad_rows(rows, left=[0, 6, 3], width=9)
        alone = torch.stack([greedy_by_hand(model, row[None])[0, len(row) :] for row in rows])
        for way, arguments in (WAYS | {"chunks of 4": {"prefill_chunk_size": 4}}).items():
            if way == "static cache" and transformers_is_wrong(variant, SLIDING):
                continue
            assert torch.equal(generate(model, ids, attention_mask=mask, **arguments)[:, 9:], alone), way

    def test_prompt_of_embeddings(self, model):
        ids = tokens(2, 7)
        generated = generate(model, inputs_embeds=model.get_input_embeddings()(ids))
        assert torch.equal(generated, greedy_by_hand(model, ids)[:, 7:])

    def test_prompt_of_one_token(self, model):
        ids = tokens(2, 1)
        assert torch.equal(generate(model, ids), greedy_by_hand(model, ids))

    def test_goes_on_from_a_returned_cache(self, model):
        first = generate(model, tokens(2, 5), return_dict_in_generate=True)
        ids = torch.cat((first.sequences, tokens(2, 4, seed=1)), dim=1)  # the user's next turn
        generated = generate(model, ids, past_key_values=first.past_key_values)
        assert torch.equal(generated, greedy_by_hand(model, ids))


@pytest.mark.parametrize("variant", WITH_ATTENTION)
def test_plain_dynamic_cache(variant):
    model, ids = tiny_model(variant), tokens(2, 7)
    generated = generate(model, ids, past_key_values=DynamicCache(config=model.config))
    assert torch.equal(generated, greedy_by_hand(model, ids))


@pytest.mark.parametrize("variant", ALL_VARIANTS)
def test_beams_with_a_cache_are_beams_without(variant):
    model, ids = tiny_model(variant), tokens(2, 5)
    arguments = {"num_beams": 4, "num_return_sequences": 2, "return_dict_in_generate": True, "output_scores": True}
    cached, uncached = (generate(model, ids, use_cache=use_cache, **arguments) for use_cache in (True, False))
    assert torch.equal(cached.sequences, uncached.sequences)
    torch.testing.assert_close(cached.sequences_scores, uncached.sequences_scores, rtol=0, atol=1e-6)
    # Beams did swap rows: their best continuation is not the greedy one, so that a cache left in its old order shows.
    assert (cached.beam_indices[:, :NEW_TOKENS] % 4).unique().numel() > 1


@pytest.mark.parametrize("variant", ALL_VARIANTS)
def test_sampling_depends_on_the_seed_alone(variant):
    model, ids = tiny_model(variant), tokens(2, 5)

    def sample(seed: int, **arguments) -> Tensor:
        torch.manual_seed(seed)
        return generate(model, ids, do_sample=True, top_p=0.9, temperature=0.8, num_return_sequences=3, **arguments)

    first = sample(7)
    assert first.shape == (6, 5 + NEW_TOKENS)
    assert torch.equal(sample(7), first)
    assert torch.equal(sample(7, use_cache=False), first)
    assert not torch.equal(sample(8), first)
    assert first.unique(dim=0).shape[0] == 6  # the sequences of a prompt are drawn apart


class TestContinuousBatching:
    """transformers keeps keys and values in pages there; a state has none."""

    WORDS = "continuous batching .* SSD layers have none: call generate with the prompts as a left-padded batch"

    def test_it_is_refused_by_its_name(self):
        model = tiny_model()
        with pytest.raises(ValueError, match=self.WORDS):
            model.generate_batch([[1, 2, 3]], max_new_tokens=2)
        with pytest.raises(ValueError, match=self.WORDS):
            generate(model, tokens(1, 3), cache_implementation="paged")

    def test_models_of_attention_alone_are_left_to_transformers(self):
        model = tiny_model(layer_types=["full_attention"] * 2, num_hidden_layers=2)
        assert model.init_continuous_batching() is not None


@pytest.mark.parametrize("variant", ALL_VARIANTS)
def test_a_model_in_training_that_checkpoints_gradients_generates_with_its_cache(variant):
    """Trainers that sample from the policy do so: without gradients there is nothing to recompute."""
    model, ids = tiny_model(variant), tokens(2, 7)
    expected = greedy_by_hand(model, ids)
    model.train()
    model.gradient_checkpointing_enable()
    output = generate(model, ids, return_dict_in_generate=True)
    assert torch.equal(output.sequences, expected)
    assert output.past_key_values.get_seq_length() == 7 + NEW_TOKENS - 1


@pytest.mark.parametrize("cached", [0, 4])
def test_a_cache_is_refused_where_layers_are_recomputed(cached):
    model, cache = tiny_model(), TransXSSMCache(config=tiny_config())
    if cached:
        logits_of(model, tokens(1, cached), past_key_values=cache)
    model.train()
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match=r"gradient checkpointing .* writes a cache twice: .* torch\.no_grad"):
        model(tokens(1, 3), past_key_values=cache)
    assert model(tokens(1, 3), use_cache=True).past_key_values is None  # as in every model of transformers


@pytest.mark.parametrize("new_cache", [TransXSSMCache, functools.partial(StaticCache, max_cache_len=24)])
@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 3}, {"attention_mask": torch.ones(2, 7)}], ids=str)
def test_a_prompt_that_the_cache_holds_is_refused(new_cache, options):
    """Its last token was read already, and a state cannot be taken back by one."""
    model, ids = tiny_model(), tokens(2, 7)
    for length in (7, 4):
        cache = new_cache(config=model.config)
        logits_of(model, ids, past_key_values=cache)
        masked = {name: mask[:, :length] if name == "attention_mask" else mask for name, mask in options.items()}
        message = rf"nothing .* left to read: got past_key_values of 7 tokens and a prompt of {length}; pass .* one token or more"
        with pytest.raises(ValueError, match=message):
            generate(model, ids[:, :length], past_key_values=cache, **masked)
        assert int(cache.get_seq_length()) == 7


def test_a_prompt_of_embeddings_that_the_cache_holds_is_refused():
    model, ids = tiny_model(), tokens(2, 7)
    cache = TransXSSMCache(config=model.config)
    logits_of(model, ids, past_key_values=cache)
    with pytest.raises(ValueError, match="nothing of the prompt is left to read"):
        generate(model, inputs_embeds=model.get_input_embeddings()(ids), past_key_values=cache)


def test_new_tokens_with_a_mask_of_all_go_on_from_a_cache():
    model, ids = tiny_model(), tokens(2, 7)
    cache = TransXSSMCache(config=model.config)
    logits_of(model, ids[:, :5], past_key_values=cache)
    generated = generate(model, ids[:, 5:], past_key_values=cache, attention_mask=torch.ones(2, 7))
    assert torch.equal(generated[:, 2:], greedy_by_hand(model, ids)[:, 7:])


def test_chunks_of_embeddings_are_refused():
    model = tiny_model()
    with pytest.raises(ValueError, match="prefill_chunk_size=3 and inputs_embeds; pass input_ids"):
        generate(model, inputs_embeds=model.get_input_embeddings()(tokens(2, 7)), prefill_chunk_size=3)


class TestAssistant:
    @pytest.fixture
    def target(self) -> LlamaForCausalLM:
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        return LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB_SIZE, initializer_range=0.2, **sizes)).double().eval()

    def test_a_model_with_states_is_refused(self, target):
        with pytest.raises(ValueError, match="got a TransXSSMForCausalLM with SSD layers as assistant_model; expected"):
            generate(target, tokens(1, 5), assistant_model=tiny_model())

    def test_a_model_with_states_is_not_assisted(self):
        """It would have to take back the tokens that are not accepted."""
        for drafts in ({"prompt_lookup_num_tokens": 2}, {"assistant_model": tiny_model("all_attention")}):
            with pytest.raises(ValueError, match="not supported with stateful models, such as TransXSSMForCausalLM"):
                generate(tiny_model(), tokens(1, 5), **drafts)

    def test_a_model_of_attention_alone_assists(self, target):
        ids, assistant = tokens(1, 5), tiny_model("all_attention")
        assert torch.equal(generate(target, ids, assistant_model=assistant), generate(target, ids))
