"""Parameters by kind add up to what the model holds, and FLOPs by formula are those that torch counts."""

import pytest
import torch
import transformers
from packaging.version import Version
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config

from tests.models.tiny import ALL_VARIANTS, tiny_config, tiny_model, tokens
from transxssm.inspection import (
    TRAINING_PER_FORWARD,
    AttentionLayer,
    ScanLayer,
    count_parameters,
    flops_per_token,
    layers_of,
)
from transxssm.inspection.costs import step_flops
from transxssm.models import TransXSSMConfig, TransXSSMForCausalLM
from transxssm.models.baselines import (
    BASELINES,
    count_baseline_parameters,
    jamba_config,
    mamba2_config,
    new_language_model,
)
from transxssm.ops.ssd import chunked

LENGTH = 12  # three chunks

CHUNK = 4
CONV_KERNEL = 4
COUNTS_ALIKE = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"),
    reason="transformers 5.17 multiplies matrices for its angles, and none in Mamba-2's reference",
)


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


@pytest.fixture
def counter(monkeypatch):
    """Counts every product that is computed: inside the scan's own operator too, where torch's counter does not look."""
    monkeypatch.setattr(chunked, "_scan", chunked._scan._init_fn)
    return FlopCounterMode(display=False)


def counted(counter: FlopCounterMode, model: nn.Module) -> dict[str, int]:
    """FLOPs by kind: of linear layers, and of the rest inside attention and SSD layers."""
    by_module = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    kinds = dict.fromkeys(("linear", "attention", "ssd"), 0)
    for name, module in model.named_modules():
        flops = by_module.get(f"{type(model).__name__}.{name}", 0)
        if isinstance(module, nn.Linear):
            kinds["linear"] += flops
            mixer = {"self_attn": "attention", "ssd": "ssd"}.get(name.split(".")[-2] if "." in name else "")
            if mixer:
                kinds[mixer] -= flops
        elif name.endswith(("self_attn", "ssd")):
            kinds["attention" if name.endswith("self_attn") else "ssd"] += flops
    assert sum(kinds.values()) == counter.get_total_flops()  # nothing multiplies matrices elsewhere
    return kinds


@pytest.mark.parametrize(
    "variant", [name for name in ALL_VARIANTS if name not in ("sliding", "selective", "everything")]
)
def test_forward(variant, counter):
    model = tiny_model(variant, attn_implementation="eager")
    with counter, torch.no_grad():
        model(tokens(1, LENGTH), use_cache=False)
    kinds, flops = counted(counter, model), flops_per_token(model.config, LENGTH)
    assert kinds["linear"] == flops.linear * LENGTH
    assert kinds["ssd"] == flops.ssd * LENGTH
    # Eager attention computes the whole square, of which causality leaves (t + 1) / 2t.
    assert kinds["attention"] * (LENGTH + 1) / (2 * LENGTH) == pytest.approx(flops.attention * LENGTH)


def test_training_is_a_forward_pass_and_twice_as_much_backward(counter):
    model = tiny_model("all_attention", attn_implementation="eager")
    with counter:
        model(tokens(1, LENGTH), use_cache=False).logits.sum().backward()
    flops = flops_per_token(model.config, LENGTH)
    squares = flops.attention * (2 * LENGTH / (LENGTH + 1))
    assert counter.get_total_flops() == pytest.approx(TRAINING_PER_FORWARD * LENGTH * (flops.linear + squares))


@pytest.mark.parametrize(("context", "mean_keys"), [(1, 1), (3, 2), (4, 2.5), (10, (1 + 2 + 3 + 4 * 7) / 10)])
def test_a_sliding_window_bounds_the_keys(context, mean_keys):
    config = tiny_config("sliding", layer_types=["sliding_attention"] * 3)  # windows of 4
    assert flops_per_token(config, context).attention == pytest.approx(3 * 4 * 32 * mean_keys)


def test_an_ssd_layers_flops_do_not_grow_with_the_context():
    config = TransXSSMConfig.from_preset("320m", layer_types=["linear_attention"] * 24)
    assert flops_per_token(config, 4096) == flops_per_token(config, 131072)


def test_a_context_without_tokens_is_refused():
    with pytest.raises(ValueError, match="at least 1 token: got 0"):
        flops_per_token(tiny_config(), 0)


