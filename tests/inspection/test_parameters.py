"""Parameters by kind add up to what the model holds."""

import pytest
from transformers import GPT2Config

from tests.models.tiny import ALL_VARIANTS, tiny_config
from transxssm.inspection import AttentionLayer, ScanLayer, count_parameters, layers_of
from transxssm.models import TransXSSMConfig, TransXSSMForCausalLM
from transxssm.models.baselines import BASELINES, count_baseline_parameters


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("variant", ALL_VARIANTS)
def test_kinds_add_up(variant, tied):
    config = tiny_config(variant, tie_word_embeddings=tied)
    counts = count_parameters(config)
    assert sum(counts.values()) == TransXSSMForCausalLM(config).num_parameters()
    assert counts["embeddings"] == config.vocab_size * config.hidden_size
    assert counts["head"] == (0 if tied else counts["embeddings"])


@pytest.mark.parametrize("name", BASELINES)
def test_kinds_of_a_baseline_add_up(name):
    config = BASELINES[name](tiny_config())
    counts = count_parameters(config)
    assert sum(counts.values()) == count_baseline_parameters(config)
    assert counts["embeddings"] == config.vocab_size * config.hidden_size
    has_ssd, has_attention = name != "llama", name != "mamba2"
    assert [counts[kind] > 0 for kind in ("ssd", "attention", "ffn")] == [has_ssd, has_attention, has_attention]


def test_kinds_are_told_apart():
    counts = count_parameters(
        tiny_config("everything", ssd_num_groups=2)
    )  # one SSD layer, a sliding and a full attention layer
    hidden, ffn, head_dim, state = 32, 48, 8, 16
    projections = 2 * hidden * hidden + 2 * hidden * 2 * state + hidden * 4  # x and out, B and C, dt
    vectors = (
        3 * 4 + 2 * state + 2 * 2 * state + hidden
    )  # A_log, dt_bias and D; norms and biases of B and C; the gate's norm
    matrices = (hidden + 2 * 2 * state) * 3 + hidden * hidden  # a convolution of 3 and z
    assert counts["ssd"] == projections + vectors + matrices
    # Q, the output and its gate; one key-value head; norms of queries and keys.
    assert counts["attention"] == 2 * (3 * hidden * hidden + 2 * hidden * head_dim + 2 * head_dim)
    assert counts["ffn"] == 3 * 3 * hidden * ffn
    assert counts["norms"] == 7 * hidden


@pytest.mark.parametrize(("preset", "millions"), [("320m", 322.0), ("1.3b", 1299.9)])
def test_the_papers_sizes(preset, millions):
    assert sum(count_parameters(TransXSSMConfig.from_preset(preset)).values()) / 1e6 == pytest.approx(
        millions, abs=0.05
    )


def test_parameters_of_another_kind_of_model_are_not_counted():
    with pytest.raises(ValueError, match="got 'gpt2'"):
        count_parameters(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=9))


def test_a_window_belongs_to_its_layer():
    sliding, linear, full = layers_of(tiny_config("everything"))
    assert isinstance(linear, ScanLayer)
    assert linear.conv_state_size == 2  # a convolution of 3
    assert isinstance(sliding, AttentionLayer)
    assert sliding.window == 4
    assert full == sliding._replace(window=None)


def test_baselines():
    config = tiny_config("hybrid")
    assert [type(layer) for layer in layers_of(BASELINES["jamba"](config))] == [ScanLayer, AttentionLayer, ScanLayer]
    assert {type(layer) for layer in layers_of(BASELINES["llama"](config))} == {AttentionLayer}
    mamba2 = BASELINES["mamba2"](config)
    assert layers_of(mamba2) == [ScanLayer(8, 8, 1, mamba2.state_size, 256, 4)] * mamba2.num_hidden_layers


def test_another_kind_of_model_is_refused():
    with pytest.raises(ValueError, match="TransXSSM, Llama, Mamba-2 and Bamba: got 'gpt2'"):
        layers_of(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=9))
