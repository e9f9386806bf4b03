"""Unified RoPE's promise: only distances count. And the default positions, where a caller gives none."""

import pytest
import torch
from torch import Tensor

from tests.models.tiny import ALL_VARIANTS, logits_of, pad_rows, tiny_model, tokens
from tests.tolerances import assert_close, relative_error
from transxssm import TransXSSMCache
from transxssm.models import modeling_transxssm
from transxssm.models.positions import default_positions, documents_from_positions

SHIFT = 100_000
LENGTH = 48
# Log-length scaling reads absolute positions, on purpose (Appendix A, end).
SHIFTABLE = [name for name in ALL_VARIANTS if name not in ("length_scaling", "everything")]


def shift_error(variant: str) -> float:
    """How far a model's float32 logits at positions 100 000 … are from those at 0 …, relative to their norm."""
    model, ids = tiny_model(variant, dtype=torch.float32), tokens(2, LENGTH)
    positions = torch.arange(LENGTH)[None]
    return relative_error(
        logits_of(model, ids, position_ids=positions + SHIFT), logits_of(model, ids, position_ids=positions)
    )


@pytest.mark.parametrize("variant", SHIFTABLE)
def test_shifting_all_positions_changes_nothing(variant):
    assert shift_error(variant) <= 1e-4


@pytest.mark.parametrize("variant", SHIFTABLE)
def test_shifting_all_positions_changes_nothing_with_a_cache(variant):
    model, ids = tiny_model(variant, dtype=torch.float32), tokens(2, LENGTH)
    positions = torch.arange(SHIFT, SHIFT + LENGTH)[None]
    cache = TransXSSMCache(config=model.config)
    pieces = [
        logits_of(model, ids[:, piece], position_ids=positions[:, piece], past_key_values=cache)
        for piece in (slice(0, 40), *(slice(t, t + 1) for t in range(40, LENGTH)))
    ]
    assert relative_error(torch.cat(pieces, dim=1), logits_of(model, ids)) <= 1e-4


@pytest.mark.parametrize("variant", ["all_ssd", "all_attention", "hybrid"])
def test_the_shift_test_fails_on_angles_formed_in_float32(variant, monkeypatch):
    """A control: the common way of forming angles is off by 1e-2 rad there, and the law above sees it."""

    def rotary_in_float32(position_ids: Tensor, frequencies: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        angles = position_ids[..., None].float() * frequencies.float()
        return angles.cos(), angles.sin()

    monkeypatch.setattr(modeling_transxssm, "rotary_cos_sin", rotary_in_float32)
    assert shift_error(variant) > 1e-4


@pytest.mark.parametrize("variant", ["all_ssd", "all_attention"])
def test_distances_do_count(variant):
    """A control: both kinds of layer notice a gap of one position in the middle, so shifting isn't free for want of rotation."""
    model, ids = tiny_model(variant, dtype=torch.float32), tokens(2, LENGTH)
    positions = torch.arange(LENGTH)[None]
    gap = positions + (positions >= LENGTH // 2)
    one_document = torch.zeros_like(ids)
    shifted = logits_of(model, ids, position_ids=gap, seq_idx=one_document)
    assert relative_error(shifted, logits_of(model, ids)) > 1e-3


def test_an_unrotated_recurrence_reads_no_positions():
    model, ids = tiny_model("all_ssd", ssd_position_embedding="none"), tokens(2, LENGTH)
    spread = 3 * torch.arange(LENGTH)[None]
    logits = logits_of(model, ids, position_ids=spread, seq_idx=torch.zeros_like(ids))
    assert torch.equal(logits, logits_of(model, ids))


@pytest.mark.parametrize("variant", ["length_scaling", "everything"])
def test_log_length_scaling_reads_absolute_positions(variant):
    assert shift_error(variant) > 1e-3


def test_log_length_scaling_starts_at_its_base():
    """max(1, log_base n): up to `base` tokens the model is the unscaled one, the next token is the first that differs."""
    base, ids = 16, tokens(2, 24)
    scaled = logits_of(tiny_model(length_scaling_base=base), ids)
    plain = logits_of(tiny_model(), ids)
    assert torch.equal(scaled[:, :base], plain[:, :base])
    assert ((scaled - plain)[:, base:].abs().amax(-1) > 1e-6).all()


@pytest.mark.parametrize("variant", ALL_VARIANTS)
def test_default_positions_count_the_tokens_that_are_no_pads(variant):
    model = tiny_model(variant)
    ids, mask = pad_rows([tokens(1, 9)[0], tokens(1, 5)[0]], [0, 2], 9)
    counted = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 8], [0, 0, 0, 1, 2, 3, 4, 0, 0]])
    given = logits_of(model, ids, attention_mask=mask, position_ids=counted)
    default = logits_of(model, ids, attention_mask=mask)
    assert_close(default[mask.bool()], given[mask.bool()], torch.float64)


EMBEDS = torch.empty(2, 6, 0)  # only its shape is read


def test_default_positions_go_on_after_cached_tokens():
    positions = default_positions(EMBEDS, past_length=4, padding=None, seq_idx=None, start=None)
    assert positions.tolist() == [[4, 5, 6, 7, 8, 9]]


def test_default_positions_restart_with_each_document_and_go_on_with_the_cached_one():
    seq_idx = torch.tensor([[0, 0, 0, 1, 1, 1], [5, 6, 6, 7, 7, 7]])
    positions = default_positions(EMBEDS, past_length=4, padding=None, seq_idx=seq_idx, start=torch.tensor([1, 4]))
    assert positions.tolist() == [[3, 4, 5, 0, 1, 2], [0, 0, 1, 0, 1, 2]]


@pytest.mark.parametrize(
    ("positions", "documents"),
    [
        ([[0, 1, 2, 0, 1]], [[0, 0, 0, 1, 1]]),
        ([[7, 8, 0, 0, 1]], [[0, 0, 1, 2, 2]]),
        ([[0, 1, 2, 3], [0, 1, 0, 1]], [[0, 0, 0, 0], [0, 0, 1, 1]]),
        ([[3, 4, 5]], None),
        ([[0]], None),
    ],
)
def test_documents_are_read_off_restarting_positions(positions, documents):
    got = documents_from_positions(torch.tensor(positions), padding=None)
    assert (got if got is None else got.tolist()) == documents


def test_positions_of_pads_start_no_document():
    """`generate` and collators write what they like at pads, most often zeros."""
    positions = torch.tensor([[0, 0, 0, 1, 2, 0, 0]])
    padding = torch.tensor([[0, 0, 1, 1, 1, 0, 0]])
    assert documents_from_positions(positions, padding) is None


@pytest.mark.parametrize(
    ("positions", "padding", "documents"),
    [
        ([0, 1, 2, 0, 0, 1], [1, 1, 1, 0, 1, 1], [0, 0, 0, 0, 1, 1]),  # falls back behind a pad
        ([0, 1, 2, 3, 4, 5], [1, 1, 1, 0, 1, 1], None),  # pads are counted
        ([0, 1, 2, 2, 3, 4], [1, 1, 1, 0, 1, 1], None),  # pads are left out
        ([5, 5, 0, 1, 2, 3], [0, 0, 1, 1, 1, 1], None),  # nothing stands before
    ],
)
def test_documents_behind_pads(positions, padding, documents):
    got = documents_from_positions(torch.tensor([positions]), torch.tensor([padding]))
    assert (got if got is None else got.tolist()) == (None if documents is None else [documents])
