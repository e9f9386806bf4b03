"""Documents packed into one row see nothing of each other: logits, losses and gradients are those of each document alone."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule
from transformers import DataCollatorWithFlattening, DynamicCache, Trainer, TrainingArguments

from tests.models.tiny import (
    ALL_VARIANTS,
    FILLER,
    VARIANTS,
    combinations,
    gradients_of,
    logits_of,
    one_of_each,
    tiny_model,
    tokens,
)
from tests.tolerances import assert_close
from transxssm import TransXSSMCache, TransXSSMForCausalLM

# Chunks are four tokens: boundaries lie on, beside and inside them; one document is a single token.
LENGTHS = [5, 1, 7, 3]
ROWS = [LENGTHS, [8, 8], [16]]  # a batch of differently packed rows


def documents(lengths: list[int], seed: int = 0) -> tuple[Tensor, ...]:
    """One (1, t_i) document for each length."""
    return tokens(1, sum(lengths), seed=seed).split(lengths, dim=1)


def document_numbers(lengths: list[int]) -> Tensor:
    """(1, t) seq_idx."""
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]


def restarting_positions(lengths: list[int]) -> Tensor:
    """(1, t) position_ids."""
    return torch.cat([torch.arange(length) for length in lengths])[None]


MARKS = {
    "seq_idx": lambda lengths: {"seq_idx": document_numbers(lengths)},
    "position_ids": lambda lengths: {"position_ids": restarting_positions(lengths)},
    "both": lambda lengths: {
        "seq_idx": document_numbers(lengths),
        "position_ids": restarting_positions(lengths),
    },
}


def one_row(model: TransXSSMForCausalLM, docs: tuple[Tensor, ...]) -> Tensor:
    """(1, t, v) logits of each document alone, one after the other."""
    return torch.cat([logits_of(model, doc, use_cache=False) for doc in docs], dim=1)


@pytest.mark.parametrize(("variant", "marks", "use_cache"), combinations(MARKS, [True, False]))
def test_logits_are_those_of_separate_documents(variant, marks, use_cache):
    model, docs = tiny_model(variant), documents(LENGTHS)
    packed = logits_of(model, torch.cat(docs, dim=1), use_cache=use_cache, **MARKS[marks](LENGTHS))
    assert_close(packed, one_row(model, docs), torch.float64)


@pytest.mark.parametrize("variant", ALL_VARIANTS)
def test_unmarked_documents_do_see_each_other(variant):
    """The control: without the marks the logits differ, so that the law above is about them."""
    model, docs = tiny_model(variant), documents(LENGTHS)
    assert (logits_of(model, torch.cat(docs, dim=1)) - one_row(model, docs)).abs().max() > 1e-3


@pytest.mark.parametrize("variant", ALL_VARIANTS)
def test_a_batch_of_differently_packed_rows(variant):
    model = tiny_model(variant)
    rows = [documents(lengths, seed=i) for i, lengths in enumerate(ROWS)]
    packed = logits_of(
        model,
        torch.cat([torch.cat(docs, dim=1) for docs in rows]),
        seq_idx=torch.cat([document_numbers(lengths) for lengths in ROWS]),
    )
    assert_close(packed, torch.cat([one_row(model, docs) for docs in rows]), torch.float64)


def without_first(ids: Tensor, lengths: list[int]) -> Tensor:
    """Labels in which each document's first token does not count."""
    return ids.masked_fill(restarting_positions(lengths) == 0, -100)


def mean_of_separate_losses(model: TransXSSMForCausalLM, docs: tuple[Tensor, ...]) -> Tensor:
    """The documents' own losses, weighted by their labels that count."""
    num_labels = sum(doc.shape[1] - 1 for doc in docs)
    return sum(
        model(doc, labels=doc, use_cache=False).loss * (doc.shape[1] - 1) / num_labels
        for doc in docs
        if doc.shape[1] > 1
    )


