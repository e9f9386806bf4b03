"""Pads change nothing: left, right or on both sides, in logits, loss, gradients and what is decoded afterwards."""

import pytest
import torch
from torch import Tensor

from tests.models.tiny import ALL_VARIANTS, SLIDING, gradients_of, logits_of, pad_rows, tiny_model, tokens
from tests.tolerances import assert_close
from transxssm import TransXSSMCache

WIDTH = 11
LENGTHS = [11, 4, 7]
LEFT = {"left": [0, 7, 4], "right": [0, 0, 0], "both": [0, 3, 1]}


def rows() -> list[Tensor]:
    return [tokens(1, length, seed=length)[0] for length in LENGTHS]


# transformers' eager attention forms its softmax in float32.
@pytest.mark.parametrize(("attention", "dtype"), [("sdpa", torch.float64), ("eager", torch.float32)])
@pytest.mark.parametrize("side", LEFT)
@pytest.mark.parametrize("variant", ALL_VARIANTS)
def test_logits(variant, side, attention, dtype):
    model = tiny_model(variant, dtype=dtype)
    model.set_attn_implementation(attention)
    ids, mask = pad_rows(rows(), LEFT[side], WIDTH)
    padded = logits_of(model, ids, attention_mask=mask)
    for row, start, got in zip(rows(), LEFT[side], padded, strict=True):
        alone = logits_of(model, row[None])[0]
        assert_close(got[start : start + len(row)], alone, dtype, name=f"{len(row)} tokens after {start} pads")


@pytest.mark.parametrize("variant", ALL_VARIANTS)
def test_unmasked_pads_do_count(variant):
    """The control: without the mask they change the logits of the text after them."""
    model = tiny_model(variant)
    ids, _ = pad_rows(rows(), LEFT["left"], WIDTH)
    alone = logits_of(model, rows()[1][None])[0]
    assert (logits_of(model, ids)[1, -len(alone) :] - alone).abs().max() > 1e-3


@pytest.mark.parametrize("side", LEFT)
@pytest.mark.parametrize("variant", ALL_VARIANTS)
def test_loss_and_gradients(variant, side):
    model = tiny_model(variant)
    ids, mask = pad_rows(rows(), LEFT[side], WIDTH)
    # The label of a row's first token is predicted from a pad where one stands before it, so it does not count.
    is_first = mask.cumsum(-1) * mask == 1
    padded = model(ids, attention_mask=mask, labels=ids.masked_fill((mask == 0) | is_first, -100)).loss
    padded.backward()
    padded_gradients = gradients_of(model)

    num_labels = sum(length - 1 for length in LENGTHS)
    alone = sum(model(row[None], labels=row[None]).loss * (len(row) - 1) / num_labels for row in rows())
    alone.backward()
    assert_close(padded, alone, torch.float64)
    for name, gradient in gradients_of(model).items():
        assert_close(padded_gradients[name], gradient, torch.float64, name=name)


# A sliding window counts columns, in transformers, so that pads between text and continuation take places in it.
@pytest.mark.parametrize("pieces", [[1, 1, 1], [3], [1, 2]], ids=str)
@pytest.mark.parametrize("side", LEFT)
@pytest.mark.parametrize("variant", [name for name in ALL_VARIANTS if name not in SLIDING])
def test_decoding_after_a_padded_prompt(variant, side, pieces):
    model, more = tiny_model(variant), tokens(3, 3, seed=5)
    ids, mask = pad_rows(rows(), LEFT[side], WIDTH)
    cache = TransXSSMCache(config=model.config)
    logits_of(model, ids, attention_mask=mask, past_key_values=cache)
    continued = []
    for piece in more.split(pieces, dim=1):
        mask = torch.cat((mask, torch.ones_like(piece)), dim=1)
        continued.append(logits_of(model, piece, attention_mask=mask, past_key_values=cache))
    for row, new, got in zip(rows(), more, torch.cat(continued, dim=1), strict=True):
        alone = logits_of(model, torch.cat((row, new))[None])[0, -3:]
        assert_close(got, alone, torch.float64, name=f"{len(row)} tokens")


@pytest.mark.parametrize("variant", ALL_VARIANTS)
def test_a_row_of_pads_only_harms_no_other(variant):
    """Data loaders fill a last batch with empty rows: their logits mean nothing, but everything stays finite."""
    model = tiny_model(variant)
    ids, mask = pad_rows([tokens(1, 5)[0], tokens(1, 0)[0]], [0, 0], 5)
    model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss.backward()
    assert all(gradient.isfinite().all() for gradient in gradients_of(model).values())
    padded = logits_of(model, ids, attention_mask=mask)
    assert padded.isfinite().all()
    assert_close(padded[:1], logits_of(model, ids[:1]), torch.float64)
