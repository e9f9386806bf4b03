"""The forward call: what it returns, its loss, its attention implementations, what it refuses, and Llama as a special case."""

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from tests.apple_gpu import apple_gpu
from tests.models.tiny import (
    ALL_VARIANTS,
    VOCAB_SIZE,
    WITH_ATTENTION,
    gradients_of,
    logits_of,
    tiny_config,
    tiny_model,
    tokens,
)
from tests.tolerances import assert_close
from transxssm import TransXSSMForCausalLM

NUM_LAYERS = 3


class TestLogits:
    def test_causality(self):
        """A token changes its own logits and later ones, never earlier ones."""
        model, ids = tiny_model("everything"), tokens(1, 12)
        changed = ids.clone()
        changed[0, 6] = ids[0, 6] % (VOCAB_SIZE - 1) + 1
        difference = (logits_of(model, changed) - logits_of(model, ids)).abs().amax(-1)[0]
        assert (difference[:6] == 0).all()
        assert (difference[6:] > 1e-6).all()

    @pytest.mark.parametrize("kept", [1, 4, 9, torch.tensor([0, 3, 8]), torch.tensor([2])], ids=str)
    def test_logits_to_keep(self, kept):
        model, ids = tiny_model(), tokens(2, 9)
        whole = logits_of(model, ids)
        expected = whole[:, -kept:] if isinstance(kept, int) else whole[:, kept]
        assert_close(logits_of(model, ids, logits_to_keep=kept), expected, torch.float64)

    def test_tuples_in_place_of_outputs(self):
        model, ids = tiny_model(), tokens(2, 5)
        with torch.no_grad():
            logits = model(ids, return_dict=False, use_cache=False)[0]
        assert torch.equal(logits, logits_of(model, ids))

    @pytest.mark.parametrize("variant", ALL_VARIANTS)
    def test_autocast_leaves_the_decays_alone(self, variant):
        model, ids = tiny_model(variant, dtype=torch.float32), tokens(2, 9)
        with torch.autocast("cpu", torch.bfloat16):
            logits = logits_of(model, ids)
        assert logits.dtype == torch.bfloat16
        assert ((logits - logits_of(model, ids)).norm() / logits.norm()) < 0.05

    @pytest.mark.parametrize("variant", ALL_VARIANTS)
    def test_every_layer_and_parameter_moves_the_logits(self, variant):
        """What the laws of these tests rest on: no part of the tiny models is idle."""
        model = tiny_model(variant)
        logits_of_tokens = model(tokens(2, 9)).logits
        logits_of_tokens.square().mean().backward()
        for name, gradient in gradients_of(model).items():
            assert gradient.norm() > 1e-6, name