@pytest.mark.parametrize(("variant", "marks", "use_cache"), combinations(["seq_idx", "position_ids"], [True, False]))
class TestLoss:
    def test_is_the_mean_of_separate_losses(self, variant, marks, use_cache):
        model, docs = tiny_model(variant, dtype=torch.float32), documents(LENGTHS)
        row = torch.cat(docs, dim=1)
        labels = without_first(row, LENGTHS)
        with torch.no_grad():
            packed = model(row, labels=labels, use_cache=use_cache, **MARKS[marks](LENGTHS)).loss
            assert_close(packed, mean_of_separate_losses(model, docs), torch.float32)

    def test_has_the_gradients_of_separate_losses(self, variant, marks, use_cache):
        model, docs = tiny_model(variant), documents(LENGTHS)
        row = torch.cat(docs, dim=1)
        labels = without_first(row, LENGTHS)
        model(row, labels=labels, use_cache=use_cache, **MARKS[marks](LENGTHS)).loss.backward()
        packed = gradients_of(model)
        mean_of_separate_losses(model, docs).backward()
        for name, gradient in gradients_of(model).items():
            assert_close(packed[name], gradient, torch.float64, name=name)


@pytest.mark.parametrize(("variant", "marks", "pieces"), combinations(MARKS, [(1, 1, 1, 1), (4,), (1, 3)]), ids=str)
def test_decoding_goes_on_with_the_last_document_only(variant, marks, pieces):
    model, docs, more = tiny_model(variant), documents(LENGTHS), tokens(1, 4, seed=3)
    cache = TransXSSMCache(config=model.config)
    logits_of(model, torch.cat(docs, dim=1), past_key_values=cache, **MARKS[marks](LENGTHS))
    continued = [logits_of(model, piece, past_key_values=cache) for piece in more.split(pieces, dim=1)]
    alone = logits_of(model, torch.cat((docs[-1], more), dim=1))[:, -4:]
    assert_close(torch.cat(continued, dim=1), alone, torch.float64)


@pytest.mark.parametrize("variant", ALL_VARIANTS)
def test_a_packed_row_in_packed_pieces(variant):
    """A call's first token belongs to the cached document; each row of the batch is packed in its own way."""
    model = tiny_model(variant)
    rows = [documents(lengths, seed=i) for i, lengths in enumerate(ROWS)]
    ids = torch.cat([torch.cat(docs, dim=1) for docs in rows])
    seq_idx = torch.cat([document_numbers(lengths) for lengths in ROWS])
    cache = TransXSSMCache(config=model.config)
    ends = [0, 4, 11, 14, 15, 16]  # none of them at a boundary between documents
    pieces = [
        logits_of(model, ids[:, start:end], seq_idx=seq_idx[:, start:end], past_key_values=cache)
        for start, end in pairwise(ends)
    ]
    assert_close(torch.cat(pieces, dim=1), torch.cat([one_row(model, docs) for docs in rows]), torch.float64)


@pytest.mark.parametrize("variant", ALL_VARIANTS)
def test_generate_goes_on_with_the_last_document_only(variant):
    """Positions that restart are all that `generate` needs: it carries them on by itself."""
    model, docs = tiny_model(variant), documents(LENGTHS)
    arguments = {"max_new_tokens": 5, "do_sample": False}
    packed = model.generate(torch.cat(docs, dim=1), position_ids=restarting_positions(LENGTHS), **arguments)
    assert torch.equal(packed[:, -5:], model.generate(docs[-1], **arguments)[:, -5:])


# Pads carry what collators give them: the number of the neighbouring document, position 0.
SIDES = {"left": (3, 0), "right": (0, 3), "both": (2, 1)}


