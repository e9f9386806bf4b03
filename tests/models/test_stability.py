"""Principle 4 of the paper: long texts stay finite, because every state obeys a bound that only decays can give."""

import pytest
import torch
from torch import Tensor

from tests.models.tiny import VOCAB_SIZE, tokens
from transxssm import TransXSSMCache, TransXSSMConfig, TransXSSMForCausalLM
from transxssm.models import ssd_mixer

LENGTH = 16_384  # the paper's longest training length


@pytest.mark.slow
def test_five_steps_of_training_at_16k_tokens_stay_finite():
    torch.manual_seed(0)
    config = TransXSSMConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=8,  # one whole module: seven SSD layers, one attention layer
        num_attention_heads=1,
    )
    model = TransXSSMForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.999), weight_decay=0.01)
    ids = tokens(1, LENGTH)
    losses = []
    for step in range(5):
        loss = model(ids, labels=ids, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        assert loss.isfinite(), f"loss {loss} at step {step}"
        for name, parameter in model.named_parameters():
            assert parameter.grad.isfinite().all(), f"gradient of {name} at step {step}"
        optimizer.step()
        losses.append(loss.item())
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert losses[-1] < losses[0]


class ScanRecorder:
    """Stands in for `ssd_chunk_scan`: computes as it does, and carries each layer's bound u_t = e^{dt A} u_{t−1} + dt ‖x‖ ‖B‖ along."""

    def __init__(self, scan) -> None:
        self.scan = scan
        self.calls: list[tuple[Tensor, Tensor]] = []  # (decay, inflow) of every layer in the current piece, each (t, h)

    def __call__(self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, **options) -> tuple[Tensor, Tensor]:
        width_B = B.double().norm(dim=-1).repeat_interleave(x.shape[2] // B.shape[2], dim=-1)  # (b, t, h)
        dt, A = dt.double(), A.double()
        self.calls.append((torch.exp(dt * A)[0], (dt * x.double().norm(dim=-1) * width_B)[0]))
        return self.scan(x, dt, A, B, C, **options)

    def advance(self, bound: Tensor) -> Tensor:
        """The bound (layers, h) at the end of the piece."""
        decay, inflow = (torch.stack(each) for each in zip(*self.calls, strict=True))  # (layers, t, h)
        self.calls.clear()
        for t in range(decay.shape[1]):
            bound = decay[:, t] * bound + inflow[:, t]
        return bound


@pytest.mark.slow
def test_states_stay_below_their_bound_along_16k_tokens(monkeypatch):
    """‖S_t‖ ≤ u_t in every SSD layer and head of one module of `small`: rotations change no norm, and A < 0 lets nothing grow."""
    torch.manual_seed(0)
    config = TransXSSMConfig.from_preset("small", num_hidden_layers=8)
    model = TransXSSMForCausalLM(config).eval()
    recorder = ScanRecorder(ssd_mixer.ssd_chunk_scan)
    monkeypatch.setattr(ssd_mixer, "ssd_chunk_scan", recorder)
    num_layers = config.layer_types.count("linear_attention")
    ids = torch.randint(config.vocab_size, (1, LENGTH))
    cache = TransXSSMCache(config=config)
    bound = torch.zeros(num_layers, config.ssd_num_heads, dtype=torch.float64)
    norms = []
    for piece in ids.split(1024, dim=1):
        with torch.no_grad():
            model.model(piece, past_key_values=cache)
        bound = recorder.advance(bound)
        states = torch.stack([cache.layers[layer].recurrent_states[0][0] for layer in range(num_layers)])
        norms.append(states.double().norm(dim=(-2, -1)))  # (layers, h)
        assert (norms[-1] <= bound * (1 + 1e-4)).all()  # float32 sums
    assert (norms[-1] > 0).all()
    # The bound itself doesn't run away: after 16K tokens a state is as large as after the first thousand.
    assert (norms[-1] < 3 * norms[0]).all()
