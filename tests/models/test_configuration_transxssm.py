"""The configuration: presets and their sizes, what is derived, what is refused, and its way through JSON."""

import json
import math
import re

import pytest
import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from tests.models.tiny import ALL_VARIANTS, SIZES, tiny_config
from tests.tolerances import assert_close
from transxssm import TransXSSMConfig, TransXSSMForCausalLM
from transxssm.models import PRESETS
from transxssm.models.modeling_transxssm import TransXSSMRotaryEmbedding


def num_parameters(config: TransXSSMConfig | LlamaConfig) -> int:
    """Parameters of the causal language model, a tied head counted once; no memory is allocated."""
    model_class = TransXSSMForCausalLM if isinstance(config, TransXSSMConfig) else LlamaForCausalLM
    with torch.device("meta"):
        return model_class(config).num_parameters()


# The options, as they are in the paper's own model.
OFF = {
    **dict.fromkeys(("ssd_position_embedding", "attention_position_embedding"), "rope"),
    **{
        "ssd_partial_rotary_factor": 1.0,
        "ssd_conv_kernel_size": 0,
        "sliding_window": None,
        "length_scaling_base": None,
    },
    **dict.fromkeys(("ssd_skip", "ssd_norm_BC", "ssd_bias_BC", "ssd_output_gate", "qk_norm"), False),
    "attention_output_gate": False,
}


class TestPresets:
    @pytest.mark.parametrize(("name", "expected"), [("320m", 321_980_664), ("1.3b", 1_299_877_184)])
    def test_the_papers_sizes(self, name, expected):
        assert num_parameters(TransXSSMConfig.from_preset(name)) == expected

    @pytest.mark.parametrize(("name", "low", "high"), [("small", 28e6, 32e6), ("tiny", 1.5e6, 3e6)])
    def test_the_demonstration_sizes(self, name, low, high):
        assert low <= num_parameters(TransXSSMConfig.from_preset(name)) <= high

    @pytest.mark.parametrize("name", PRESETS)
    def test_is_as_large_as_a_llama_of_its_widths(self, name):
        config = TransXSSMConfig.from_preset(name)
        shared = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        llama = LlamaConfig(**{field: getattr(config, field) for field in shared}, tie_word_embeddings=True)
        assert num_parameters(config) == pytest.approx(num_parameters(llama), rel=0.02)

    @pytest.mark.parametrize("name", PRESETS)
    def test_holds_the_papers_pattern(self, name):
        config = TransXSSMConfig.from_preset(name)
        module = ["linear_attention"] * 7 + ["full_attention"]
        assert config.layer_types == module * (config.num_hidden_layers // 8)
        assert config.head_dim == 64
        assert config.ssd_state_size == 128
        assert config.ssd_num_groups == config.num_attention_heads // 2
        recommended = {"ssd_conv_kernel_size": 4, "ssd_skip": True} if name.endswith("-conv") else {}
        for option, value in (OFF | recommended).items():
            assert getattr(config, option) == value, option

    def test_what_is_recommended_has_the_same_sizes(self):
        for name in ("tiny", "small", "320m", "1.3b"):
            assert PRESETS[name].items() <= PRESETS[f"{name}-conv"].items()

    def test_fields_can_be_replaced(self):
        assert TransXSSMConfig.from_preset("tiny", vocab_size=300).vocab_size == 300
        assert PRESETS["tiny"]["vocab_size"] == 4096

    def test_an_unknown_name_is_refused_with_the_known_ones(self):
        with pytest.raises(
            ValueError, match=r"unknown preset 'huge': expected one of tiny, small, 320m, 1\.3b, tiny-conv"
        ):
            TransXSSMConfig.from_preset("huge")


class TestDerived:
    @pytest.mark.parametrize(
        ("hidden_size", "heads", "groups"), [(256, 4, 2), (64, 1, 1), (96, 3, 1), (320, 5, 1), (384, 6, 3)]
    )
    def test_width_and_heads_alone_are_enough(self, hidden_size, heads, groups):
        config = TransXSSMConfig(hidden_size=hidden_size, num_attention_heads=heads)
        assert config.head_dim == config.ssd_head_dim == hidden_size // heads
        assert config.ssd_num_heads == config.num_key_value_heads == heads
        assert config.ssd_state_size == 2 * config.head_dim
        assert config.ssd_num_groups == groups
        assert config.layer_types == (["linear_attention"] * 7 + ["full_attention"]) * 3

    def test_an_ssd_layer_costs_what_an_attention_layer_does(self):
        config = TransXSSMConfig(hidden_size=256, num_attention_heads=4, num_hidden_layers=8)
        with torch.device("meta"):
            layers = TransXSSMForCausalLM(config).model.layers
        ssd = sum(parameter.numel() for parameter in layers[0].ssd.parameters())
        attention = sum(parameter.numel() for parameter in layers[7].self_attn.parameters())
        assert ssd == attention + 256 * 4 + 2 * 4  # dt_proj, A_log and dt_bias

    @pytest.mark.parametrize("num_layers", [1, 2, 7, 8, 9, 16])
    def test_every_eighth_layer_is_attention_and_there_is_one_at_least(self, num_layers):
        layer_types = TransXSSMConfig(num_hidden_layers=num_layers).layer_types
        attention = [layer + 1 for layer, kind in enumerate(layer_types) if kind == "full_attention"]
        assert attention == ([num_layers] if num_layers < 8 else list(range(8, num_layers + 1, 8)))


@pytest.mark.parametrize("variant", ALL_VARIANTS)
def test_json_round_trip(variant, tmp_path):
    config = tiny_config(
        variant, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}, num_labels=3
    )
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is TransXSSMConfig
    assert loaded.to_dict() | {"_name_or_path": ""} == config.to_dict() | {"_name_or_path": ""}
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "transxssm"


