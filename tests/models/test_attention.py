"""The attention layer is its formula (Eq. 4 and 6), with every option in its place."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from tests.models.tiny import tiny_config
from tests.tolerances import assert_close
from transxssm import TransXSSMForCausalLM
from transxssm.models.attention import TransXSSMAttention, without_cudnn_attention
from transxssm.models.positions import Positions
from transxssm.ops import apply_rotary, rotary_cos_sin, rotary_frequencies, single_query_attention
from transxssm.ops.csrc import compiled_library

LENGTH = 9


@pytest.mark.parametrize("rotates", [True, False], ids=["rope", "nope"])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("qk_norm", [True, False])
def test_equals_its_formula(qk_norm, gated, rotates):
    torch.manual_seed(0)
    # SDPA: the softmax of eager attention is float32
    config = tiny_config("all_attention", qk_norm=qk_norm, attention_output_gate=gated, attn_implementation="sdpa")
    layer = TransXSSMAttention(config, layer_idx=0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    layer = layer.double()
    u = torch.randn(2, LENGTH, config.hidden_size, dtype=torch.float64)
    rotary = None
    if rotates:
        rotary = rotary_cos_sin(torch.arange(LENGTH)[None], rotary_frequencies(config.head_dim), torch.float64)
    scale = 1 + torch.rand(1, LENGTH, dtype=torch.float64)  # of Q alone
    positions = Positions(ssd_rotary=None, attention_rotary=rotary, length_scale=scale, padding_mask=None, seq_idx=None)

    q, k, v = (
        (u @ projection.weight.T).unflatten(-1, (-1, config.head_dim))
        for projection in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    if qk_norm:
        q, k = (
            F.rms_norm(heads, heads.shape[-1:], norm.weight, config.rms_norm_eps)
            for heads, norm in ((q, layer.q_norm), (k, layer.k_norm))
        )
    q = q * scale[..., None, None]
    if rotary is not None:
        q, k = apply_rotary(q, *rotary), apply_rotary(k, *rotary)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * config.head_dim**-0.5
    mask = torch.full((LENGTH, LENGTH), -torch.inf, dtype=torch.float64).triu(1)
    heads = torch.einsum("bhij,bjhd->bihd", (scores + mask).softmax(-1), v).flatten(2)
    if gated:
        heads = heads * torch.sigmoid(u @ layer.g_proj.weight.T)
    expected = heads @ layer.o_proj.weight.T

    output, _ = layer(u, positions, mask[None, None])
    assert_close(output, expected, torch.float64)


@pytest.mark.parametrize("variant", ["hybrid", "grouped_queries", "sliding"])
def test_a_token_decoded_on_a_cpu(variant, monkeypatch):
    """It takes the attention of its own, which agrees with SDPA to the rounding, pads included; eager does not."""
    attended = []

    def spy(q, k, v, mask, *, scaling):
        expected = F.scaled_dot_product_attention(
            *(t.double() for t in (q, k, v)), mask, scale=scaling, enable_gqa=True
        )
        output = single_query_attention(q, k, v, mask, scaling=scaling)
        assert_close(output, expected, q.dtype)
        attended.append(k.shape[2])
        return output

    monkeypatch.setattr("transxssm.models.attention.single_query_attention", spy)
    tokens = torch.randint(1, 90, (2, 7))
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0

    def decode(attention, dtype, mask):
        torch.manual_seed(0)
        model = TransXSSMForCausalLM(tiny_config(variant, attn_implementation=attention)).to(dtype).eval()
        with torch.no_grad():
            seen = None if mask is None else mask[:, :-1]
            cache = model(tokens[:, :-1], attention_mask=seen, use_cache=True).past_key_values
            model(tokens[:, -1:], attention_mask=mask, past_key_values=cache)

    num_layers = sum(kind != "linear_attention" for kind in tiny_config(variant).layer_types)
    for pads in (mask, None):
        for dtype in (torch.bfloat16, torch.float32) if compiled_library() else (torch.bfloat16,):
            decode("sdpa", dtype, pads)
            assert len(attended) == num_layers
            attended.clear()
        decode("eager", torch.bfloat16, pads)
        assert not attended


def test_a_mask_for_each_head_is_kept_in_half_precision():
    """The attention of its own knows only masks that are the same for all heads."""
    model = TransXSSMForCausalLM(tiny_config("all_attention", attn_implementation="sdpa")).bfloat16().eval()
    ids = torch.randint(1, 90, (2, 8))
    seen = torch.rand(2, model.config.num_attention_heads, 1, 8) < 0.5
    seen[..., -1] = True
    logits = []
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        mask = seen if implementation == "sdpa" else torch.zeros(seen.shape).masked_fill(~seen, -1e9).bfloat16()
        with torch.no_grad():
            cache = model(ids[:, :-1], use_cache=True).past_key_values
            logits.append(model(ids[:, -1:], attention_mask=mask, past_key_values=cache).logits)
    assert_close(*logits, torch.bfloat16, num_ops=4)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_eager_attention_gives_its_weights_for_one_token_too(attention):
    layer = (
        TransXSSMAttention(tiny_config("all_attention", attn_implementation=attention), layer_idx=0).bfloat16().eval()
    )
    positions = Positions(ssd_rotary=None, attention_rotary=None, length_scale=None, padding_mask=None, seq_idx=None)
    with torch.no_grad():
        _, weights = layer(torch.randn(1, 1, layer.config.hidden_size, dtype=torch.bfloat16), positions, None)
    assert (weights is not None) == (attention == "eager")


def backends() -> dict[str, bool]:
    cuda = torch.backends.cuda
    return {
        "flash": cuda.flash_sdp_enabled(),
        "efficient": cuda.mem_efficient_sdp_enabled(),
        "math": cuda.math_sdp_enabled(),
        "cudnn": cuda.cudnn_sdp_enabled(),
    }


@pytest.mark.parametrize(
    ("allowed", "cudnn_inside"),
    [
        ([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], False),
        ([SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH], False),
        ([SDPBackend.MATH], False),
        ([SDPBackend.CUDNN_ATTENTION], True),
    ],
)
def test_cudnn_is_left_out_where_another_backend_is_allowed(allowed, cudnn_inside):
    with sdpa_kernel(allowed):
        before = backends()
        with without_cudnn_attention():
            assert backends() == before | {"cudnn": cudnn_inside}
        assert backends() == before


def test_a_token_decoded_on_a_gpu_does_without_cudnn(device):
    """The prompt may take it: one plan for many tokens."""
    if device.type != "cuda":
        pytest.skip("torch chooses between backends on a GPU only")
    model = TransXSSMForCausalLM(tiny_config("all_attention", attn_implementation="sdpa")).to(device, torch.bfloat16)
    tokens = torch.randint(1, 90, (2, 7), device=device)
    with torch.no_grad():
        cache = model.eval()(tokens, use_cache=True).past_key_values
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            model(tokens[:, :1], past_key_values=cache)
    names = {event.key for event in profiled.key_averages()}
    assert "aten::scaled_dot_product_attention" in names
    assert "aten::_cudnn_attention_forward" not in names