class TestLoss:
    @pytest.mark.parametrize("training", [True, False])
    def test_is_the_cross_entropy_of_the_next_token(self, training):
        model, ids = tiny_model().train(training), tokens(2, 9)
        labels = ids.clone()
        labels[0, 3:5] = -100
        logits = logits_of(model, ids)
        expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        assert_close(model(ids, labels=labels).loss, expected, torch.float64)

    def test_its_gradients_are_those_of_cross_entropy(self):
        model, ids = tiny_model(), tokens(2, 9)
        model(ids, labels=ids, skip_logits=True).loss.backward()
        fused = gradients_of(model)
        logits = model(ids).logits
        F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        for name, gradient in gradients_of(model).items():
            assert_close(fused[name], gradient, torch.float64, name=name)

    @pytest.mark.parametrize("num_items", [32, torch.tensor(32)], ids=["int", "tensor"])
    def test_num_items_in_batch_divides_the_sum(self, num_items):
        """Two halves of a batch, each divided by the items of both, add up to the batch."""
        model, ids = tiny_model(), tokens(4, 9)
        with torch.no_grad():
            whole = model(ids, labels=ids).loss
            halves = [model(half, labels=half, num_items_in_batch=num_items).loss for half in ids.split(2)]
        assert_close(sum(halves), whole, torch.float64)

    def test_shift_labels_are_shifted_already(self):
        model, ids = tiny_model(), tokens(2, 9)
        shifted = F.pad(ids, (0, 1), value=-100)[:, 1:]
        with torch.no_grad():
            expected = model(ids, labels=ids).loss
            assert torch.equal(model(ids, shift_labels=shifted).loss, expected)
            wrong = torch.zeros_like(ids)
            assert torch.equal(model(ids, labels=wrong, shift_labels=shifted).loss, expected)

    @pytest.mark.parametrize("training", [True, False])
    def test_logits_come_with_the_loss(self, training):
        """A loss of one's own reads them, in training above all."""
        model, ids = tiny_model().train(training), tokens(2, 9)
        assert torch.equal(logits_of(model, ids, labels=ids), logits_of(model, ids))

    @pytest.mark.parametrize("training", [True, False])
    def test_logits_are_skipped_where_a_loss_is_all_that_is_wanted(self, training):
        model, ids = tiny_model().train(training), tokens(2, 9)
        output = model(ids, labels=ids, skip_logits=True)
        assert output.logits is None
        assert torch.equal(output.loss, model(ids, labels=ids).loss)

    def test_logits_are_not_skipped_without_a_loss(self):
        """Label smoothing takes the labels out of a batch that says to skip logits, and reads them."""
        model, ids = tiny_model(), tokens(2, 9)
        assert torch.equal(logits_of(model, ids, skip_logits=True), logits_of(model, ids))

    def test_without_labels_there_are_logits_and_no_loss(self):
        output = tiny_model().train()(tokens(2, 9))
        assert output.loss is None
        assert output.logits.shape == (2, 9, VOCAB_SIZE)

    def test_a_float32_loss_over_a_bfloat16_model(self):
        model, ids = tiny_model(dtype=torch.bfloat16), tokens(2, 9)
        with torch.no_grad():
            output = model(ids, labels=ids)
        expected = F.cross_entropy(output.logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())
        assert output.loss.dtype == torch.float32
        assert_close(output.loss, expected, torch.bfloat16)


class TestInnerOutputs:
    def test_hidden_states(self):
        model, ids = tiny_model(), tokens(2, 9)
        with torch.no_grad():
            output = model(ids, output_hidden_states=True)
            embedded = model.get_input_embeddings()(ids)
            assert torch.equal(model.lm_head(output.hidden_states[-1]), output.logits)
        assert len(output.hidden_states) == NUM_LAYERS + 1
        assert torch.equal(output.hidden_states[0], embedded)
        assert all(states.shape == (2, 9, 32) for states in output.hidden_states)

    @pytest.mark.parametrize(("variant", "num_attention_layers"), [("hybrid", 1), ("all_attention", 3), ("sliding", 2)])
    def test_attentions(self, variant, num_attention_layers):
        model, ids = tiny_model(variant, dtype=torch.float32), tokens(2, 9)
        model.set_attn_implementation("eager")
        with torch.no_grad():
            attentions = model(ids, output_attentions=True).attentions
        assert len(attentions) == num_attention_layers
        for weights in attentions:
            assert weights.shape == (2, 4, 9, 9)
            assert torch.equal(weights, weights.tril())
            torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 9))

    def test_a_sliding_layer_sees_its_window(self):
        model = tiny_model("sliding", dtype=torch.float32)
        model.set_attn_implementation("eager")
        with torch.no_grad():
            weights = model(tokens(1, 9), output_attentions=True).attentions[0][0, 0]
        distance = torch.arange(9)[:, None] - torch.arange(9)
        assert torch.equal(weights > 0, (distance >= 0) & (distance < 4))


@pytest.mark.parametrize("variant", ALL_VARIANTS)
def test_a_device_without_float64_learns_and_generates_the_same(variant, monkeypatch):
    """Apple's GPUs, as far as a CPU can stand in for one."""
    model, ids = tiny_model(variant, dtype=torch.float32), tokens(2, 21)
    documents = torch.tensor([[0] * 10 + [1] * 11, [0] * 21])
    prompt = {
        "max_new_tokens": 5,
        "do_sample": False,
        "attention_mask": torch.ones_like(ids).index_fill(1, torch.tensor([0]), 0),
    }

    def run() -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
        loss = model(ids, labels=ids, seq_idx=documents, use_cache=False).loss
        loss.backward()
        return loss, gradients_of(model), model.generate(ids, **prompt)

    loss, gradients, generated = run()
    with apple_gpu(monkeypatch):
        actual = run()
    assert_close(actual[0], loss, torch.float32)
    for name, gradient in gradients.items():
        assert_close(actual[1][name], gradient, torch.float32, name=name, num_ops=10)
    assert torch.equal(actual[2], generated)


