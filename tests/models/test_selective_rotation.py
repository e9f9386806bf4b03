"""Selective Unified RoPE: it starts as fixed RoPE to the bit, moves every layer's angles, and refuses what it cannot be.

The laws of caches, pads and documents are held with those of the other variants.
"""

import pytest
import torch

from tests.models.tiny import logits_of, tiny_config, tiny_model, tokens
from tests.tolerances import assert_close
from transxssm import TransXSSMCache, TransXSSMConfig, TransXSSMForCausalLM
from transxssm.models.baselines import jamba_config, llama_config
from transxssm.models.positions import Positions
from transxssm.models.selective_rotation import TransXSSMSelectiveRotation

SELECTIVE = {"rope_type": "selective"}


def rotations_of(model: TransXSSMForCausalLM) -> list[TransXSSMSelectiveRotation]:
    return [module for module in model.modules() if isinstance(module, TransXSSMSelectiveRotation)]


@pytest.mark.parametrize("gate", [False, True], ids=["plain", "gate"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_new_model_is_one_with_fixed_rotations(dtype, gate):
    torch.manual_seed(0)
    selective = TransXSSMForCausalLM(tiny_config(rope_parameters={**SELECTIVE, "gate": gate})).to(dtype)
    fixed = TransXSSMForCausalLM(tiny_config()).to(dtype)
    missing = fixed.load_state_dict(selective.state_dict(), strict=False)
    assert not missing.missing_keys
    assert all(".rotation." in name for name in missing.unexpected_keys)
    ids = tokens(2, 13)
    assert torch.equal(logits_of(selective.eval(), ids), logits_of(fixed.eval(), ids))


def test_every_layer_learns_its_angles():
    """From the start: the gradient of W_2, which is 0, is not."""
    model = TransXSSMForCausalLM(tiny_config(rope_parameters=SELECTIVE))
    ids = tokens(2, 13)
    model(ids, labels=ids).loss.backward()
    rotations = rotations_of(model)
    assert len(rotations) == 3
    assert all(rotation.up_weight.grad.abs().max() > 0 for rotation in rotations)


def test_positions_that_all_move_change_nothing():
    model, ids = tiny_model("selective"), tokens(2, 9)
    positions = torch.arange(9)[None]
    expected = logits_of(model, ids, position_ids=positions)
    assert_close(logits_of(model, ids, position_ids=positions + 1000), expected, torch.float64)


def test_an_angle_before_the_first_token_changes_nothing():
    """The law of shifts: what counts is the angle between two tokens."""
    model, ids = tiny_model("selective"), tokens(2, 9)
    expected = logits_of(model, ids)
    for rotation in rotations_of(model):
        rotation.register_forward_hook(
            lambda module, arguments, angles: angles + torch.linspace(0, 3, angles.shape[-1])
        )
    assert_close(logits_of(model, ids), expected, torch.float64)


@pytest.mark.parametrize("gate", [False, True], ids=["plain", "gate"])
def test_angles_are_the_frequencies_times_running_sums_of_what_tokens_advance(gate):
    """ω_i Σ (φ_s − 1), term by term, up to whole turns."""
    config = tiny_config(rope_parameters={**SELECTIVE, "rank": 3, "kernel_size": 3, "gate": gate})
    rotation = TransXSSMSelectiveRotation(config, num_heads=2, num_pairs=4).double()
    for weight in rotation.parameters():
        torch.nn.init.normal_(weight)
    u, frequencies = (
        torch.randn(1, 7, config.hidden_size, dtype=torch.float64),
        torch.tensor([1.0, 0.3, 0.1, 0.02]).double(),
    )
    got = rotation(
        u,
        frequencies,
        Positions(ssd_rotary=None, attention_rotary=None, length_scale=None, padding_mask=None, seq_idx=None),
    )
    direction = u[0] / u[0].norm(dim=-1, keepdim=True)
    inputs = direction @ rotation.down_weight.T @ rotation.up_weight.T  # (t, heads · pairs)
    sums = torch.zeros(2, 4, dtype=torch.float64)
    for t in range(7):
        taps = [(rotation.conv_weight[:, 2 - age] * inputs[t - age]) for age in range(min(t, 2) + 1)]
        advance = torch.stack(taps).sum(0).view(2, 4)
        if rotation.gate_weight is not None:
            advance = 2 * torch.sigmoid(rotation.gate_weight @ direction[t])[:, None] * (1 + advance) - 1
        sums += advance
        turned = got[0, t] - frequencies * sums
        assert_close(
            torch.stack((turned.cos(), turned.sin())),
            torch.stack((torch.ones(2, 4), torch.zeros(2, 4))).double(),
            torch.float64,
        )


def test_tokens_that_all_advance_twice_as_far_stand_at_twice_their_positions():
    model, ids, index = tiny_model("selective"), tokens(2, 9), torch.arange(9)
    hooks = [
        rotation.register_forward_hook(lambda module, given, angles: torch.zeros_like(angles))
        for rotation in rotations_of(model)
    ]
    one_document = torch.zeros(2, 9, dtype=torch.long)  # positions with gaps would begin new ones
    expected = logits_of(model, ids, position_ids=2 * index[None], seq_idx=one_document)
    for hook in hooks:
        hook.remove()
    for rotation in rotations_of(model):
        rotation.register_forward_hook(
            lambda module, given, angles: (given[1] * index[:, None])[None, :, None].expand_as(angles)
        )
    assert_close(logits_of(model, ids), expected, torch.float64)


def test_with_half_the_pairs_the_others_keep_their_position():
    rotation = tiny_model("selective").model.layers[0].ssd.rotation
    config = tiny_config("selective")
    assert len(rotation.up_weight) == config.ssd_num_groups * config.ssd_state_size // 4


def test_a_training_step_compiles_once_for_all_lengths():
    """No graph break, whatever the documents, and no second compilation for another length."""
    model = tiny_model(
        "selective", torch.float32, num_hidden_layers=1, layer_types=["linear_attention"], sliding_window=None
    )
    frames = []

    def backend(graph, inputs):
        frames.append(graph)
        return graph

    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    for length, ends in ((12, 5), (20, 7), (16, 9)):
        ids, numbers = tokens(2, length), (torch.arange(length) >= ends).long().expand(2, -1)
        arguments = {"labels": ids, "seq_idx": numbers, "use_cache": False}
        loss = compiled(ids, **arguments).loss
        loss.backward()
        gradients = {name: weight.grad for name, weight in model.named_parameters()}
        model.zero_grad(set_to_none=True)
        expected = model(ids, **arguments).loss
        expected.backward()
        assert_close(loss, expected, torch.float32)
        for name, weight in model.named_parameters():
            assert_close(gradients[name], weight.grad, torch.float32, name, num_ops=4)
        model.zero_grad(set_to_none=True)
    assert len(frames) == 1


def test_tokens_cannot_be_taken_back():
    model = tiny_model("selective", layer_types=["full_attention"] * 3, sliding_window=None)
    cache = TransXSSMCache(config=model.config)
    logits_of(model, tokens(1, 5), past_key_values=cache)
    with pytest.raises(ValueError, match=r"crop.-1. would take back tokens"):
        cache.crop(-1)


def test_baselines_rotate_by_position():
    config = tiny_config(
        "selective", num_hidden_layers=3, hidden_size=64, ssd_head_dim=16, ssd_num_heads=4, num_attention_heads=4
    )
    for baseline in (llama_config, jamba_config):
        rope = baseline(config).rope_parameters
        assert rope["rope_type"] == "default"
        assert "rank" not in rope


def test_configuration_leaves_what_it_was_given_alone():
    given = dict(SELECTIVE)
    tiny_config(rope_parameters=given)
    assert given == SELECTIVE == {"rope_type": "selective"}


def test_configuration_names_every_value_and_reads_it_again(tmp_path):
    config = tiny_config(rope_parameters=SELECTIVE)
    assert config.rope_parameters == {
        "rope_type": "selective",
        "rope_theta": 10000.0,
        "rank": 16,
        "kernel_size": 4,
        "gate": False,
    }
    config.save_pretrained(tmp_path)
    assert TransXSSMConfig.from_pretrained(tmp_path).rope_parameters == config.rope_parameters


def test_nothing_is_selective_where_nothing_rotates():
    config = tiny_config(rope_parameters=SELECTIVE, ssd_position_embedding="none", attention_position_embedding="none")
    assert not rotations_of(TransXSSMForCausalLM(config))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rank": 0}, "rank must be a whole number of at least 1: got 0"),
        ({"kernel_size": 2.5}, "kernel_size must be a whole number of at least 1: got 2.5"),
        ({"gate": 1}, "gate must be true or false: got 1"),
        ({"factor": 2.0}, "may have rope_type, .*: got factor"),
    ],
)
def test_refuses_values_that_cannot_be(wrong, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(rope_parameters={**SELECTIVE, **wrong})


def test_pads_must_be_named_for_attention_too():
    model = tiny_model("selective", layer_types=["full_attention"] * 3, sliding_window=None)
    with pytest.raises(ValueError, match="selective rotations read pads"):
        model(tokens(1, 4), attention_mask=torch.ones(1, 1, 4, 4, dtype=torch.bool))
