"""The SSD layer is its projections around the recurrence of Appendix A, with every option in its place."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models.tiny import tiny_config, tokens
from tests.tolerances import assert_close
from transxssm.models import TransXSSMForCausalLM, ssd_mixer
from transxssm.models.linear import at_least_float32
from transxssm.models.positions import Positions
from transxssm.models.ssd_mixer import TransXSSMSSDMixer
from transxssm.ops import rotary_cos_sin, rotary_frequencies
from transxssm.ops.ssd import ssd_chunk_scan, ssd_recurrence

OPTIONS = [
    {},
    {"ssd_skip": True},
    {"ssd_conv_kernel_size": 3},
    {"ssd_num_groups": 1},
    {"ssd_norm_BC": True},
    {"ssd_bias_BC": True},
    {"ssd_output_gate": True},
    {"ssd_output_gate": True, "ssd_skip": True, "ssd_norm_BC": True, "ssd_bias_BC": True, "ssd_conv_kernel_size": 3},
]


def rms_normed(x: Tensor, norm: nn.Module) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equals_its_formula(options):
    torch.manual_seed(0)
    config = tiny_config("hybrid", **options)
    mixer = TransXSSMSSDMixer(config)
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    mixer = mixer.double()
    u = torch.randn(2, 9, config.hidden_size, dtype=torch.float64)
    rotary = rotary_cos_sin(torch.arange(9)[None], rotary_frequencies(config.ssd_state_size), torch.float64)
    scale = 1 + torch.rand(1, 9, dtype=torch.float64)  # of C alone
    positions = Positions(ssd_rotary=rotary, attention_rotary=None, length_scale=scale, padding_mask=None, seq_idx=None)

    parts = [u @ projection.weight.T for projection in (mixer.x_proj, mixer.B_proj, mixer.C_proj)]
    if mixer.conv_weight is not None:
        history = F.pad(torch.cat(parts, dim=-1).transpose(1, 2), (2, 0))
        convolved = F.conv1d(history, mixer.conv_weight[:, None], groups=history.shape[1]).transpose(1, 2)
        parts = list(F.silu(convolved).split([part.shape[-1] for part in parts], dim=-1))
    x = parts[0].unflatten(-1, (config.ssd_num_heads, -1))
    B, C = (part.unflatten(-1, (config.ssd_num_groups, -1)) for part in parts[1:])
    if config.ssd_norm_BC:
        B, C = rms_normed(B, mixer.B_norm), rms_normed(C, mixer.C_norm)
    if config.ssd_bias_BC:
        B, C = B + mixer.B_bias.unflatten(0, B.shape[2:]), C + mixer.C_bias.unflatten(0, C.shape[2:])
    dt = F.softplus(u @ mixer.dt_proj.weight.T + mixer.dt_bias)
    y, _ = ssd_recurrence(x, dt, -mixer.A_log.exp(), B, C * scale[..., None, None], rotary=rotary, D=mixer.D)
    y = y.flatten(2)
    if config.ssd_output_gate:
        y = rms_normed(y * F.silu(u @ mixer.z_proj.weight.T), mixer.norm)

    assert_close(mixer(u, positions), y @ mixer.out_proj.weight.T, torch.float64)


def test_the_scan_of_a_model_in_half_precision_in_float32(monkeypatch):
    torch.manual_seed(0)
    operands = []

    def scan(x, dt, A, B, C, **options):
        operands.append({x.dtype, B.dtype, C.dtype})
        return ssd_chunk_scan(x, dt, A, B, C, **options)

    monkeypatch.setattr(ssd_mixer, "ssd_chunk_scan", scan)
    model = TransXSSMForCausalLM(tiny_config("hybrid", ssd_scan_in_fp32=True)).bfloat16()
    model(tokens(1, 9)).logits.sum().backward()
    assert operands
    assert all(dtypes == {torch.float32} for dtypes in operands)
    assert model(tokens(1, 9)).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("scan_in_fp32", [False, True])
def test_the_output_projection_gets_what_autocast_gave(scan_in_fp32):
    """y in float32 behind the scan would be written and converted for nothing."""
    model = TransXSSMForCausalLM(tiny_config("gated", ssd_scan_in_fp32=scan_in_fp32))
    seen = []
    for layer in model.model.layers:
        if hasattr(layer, "ssd"):
            layer.ssd.out_proj.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(tokens(1, 9))
    assert set(seen) == {torch.bfloat16}


def test_precision_is_raised_and_never_lowered():
    assert at_least_float32(torch.zeros(1, dtype=torch.bfloat16)).dtype == torch.float32
    assert at_least_float32(torch.zeros(1, dtype=torch.float64)).dtype == torch.float64


def test_rounded_decays_are_said_once_and_computed_with_in_float32(caplog, monkeypatch):
    """FSDP's mixed precision may cast what a module returns."""
    ssd_mixer.warn_of_rounded_decays.cache_clear()
    seen, scan = [], ssd_mixer.ssd_chunk_scan
    monkeypatch.setattr(
        ssd_mixer,
        "ssd_chunk_scan",
        lambda x, dt, A, *args, **options: seen.append((dt, A, options["D"])) or scan(x, dt, A, *args, **options),
    )
    model = TransXSSMForCausalLM(tiny_config("mamba2"))
    for layer in model.model.layers:
        if layer.is_ssd:
            layer.ssd.dynamics.register_forward_hook(lambda *args: tuple(tensor.bfloat16() for tensor in args[-1]))
    model(tokens(1, 5))
    assert [record.message.split(" were ")[0] for record in caplog.records] == ["time steps and decays of SSD layers"]
    assert len(seen) == 2
    assert {tensor.dtype for tensors in seen for tensor in tensors} == {torch.float32}