@pytest.mark.parametrize("variant", WITH_ATTENTION)
def test_eager_attention_is_sdpa(variant):
    model, ids = tiny_model(variant, dtype=torch.float32), tokens(2, 9)
    documents = torch.tensor([[0] * 4 + [1] * 5, [0] * 9])
    sdpa = logits_of(model, ids), logits_of(model, ids, seq_idx=documents)
    model.set_attn_implementation("eager")
    eager = logits_of(model, ids), logits_of(model, ids, seq_idx=documents)
    for got, expected in zip(eager, sdpa, strict=True):
        assert_close(got, expected, torch.float32)


@pytest.mark.parametrize("arguments", [{}, {"input_ids": tokens(1, 3), "inputs_embeds": torch.zeros(1, 3, 32)}])
def test_exactly_one_of_input_ids_and_inputs_embeds(arguments):
    with pytest.raises(ValueError, match="specify exactly one of input_ids and inputs_embeds"):
        tiny_model()(**arguments)


LLAMA = {"rope_theta": 10_000.0, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA_ROPE = {"default": {"rope_theta": 500.0}, "llama3": {**LLAMA, "original_max_position_embeddings": 16}}


@pytest.mark.parametrize(
    ("qk_norm", "config_class", "model_class"),
    [(False, LlamaConfig, LlamaForCausalLM), (True, Qwen3Config, Qwen3ForCausalLM)],
    ids=["llama", "qwen3"],
)
@pytest.mark.parametrize("rope", LLAMA_ROPE)
@pytest.mark.parametrize("num_key_value_heads", [4, 2])
def test_llama_and_qwen3_are_special_cases(num_key_value_heads, rope, qk_norm, config_class, model_class):
    """Attention, MLP and norms have their names and arithmetic, so that their checkpoints fit an all-attention model."""
    config = tiny_config(
        "all_attention",
        num_key_value_heads=num_key_value_heads,
        rope_parameters=dict(LLAMA_ROPE[rope]),
        qk_norm=qk_norm,
    )
    fields = (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim"),
        *("num_key_value_heads", "max_position_embeddings", "initializer_range", "rms_norm_eps", "tie_word_embeddings"),
    )
    peer = model_class(
        config_class(
            **{field: getattr(config, field) for field in fields},
            rope_parameters=dict(LLAMA_ROPE[rope]),
            attn_implementation="sdpa",
            eos_token_id=None,
        )
    ).eval()
    with torch.no_grad():  # a norm that is all ones would fit in anywhere
        for name, weight in peer.named_parameters():
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                weight.uniform_(0.5, 2)
    model = TransXSSMForCausalLM(config).eval()
    model.load_state_dict(peer.state_dict())  # strict: every name on either side has its counterpart
    ids = tokens(2, 40)
    assert_close(logits_of(model, ids), logits_of(peer, ids), torch.float32)
    arguments = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **arguments), peer.generate(ids, **arguments))


@pytest.mark.parametrize("name", ["input_layernorm", "mlp", "mlp.down_proj", "ssd", "ssd.dt_proj", "self_attn"])
def test_a_decoded_token_calls_what_is_hooked(name):
    """Each layer's two calls around its mixer leave out the modules, but not those that someone watches."""
    model = TransXSSMForCausalLM(tiny_config()).eval()
    tokens, seen = torch.randint(1, 90, (2, 7)), []
    with torch.no_grad():
        expected = model(tokens).logits[:, -1]

        def decoded():
            cache = model(tokens[:, :-1], use_cache=True).past_key_values
            seen.clear()
            return model(tokens[:, -1:], past_key_values=cache).logits[:, -1]

        assert_close(decoded(), expected, torch.float32, num_ops=4)
        watched = [layer for layer in model.model.layers if hasattr(layer, name.split(".")[0])]
        for layer in watched:
            layer.get_submodule(name).register_forward_hook(lambda *_: seen.append(name))
        assert_close(decoded(), expected, torch.float32, num_ops=4)
    assert len(seen) == len(watched) > 0