@pytest.mark.parametrize("variant", ["hybrid", "all_ssd", "all_attention", "everything"])
def test_each_rule_of_parallelism_names_a_module(variant):
    config = tiny_config(variant)
    with torch.device("meta"):
        model = TransXSSMForCausalLM(config)
    modules = {re.sub(r"\.\d+", ".*", name) for name, _ in model.named_modules()}
    assert model.tp_plan.keys() | model.pp_plan.keys() <= modules
    assert {"model.embed_tokens", "model.layers.*.mlp.up_proj", "lm_head"} <= model.tp_plan.keys()


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("qk_norm", [True, False])
def test_the_tensor_parallel_plan_has_a_rule_for_what_is_there(qk_norm, gated):
    """Each attention rule names a module of the model, and each module of attention has a rule."""
    config = tiny_config("all_attention", qk_norm=qk_norm, attention_output_gate=gated)
    with torch.device("meta"):
        modules = dict(TransXSSMForCausalLM(config).model.layers[0].named_modules())
    rules = {rule.removeprefix("layers.*.") for rule in config.base_model_tp_plan if rule.startswith("layers.*.")}
    assert rules <= modules.keys()
    assert {name for name in modules if name.startswith("self_attn.")} <= rules
    assert "base_model_tp_plan" not in config.to_dict()