def counted_of(config, *, training: bool) -> dict[str, float]:
    """FLOPs of linear layers, of attention (eager: the whole square) and of Mamba-2's mixers without their convolutions."""
    model = new_language_model(config, **({"attn_implementation": "eager"} if config.model_type != "mamba2" else {}))
    counter = FlopCounterMode(display=False)
    input_ids = tokens(1, LENGTH)
    with counter:
        logits = model(input_ids=input_ids, use_cache=False).logits
        if training:
            logits.sum().backward()
    by_module = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    linear = sum(
        by_module.get(f"{type(model).__name__}.{name}", 0)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    )
    return {"linear": linear, "rest": counter.get_total_flops() - linear}


@COUNTS_ALIKE
def test_llama():
    config = BASELINES["llama"](tiny_config())
    forward, training = (counted_of(config, training=training) for training in (False, True))
    flops = step_flops(config, "train", LENGTH, 1)
    assert forward["linear"] * 3 == flops.linear
    square = 2 * LENGTH / (LENGTH + 1)
    assert forward["rest"] * 3 == pytest.approx(flops.attention * square)
    assert sum(training.values()) == pytest.approx(flops.linear + flops.attention * square)


@COUNTS_ALIKE
@pytest.mark.parametrize("match", [mamba2_config, jamba_config])
def test_mamba2_blocks(match):
    config = match(tiny_config())
    names = (
        ("n_groups", "num_heads", "chunk_size", "conv_kernel")
        if match is mamba2_config
        else ("mamba_n_groups", "mamba_n_heads", "mamba_chunk_size", "mamba_d_conv")
    )
    # transformers repeats B and C for every head before it multiplies: with a group for each head the counts agree.
    setattr(config, names[0], getattr(config, names[1]))
    setattr(config, names[2], CHUNK)
    setattr(config, names[3], CONV_KERNEL)
    got, flops = counted_of(config, training=False), step_flops(config, "train", LENGTH, 1).times(1 / 3)
    num_scans = config.layer_types.count("linear_attention")
    heads, state = getattr(config, names[1]), getattr(config, "state_size", None) or config.mamba_d_state
    width = 2 * config.hidden_size  # of all heads
    channels = width + 2 * heads * state
    convolution = 2 * CONV_KERNEL * channels * (LENGTH + CONV_KERNEL - 1)
    num_states = LENGTH // CHUNK + 1
    between_chunks = 2 * num_states**2 * width * state  # transformers forms this short recurrence as a product too
    attention = flops.attention * 2 * LENGTH / (LENGTH + 1)
    assert got["linear"] == pytest.approx(flops.linear)
    assert got["rest"] == pytest.approx(flops.ssd + attention + num_scans * (convolution + between_chunks))


@pytest.mark.parametrize("name", [*BASELINES, "transxssm"])
def test_modes(name):
    config = BASELINES.get(name, lambda config: config)(tiny_config())
    train, prefill, decode = (step_flops(config, mode, LENGTH, 1) for mode in ("train", "prefill", "decode"))
    head = 2 * config.hidden_size * config.vocab_size
    assert prefill.linear == train.linear / 3 - (LENGTH - 1) * head
    assert (prefill.attention, prefill.ssd) == pytest.approx((train.attention / 3, train.ssd / 3))
    assert decode.linear == train.linear / 3 / LENGTH
    assert step_flops(config, "train", LENGTH, 5).total == pytest.approx(5 * train.total)
    checkpointed = step_flops(config, "train-checkpointed", LENGTH, 1)
    assert checkpointed.total == pytest.approx(train.total * 4 / 3 - LENGTH * head)
    assert step_flops(config, "train-checkpointed", LENGTH, 5).total == pytest.approx(5 * checkpointed.total)
    later = step_flops(config, "decode", 2 * LENGTH, 1)
    assert later.ssd == decode.ssd
    if decode.attention:  # the new token sees itself too
        assert later.attention / decode.attention == pytest.approx((2 * LENGTH + 1) / (LENGTH + 1))


def test_a_decoded_token_sees_a_windows_keys():
    config = tiny_config("sliding", layer_types=["sliding_attention"] * 3)  # windows of 4
    long, short = (step_flops(config, "decode", length, 1).attention for length in (LENGTH, 1))
    assert (long, short) == (3 * 4 * 32 * 4, 3 * 4 * 32 * 2)


def test_ours_are_those_that_inspection_counts():
    config = tiny_config()
    assert step_flops(config, "train", LENGTH, 1).total == pytest.approx(
        3 * LENGTH * flops_per_token(config, LENGTH).total
    )


def test_flops_of_another_kind_of_model_are_not_counted():
    from transformers import GPT2Config

    with torch.device("meta"), pytest.raises(ValueError, match="got 'gpt2'"):
        step_flops(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=9), "prefill", 2, 1)