def padded_row(docs: tuple[Tensor, ...], marks: str, side: str) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Ids, attention mask and marks of one packed row between pads."""
    left, right = SIDES[side]
    row = F.pad(torch.cat(docs, dim=1), (left, right), value=FILLER)
    mask = F.pad(torch.ones(1, row.shape[1] - left - right, dtype=torch.long), (left, right))
    marked = MARKS[marks](LENGTHS)
    if "seq_idx" in marked:
        first, last = F.pad(marked["seq_idx"], (left, 0)), len(LENGTHS) - 1
        marked["seq_idx"] = F.pad(first, (0, right), value=last)
    if "position_ids" in marked:
        marked["position_ids"] = F.pad(marked["position_ids"], (left, right))
    return row, mask, marked


@pytest.mark.parametrize(("variant", "marks", "side"), combinations(MARKS, SIDES))
def test_a_padded_packed_row(variant, marks, side):
    model, docs = tiny_model(variant), documents(LENGTHS)
    row, mask, marked = padded_row(docs, marks, side)
    padded = logits_of(model, row, attention_mask=mask, **marked)
    assert_close(padded[:, mask[0].bool()], one_row(model, docs), torch.float64)


@pytest.mark.parametrize(("variant", "marks", "side"), combinations(["seq_idx", "position_ids"], SIDES))
def test_decoding_after_a_padded_packed_row(variant, marks, side):
    model, docs, more = tiny_model(variant), documents(LENGTHS), tokens(1, 3, seed=3)
    row, mask, marked = padded_row(docs, marks, side)
    cache = TransXSSMCache(config=model.config)
    logits_of(model, row, attention_mask=mask, past_key_values=cache, **marked)
    continued = []
    for piece in more.split([1, 2], dim=1):
        mask = F.pad(mask, (0, piece.shape[1]), value=1)
        continued.append(logits_of(model, piece, attention_mask=mask, past_key_values=cache))
    alone = logits_of(model, torch.cat((docs[-1], more), dim=1))[:, -3:]
    assert_close(torch.cat(continued, dim=1), alone, torch.float64)


@pytest.mark.parametrize("variant", ["hybrid", "sliding"])
def test_a_cache_that_cannot_tell_documents_apart_is_refused(variant):
    model = tiny_model(variant)
    with pytest.raises(ValueError, match=r"got DynamicCache, expected TransXSSMCache\(config=model.config\)"):
        model(
            torch.cat(documents(LENGTHS), dim=1),
            seq_idx=document_numbers(LENGTHS),
            past_key_values=DynamicCache(config=model.config),
        )


def test_flash_attention_is_refused():
    model = tiny_model()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=r"got attn_implementation='flash_attention_2', expected 'sdpa'"):
        model(torch.cat(documents(LENGTHS), dim=1), seq_idx=document_numbers(LENGTHS))


def test_refuses_documents_of_another_number_of_tokens():
    with pytest.raises(ValueError, match=r"seq_idx must number each of the 14 tokens' documents: got shape \(1, 13\)"):
        tiny_model()(torch.ones(1, 14, dtype=torch.long), seq_idx=torch.zeros(1, 13, dtype=torch.long))


def test_every_kind_of_layer_is_packed():
    """The tests above run on each kind of layer and each option that the model has."""
    kinds = {kind for options in VARIANTS.values() for kind in options.get("layer_types", [])}
    assert kinds == {"linear_attention", "full_attention", "sliding_attention"}


def test_generate_takes_the_documents_of_a_packed_prompt():
    """Generated tokens continue the last document alone, with a cache and without."""
    model, ids = tiny_model("hybrid").eval(), tokens(2, 20)
    seq_idx = torch.tensor([[0] * 9 + [1] * 11]).expand(2, -1)
    options = {"max_new_tokens": 6, "do_sample": False}
    alone = model.generate(ids[:, 9:], **options)[:, 11:]
    assert torch.equal(model.generate(ids, seq_idx=seq_idx, **options)[:, 20:], alone)
    assert torch.equal(model.generate(ids, seq_idx=seq_idx, use_cache=False, **options)[:, 20:], alone)


def compiled_whole(model: TransXSSMForCausalLM, graphs: list[GraphModule]) -> Callable[..., Any]:
    """The model compiled as one graph, which `graphs` keeps."""
    torch.compiler.reset()
    return torch.compile(model, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph)


@pytest.mark.parametrize(
    ("variant", "marks"), [("hybrid", "seq_idx"), ("everything", "position_ids"), ("all_ssd_mamba2", "seq_idx")]
)
@torch.no_grad()
def test_compiled_packed_rows(variant, marks):
    """In one graph, into which the numbers of documents go unseen: a row of one document takes the same."""
    model, docs, graphs = tiny_model(variant, **one_of_each(variant)), documents(LENGTHS), []
    compiled, row = compiled_whole(model, graphs), torch.cat(docs, dim=1)
    packed = compiled(row, use_cache=False, **MARKS[marks](LENGTHS)).logits
    assert_close(packed, one_row(model, docs), torch.float64)
    whole = compiled(row, use_cache=False, **MARKS[marks]([sum(LENGTHS)])).logits
    assert_close(whole, logits_of(model, row), torch.float64)
    assert len(graphs) == 1


@pytest.mark.parametrize(
    ("variant", "marks"), [("hybrid", "position_ids"), ("everything", "seq_idx"), ("all_ssd_mamba2", "position_ids")]
)
@torch.no_grad()
def test_compiled_packed_rows_between_pads(variant, marks):
    """In one graph, wherever the pads stand."""
    model, docs, graphs = tiny_model(variant, **one_of_each(variant)), documents(LENGTHS), []
    compiled, expected = compiled_whole(model, graphs), one_row(model, docs)
    for side in SIDES:
        row, mask, marked = padded_row(docs, marks, side)
        packed = compiled(row, attention_mask=mask, use_cache=False, **marked).logits
        assert_close(packed[:, mask[0].bool()], expected, torch.float64, name=f"pads: {side}")
    assert len(graphs) == 1


def test_positions_that_nobody_gives_need_no_documents_when_compiled():
    """A mask of all pairs would be slower than causal attention without one."""
    model, ids, attended = tiny_model("all_attention", **one_of_each("all_attention")), tokens(1, 9), []

    def spy(graph, inputs):
        attended.extend(node for node in graph.graph.nodes if "scaled_dot_product" in str(node.target))
        return graph

    torch.compiler.reset()
    with torch.no_grad():
        torch.compile(model, fullgraph=True, backend=spy)(ids, use_cache=False)
    assert len(attended) == 1
    assert all(node.kwargs["attn_mask"] is None and node.kwargs["is_causal"] for node in attended)


@pytest.mark.parametrize("positions", ["packed", "plain"])
def test_a_compiled_prompt_in_a_cache_that_cannot_tell_documents_apart(positions):
    model, ids = tiny_model(**one_of_each("hybrid")), torch.cat(documents(LENGTHS), dim=1)
    cache, compiled = DynamicCache(config=model.config), torch.compile(model, backend="eager")
    torch.compiler.reset()
    with torch.no_grad():
        if positions == "plain":
            got = compiled(ids, position_ids=torch.arange(ids.shape[1])[None], past_key_values=cache).logits
            assert_close(got, logits_of(model, ids), torch.float64)
        else:
            with pytest.raises(RuntimeError, match="packed rows need a cache that remembers"):
                compiled(ids, position_ids=restarting_positions(LENGTHS), past_key_values=cache)


@pytest.mark.parametrize("marks", ["seq_idx", "position_ids"])
@pytest.mark.parametrize("variant", ["hybrid", "sliding", "all_attention"])
def test_generate_refuses_packed_rows_in_a_static_cache(variant, marks):
    model, row = tiny_model(variant), torch.cat(documents(LENGTHS), dim=1)
    options = {"max_new_tokens": 3, "do_sample": False, "cache_implementation": "static"}
    with pytest.raises(ValueError, match=r"packed rows need a cache that remembers .* got StaticCache"):
        model.generate(row, **MARKS[marks](LENGTHS), **options)


@pytest.mark.parametrize(("variant", "counted"), combinations([True, False]))
def test_documents_with_pads_between_them(variant, counted):
    """Positions fall back behind the pads, whether those were counted or not."""
    model, docs = tiny_model(variant), documents([6, 8])
    pads = torch.full((1, 2), FILLER)
    row = torch.cat((docs[0], pads, docs[1]), dim=1)
    between = [6, 7] if counted else [0, 0]
    positions = torch.tensor([[*range(6), *between, *range(8)]])
    mask = torch.tensor([[1] * 6 + [0] * 2 + [1] * 8])
    got = logits_of(model, row, attention_mask=mask, position_ids=positions)[:, mask[0].bool()]
    assert_close(got, one_row(model, docs), torch.float64)


def losses_of_trainer(folder: Path, *, return_seq_idx: bool, **arguments) -> list[float]:
    """Logged losses of two steps, which differ in length, on flattened documents, as transformers' own collator packs them."""
    documents = [{"input_ids": tokens(1, length, seed=length)[0].tolist()} for length in (5, 9, 4, 12, 7, 6)]
    trainer = Trainer(
        model=tiny_model("mamba2", dtype=torch.float32, **one_of_each("mamba2")),
        args=TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=2,
            max_steps=2,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            save_strategy="no",
            disable_tqdm=True,
            **arguments,
        ),
        train_dataset=documents,
        data_collator=DataCollatorWithFlattening(return_seq_idx=return_seq_idx),
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_trainer_compiles_flattened_documents(tmp_path):
    """Where positions alone say where documents begin, losses are those of documents with numbers, compiled or not."""
    numbered = losses_of_trainer(tmp_path, return_seq_idx=True)
    torch.compiler.reset()
    options = {"torch_compile": True, "torch_compile_backend": "eager"}
    assert losses_of_trainer(tmp_path, return_seq_idx=False, **options) == pytest.approx(numbered, rel=1e-4)
    assert losses_of_trainer(tmp_path, return_seq_idx=False) == pytest.approx(numbered, rel=1e-4)