REFUSED = [
    (
        {"hidden_size": 100, "num_attention_heads": 3},
        "hidden_size must be a multiple of num_attention_heads: got 100 and 3",
    ),
    (
        {"num_attention_heads": 4, "num_key_value_heads": 3},
        "num_attention_heads must be a multiple of num_key_value_heads: got 4 and 3",
    ),
    ({"hidden_size": 32, "ssd_head_dim": 12}, "hidden_size must be a multiple of ssd_head_dim: got 32 and 12"),
    ({"ssd_num_heads": 4, "ssd_num_groups": 3}, "ssd_num_heads must be a multiple of ssd_num_groups: got 4 and 3"),
    (
        {"hidden_size": 128, "num_attention_heads": 2, "ssd_state_size": 96},
        "ssd_state_size and head_dim must be even, one a multiple of the other, so that both rotate on one table: got 96 and 64",
    ),
    ({"num_attention_heads": 32}, "ssd_state_size and head_dim must be even, one a multiple of the other.*got 2 and 1"),
    (
        {"layer_types": ["linear_attention"] * 2},
        "layer_types must name each of the num_hidden_layers=3 layers: got 2 names",
    ),
    (
        {"layer_types": ["linear_attention", "mamba", "full_attention"]},
        "layer_types may contain linear_attention, full_attention, sliding_attention: got 'mamba'",
    ),
    (
        {"layer_types": ["linear_attention", "sliding_attention", "full_attention"]},
        "sliding_attention layers need sliding_window ≥ 1 tokens: got None",
    ),
    ({"hidden_size": 0}, "hidden_size must be at least 1: got 0"),
    ({"num_hidden_layers": -1}, "num_hidden_layers must be at least 1: got -1"),
    ({"ssd_chunk_size": 0}, "ssd_chunk_size must be at least 1: got 0"),
    ({"ssd_conv_kernel_size": -1}, "ssd_conv_kernel_size must be 0 .* or more: got -1"),
    ({"ssd_A_min": 0.0}, "expected 0 < ssd_A_min ≤ ssd_A_max: got 0.0 and 16.0"),
    ({"ssd_dt_min": 0.2}, "expected 0 < ssd_dt_floor ≤ ssd_dt_min ≤ ssd_dt_max: got 0.0001, 0.2 and 0.1"),
    ({"length_scaling_base": 1}, "length_scaling_base must be at least 2 tokens.*got 1"),
    (
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
        "rope_type 'dynamic' .dynamic NTK. .* a state summed under old frequencies cannot be rotated again: use one of default, linear,",
    ),
    (
        {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
        "rope_type 'longrope' .* cannot be rotated again",
    ),
    (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        "partial_rotary_factor must be 1 in rope_parameters.*got 0.5; for states there is ssd_partial_rotary_factor",
    ),
    (
        {"ssd_partial_rotary_factor": 0.0},
        "ssd_partial_rotary_factor must be above 0 and at most 1.*got 0.0; without .* set ssd_position_embedding to 'none'",
    ),
    ({"ssd_partial_rotary_factor": 1.5}, "ssd_partial_rotary_factor must be above 0 and at most 1.*got 1.5"),
    ({"ssd_partial_rotary_factor": math.nan}, "ssd_partial_rotary_factor must be above 0 and at most 1.*got nan"),
    (
        {"ssd_partial_rotary_factor": 0.3},
        "ssd_partial_rotary_factor must leave a whole number of the state's 8 pairs: got 0.3, which leaves 2.4",
    ),
    ({"ssd_partial_rotary_factor": 0.01}, "whole number of the state's 8 pairs: got 0.01, which leaves 0.08"),
    (
        {"ssd_partial_rotary_factor": 0.5, "ssd_position_embedding": "none"},
        "ssd_partial_rotary_factor must be 1 where ssd_position_embedding is 'none', as nothing rotates: got 0.5",
    ),
    (
        {"rope_parameters": {"rope_type": "spiral"}},
        "rope_type must be one of default, linear, llama3, yarn, selective: got 'spiral'",
    ),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED, ids=lambda case: str(case)[:60])
def test_what_does_not_fit_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        TransXSSMConfig(**{**SIZES, **fields})


# The others are derived from what is set here, and were derived before.
SET_LATER = [case for case in REFUSED if not case[0].keys() & {"hidden_size", "num_attention_heads", "ssd_head_dim"}]


@pytest.mark.parametrize(("fields", "message"), SET_LATER, ids=lambda case: str(case)[:60])
def test_what_does_not_fit_is_refused_when_a_model_is_built_of_it(fields, message):
    """Nothing looks at a field that is set after construction before."""
    config = TransXSSMConfig(**SIZES)
    for name, value in fields.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=message):
        TransXSSMForCausalLM(config)


def test_a_table_of_rotation_alone_is_checked_too():
    """As generic code builds it, without a model that would have checked its configuration."""
    config = TransXSSMConfig(hidden_size=32, num_attention_heads=2)
    config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(ValueError, match="cannot be rotated again"):
        TransXSSMRotaryEmbedding(config)


@pytest.mark.parametrize("fields", [{"rope_type": "linear", "factor": 2.0}, {"rope_theta": 500.0}, {}], ids=str)
def test_scaling_that_is_set_later_is_completed_as_in_construction(fields):
    config = TransXSSMConfig(**SIZES)
    config.rope_parameters = dict(fields)
    built = TransXSSMForCausalLM(config).model.rotary_emb.frequencies
    assert built == TransXSSMConfig(**SIZES, rope_parameters=dict(fields)).rotary_frequencies()[0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ssd_position_embedding": "learned"}, r"expected one of \('rope', 'none'\), got learned"),
        ({"attention_position_embedding": "alibi"}, r"expected one of \('rope', 'none'\), got alibi"),
        ({"qk_norm": "rms"}, "'qk_norm' expected bool, got str"),
        ({"hidden_size": "wide"}, "'hidden_size' expected int, got str"),
    ],
)
def test_a_field_of_the_wrong_type_is_refused_as_in_all_strict_configurations(fields, message):
    with pytest.raises(StrictDataclassFieldValidationError, match=message):
        TransXSSMConfig(**{**SIZES, **fields})


ROPE = {
    "default": {"rope_theta": 50_000.0},
    "linear": {"factor": 4.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 256},
}
POSITIONS = torch.tensor([[0, 1, 5, 300, 4000]])


def rope_config(rope_type: str, **overrides) -> TransXSSMConfig:
    return tiny_config(rope_parameters={"rope_type": rope_type, "rope_theta": 10_000.0, **ROPE[rope_type]}, **overrides)


def llama_module(config: TransXSSMConfig, width: int) -> LlamaRotaryEmbedding:
    """transformers' own rotary embedding for heads of `width`."""
    llama = LlamaConfig(
        hidden_size=width,
        num_attention_heads=1,
        rope_parameters=dict(config.rope_parameters),
        max_position_embeddings=config.max_position_embeddings,
    )
    return LlamaRotaryEmbedding(llama)


