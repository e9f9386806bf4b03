"""Scores of tokens are those of all logits, whatever the model does to them."""

import logging

import pytest
import torch
import torch.nn.functional as F

from tests.evaluation.models import POSITIONS, VOCAB_SIZE, random_model
from tests.models.tiny import tiny_model, tokens
from transxssm.data import RecallTask
from transxssm.evaluation import TokenScorer, scoring


@torch.no_grad()
def by_all_logits(model, input_ids, targets):
    log_probs = F.log_softmax(model(input_ids=input_ids).logits.double(), dim=-1)
    counted = targets != -100
    losses = -log_probs[counted].gather(1, targets[counted][:, None])[:, 0]
    return losses, log_probs[counted].argmax(1) == targets[counted]


@pytest.mark.parametrize("kind", ["transxssm", "llama", "gemma2", "gpt2"])
def test_blocks_give_the_scores_of_all_logits(kind, monkeypatch):
    monkeypatch.setattr(scoring, "BLOCK_LOGITS", 7 * VOCAB_SIZE)  # 7 tokens at once
    model = random_model(kind)
    input_ids, targets = tokens(3, 20), tokens(3, 20, seed=1)
    targets[:, ::3] = -100
    # Some of the likeliest tokens among them, so that there are hits.
    targets[0] = model(input_ids=input_ids).logits[0].argmax(-1)
    scores = TokenScorer(model)(input_ids, targets)
    losses, hits = by_all_logits(model, input_ids, targets)
    assert hits.sum() >= 20
    assert scores.losses.dtype == torch.float32
    assert torch.allclose(scores.losses.double(), losses, atol=1e-5)
    assert torch.equal(scores.hits, hits)


def test_a_model_with_more_than_a_head_is_found_and_said(caplog):
    with caplog.at_level(logging.WARNING, logger="transxssm"):
        TokenScorer(random_model("llama"))
        assert caplog.records == []
        TokenScorer(random_model("gemma2"))
    assert "Gemma2ForCausalLM: more than a linear head" in caplog.text


def test_targets_are_shift_labels():
    """What is trained on with `shift_labels` is what is measured."""
    model = tiny_model(dtype=torch.float64)
    batch = RecallTask(32, 4, vocab_size=VOCAB_SIZE).sequences(seed=0, first=0, count=3)
    ids, targets = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.targets)
    loss = model(input_ids=ids, shift_labels=targets).loss
    scores = TokenScorer(model)(ids, targets)
    assert scores.losses.dtype == torch.float64
    assert torch.allclose(scores.losses.mean(), loss)


def test_ids_outside_the_vocabulary(caplog):
    scorer = TokenScorer(random_model("llama"))
    inside, outside = tokens(1, 4), torch.tensor([[1, 2, VOCAB_SIZE, 3]])
    for arguments in ((inside, outside), (outside, inside)):
        with pytest.raises(ValueError, match=f"0 … {VOCAB_SIZE - 1}: got {VOCAB_SIZE}"):
            scorer(*arguments)


def test_more_tokens_than_a_model_has_positions():
    scorer = TokenScorer(random_model("gpt2"))
    with pytest.raises(ValueError, match=f"cannot read {POSITIONS + 1} tokens"):
        scorer(tokens(1, POSITIONS + 1), tokens(1, POSITIONS + 1))
