"""Pads change nothing: left, right or on both sides, in logits, loss, gradients and what is decoded afterwards."""

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from tests.models.tiny import ALL_VARIANTS, FILLER, combinations, gradients_of, logits_of, pad_rows, tiny_model, tokens
from tests.tolerances import assert_close
from transxssm import TransXSSMCache

WIDTH = 11
LENGTHS = [11, 4, 7]
LEFT = {"left": [0, 7, 4], "right": [0, 0, 0], "both": [0, 3, 1]}


def rows() -> list[Tensor]:
    return [tokens(1, length, seed=length)[0] for length in LENGTHS]


# transformers' eager attention forms its softmax in float32.
@pytest.mark.parametrize(("variant", "side", "attention"), combinations(LEFT, ["sdpa", "eager"]))
def test_logits(variant, side, attention):
    dtype = {"sdpa": torch.float64, "eager": torch.float32}[attention]
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


@pytest.mark.parametrize(("variant", "side"), combinations(LEFT))
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


@pytest.mark.parametrize(("variant", "side", "pieces"), combinations(LEFT, [(1, 1, 1), (3,), (1, 2)]), ids=str)
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


# Pads beside and between tokens, more of them than a window or a kernel reaches, and fewer.
PATTERNS = torch.tensor(
    [
        [1, 1, 0, 1, 1, 0, 0, 0, 0, 1, 1, 1, 0, 1],
        [0, 0, 1, 1, 1, 1, 1, 0, 1, 1, 0, 0, 0, 0],
        [1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0],
        [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
    ]
)
LENGTH = PATTERNS.shape[1]


@pytest.mark.parametrize(
    ("variant", "pieces"), combinations([(LENGTH,), (5, 9), (9, 5), (7, 1, 6), (1,) * LENGTH]), ids=str
)
def test_pads_between_tokens(variant, pieces):
    """One call, two calls or a call for each column: each row is its tokens alone."""
    model = tiny_model(variant)
    ids = torch.where(PATTERNS.bool(), tokens(4, LENGTH), FILLER)
    cache = None if len(pieces) == 1 else TransXSSMCache(config=model.config)
    logits, end = [], 0
    for piece in pieces:
        start, end = end, end + piece
        call = {"attention_mask": PATTERNS[:, :end], "past_key_values": cache, "use_cache": cache is not None}
        logits.append(logits_of(model, ids[:, start:end], **call))
    for row, real, got in zip(ids, PATTERNS.bool(), torch.cat(logits, dim=1), strict=True):
        alone = logits_of(model, row[None, real], use_cache=False)[0]
        assert_close(got[real], alone, torch.float64, name=f"pattern {real.int().tolist()}")


@pytest.mark.parametrize("variant", ALL_VARIANTS)
def test_gradients_with_pads_between_tokens(variant):
    model = tiny_model(variant)
    ids, real = torch.where(PATTERNS.bool(), tokens(4, LENGTH), FILLER), PATTERNS.bool()
    model(ids, attention_mask=PATTERNS, use_cache=False).logits[real].square().sum().backward()
    padded = gradients_of(model)
    sum(
        model(row[None, seen], use_cache=False).logits.square().sum() for row, seen in zip(ids, real, strict=True)
    ).backward()
    for name, gradient in gradients_of(model).items():
        assert_close(padded[name], gradient, torch.float64, name=name)


def test_pads_between_tokens_compiled():
    """In one graph, where nobody can look for them."""
    model, ids = tiny_model("everything"), torch.where(PATTERNS.bool(), tokens(4, LENGTH), FILLER)
    expected = logits_of(model, ids, attention_mask=PATTERNS, use_cache=False)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    got = logits_of(compiled, ids, attention_mask=PATTERNS, use_cache=False)
    assert_close(got[PATTERNS.bool()], expected[PATTERNS.bool()], torch.float64)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_cache_whose_window_would_count_pads_is_refused(attention):
    model = tiny_model("sliding", attn_implementation=attention)
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=20)):
        logits_of(model, tokens(1, 5), attention_mask=torch.tensor([[1, 1, 1, 0, 0]]), past_key_values=cache)
        with pytest.raises(
            ValueError, match=r"pads between their tokens .* got (Dynamic|Static)Cache, expected TransXSSM"
        ):
            model(tokens(1, 1), attention_mask=torch.tensor([[1, 1, 1, 0, 0, 1]]), past_key_values=cache)


def test_generate_refuses_pads_between_tokens_in_a_static_cache():
    model, mask = tiny_model("sliding"), torch.tensor([[1, 0, 1, 1, 1]])
    with pytest.raises(ValueError, match=r"pads between their tokens .* got StaticCache"):
        model.generate(tokens(1, 5), attention_mask=mask, max_new_tokens=2, cache_implementation="static")
    model.generate(tokens(1, 5), attention_mask=mask, max_new_tokens=2)


def test_a_second_turn_padded_on_the_left_generates_as_without_pads():
    """Turns of a batch differ in length: pads come to stand between a row's turns, in every kind of layer."""
    model, settings = tiny_model("everything"), {"max_new_tokens": 6, "do_sample": False}
    turns, mask = pad_rows(rows(), LEFT["left"], WIDTH)
    more, more_mask = pad_rows([tokens(1, length, seed=9)[0] for length in (2, 6, 4)], [4, 0, 2], 6)
    cache = TransXSSMCache(config=model.config)
    logits_of(model, turns, attention_mask=mask, past_key_values=cache)
    ids, mask = torch.cat((turns, more), dim=1), torch.cat((mask, more_mask), dim=1)
    generated = model.generate(ids, attention_mask=mask, past_key_values=cache, **settings)[:, -6:]
    for row, real, got in zip(ids, mask.bool(), generated, strict=True):
        assert torch.equal(got, model.generate(row[None, real], **settings)[0, -6:])


@pytest.mark.parametrize("chunk", [1, 2, 4])
@pytest.mark.parametrize("variant", ["hybrid", "all_ssd_mamba2"])
def test_chunks_of_a_padded_prompt_in_a_static_cache(variant, chunk):
    """A chunk of one token may be a pad, of which transformers tells no state."""
    model, settings = tiny_model(variant), {"max_new_tokens": 4, "do_sample": False}
    ids, mask = pad_rows(rows(), LEFT["left"], WIDTH)
    got = model.generate(ids, attention_mask=mask, cache_implementation="static", prefill_chunk_size=chunk, **settings)
    assert torch.equal(got, model.generate(ids, attention_mask=mask, **settings))