def llama_rotary(config: TransXSSMConfig, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Its cos and sin, one of the two equal halves of each."""
    cos, sin = llama_module(config, width)(torch.zeros(1), POSITIONS)
    return cos[..., : width // 2], sin[..., : width // 2]


@pytest.mark.parametrize("rope_type", ROPE)
class TestStaticRope:
    def test_attention_of_the_tables_width_rotates_as_llama_does(self, rope_type):
        config = rope_config(rope_type, ssd_state_size=8)
        assert config.rotary_width == config.head_dim == 8
        _, attention = TransXSSMRotaryEmbedding(config).tables(POSITIONS, torch.float32)
        for got, expected in zip(attention, llama_rotary(config, 8), strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-3)  # theirs are float32 angles of thousands

    def test_narrower_attention_reads_every_second_frequency_of_the_state(self, rope_type):
        config = rope_config(rope_type)
        assert (config.rotary_width, config.head_dim) == (16, 8)
        ssd, attention = TransXSSMRotaryEmbedding(config).tables(POSITIONS, torch.float64)
        factor = config.rotary_frequencies()[1]
        for of_state, of_attention in zip(ssd, attention, strict=True):
            assert_close(of_attention, factor * of_state[..., ::2], torch.float64)

    def test_the_state_rotates_as_a_llama_of_its_width_without_the_attention_factor(self, rope_type):
        config = rope_config(rope_type)
        ssd, _ = TransXSSMRotaryEmbedding(config).tables(POSITIONS, torch.float64)
        factor = config.rotary_frequencies()[1]
        for got, expected in zip(ssd, llama_rotary(config, 16), strict=True):
            torch.testing.assert_close(got.float(), expected / factor, rtol=0, atol=1e-3)
        assert_close(ssd[0] ** 2 + ssd[1] ** 2, torch.ones_like(ssd[0]), torch.float64)  # a rotation: no gain

    def test_scaling_moves_the_frequencies(self, rope_type):
        unscaled = tiny_config().rotary_frequencies()[0]
        assert rope_config(rope_type).rotary_frequencies()[0] != unscaled


class TestRotaryEmbeddingOfGenericCode:
    """`rotary_emb(x, position_ids)`, as code calls it that is written for any model of transformers."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("rope_type", ROPE)
    def test_gives_what_llama_gives(self, rope_type, dtype):
        config = rope_config(rope_type, ssd_state_size=8)
        x, positions = torch.zeros(1, 3, 32, dtype=dtype), torch.tensor([[0, 1, 5]])
        tables = TransXSSMRotaryEmbedding(config)(x, positions)
        for table, expected in zip(tables, llama_module(config, 8)(x, positions), strict=True):
            assert (table.dtype, table.shape) == (dtype, expected.shape)
            assert_close(table, expected, dtype)

    @pytest.mark.parametrize("variant", ["all_ssd", "partly_rotated"])
    def test_says_that_nothing_attends_by_rotation(self, variant):
        with pytest.raises(ValueError, match="no attention layer rotates in this model"):
            TransXSSMRotaryEmbedding(tiny_config(variant))(torch.zeros(1, 5, 32), POSITIONS)


@pytest.mark.parametrize("rope_type", ROPE)
def test_partial_rotation_lets_the_low_frequencies_of_the_state_stand_and_attention_alone(rope_type):
    rotated, whole = (
        TransXSSMRotaryEmbedding(rope_config(rope_type, ssd_partial_rotary_factor=factor)).tables(
            POSITIONS, torch.float64
        )
        for factor in (0.75, 1.0)
    )
    for table, of_all, standing in zip(rotated[0], whole[0], (1, 0), strict=True):
        assert torch.equal(table[..., :6], of_all[..., :6])
        assert (table[..., 6:] == standing).all()
    assert all(map(torch.equal, rotated[1], whole[1]))


def test_unrotated_attention_has_no_say_in_the_table():
    config = tiny_config(attention_position_embedding="none", ssd_state_size=12)  # no multiple of head_dim
    ssd, attention = TransXSSMRotaryEmbedding(config).tables(POSITIONS, torch.float64)
    assert config.rotary_width == 12
    assert ssd[0].shape == (1, 5, 6)
    assert attention is None
    nothing = tiny_config(attention_position_embedding="none", ssd_position_embedding="none")
    assert TransXSSMRotaryEmbedding(nothing).tables(POSITIONS, torch.float64) == (None, None)


def test_only_yarn_has_an_attention_factor():
    factors = {rope_type: rope_config(rope_type).rotary_frequencies()[1] for rope_type in ROPE}
    assert factors.pop("yarn") == pytest.approx(1.1386, abs=1e-4)  # 0.1 ln 4 + 1
    assert set(factors.values()) == {1.0}
