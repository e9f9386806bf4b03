"""Perplexity: every token once, with the context that a window gives, in nats and in bits for exact bytes."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from tests.apple_gpu import OnAppleGPU
from tests.evaluation.models import random_model
from tests.serving.checkpoints import byte_tokenizer
from tests.training.conftest import WORDS
from transxssm.data import Corpus, DataArguments, build_tokenizer
from transxssm.evaluation import TokenScorer, perplexity_plans, perplexity_table, plot_perplexity, select_documents
from transxssm.evaluation.perplexity import (
    TokenizedDocument,
    longest_document,
    mean_and_error,
    measure_length,
    plan_windows,
    position_bins,
    tokenize,
)
from transxssm.evaluation.scoring import TokenScores


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    texts = [" ".join(WORDS) + " é🙂" for _ in range(5)]
    corpus = Corpus(train=Dataset.from_dict({"text": texts}), held_out=None, identity="words")
    cache = str(tmp_path_factory.mktemp("cache"))
    return build_tokenizer(DataArguments(tokenizer="bpe", vocab_size=320, cache_dir=cache), corpus)


def document_of(*ids: int) -> TokenizedDocument:
    return TokenizedDocument(np.array(ids), np.arange(len(ids)))


def random_documents(*lengths: int) -> list[TokenizedDocument]:
    generator = np.random.default_rng(0)
    return [document_of(*generator.integers(1, 97, length)) for length in lengths]


def measure(scorer, documents, length, stride, batch_tokens=64):
    return measure_length(scorer, documents, length, stride, batch_tokens, lambda steps: None)


@given(num_tokens=st.integers(2, 60), length=st.integers(2, 20), data=st.data())
def test_windows_score_every_token_but_the_first_once(num_tokens, length, data):
    stride = data.draw(st.integers(1, length - 1))
    windows = plan_windows(num_tokens, length, stride)
    scored = [token for window in windows for token in range(window.first_scored, window.end)]
    assert scored == list(range(1, num_tokens))
    for window in windows:
        assert 0 <= window.begin < window.first_scored < window.end <= num_tokens
        assert window.end - window.begin == min(length, num_tokens)
    for window in windows[1:]:
        # So many tokens at least stand before each scored one; with stride = length − 1 it is one.
        assert window.first_scored - window.begin >= length - stride


@pytest.mark.parametrize(("length", "stride"), [(1, 1), (8, 8), (8, 0)])
def test_windows_that_would_skip_tokens_are_refused(length, stride):
    with pytest.raises(ValueError, match="got"):
        plan_windows(20, length, stride)


@torch.no_grad()
def nats_by_hand(model, ids: np.ndarray, length: int, stride: int) -> list[float]:
    """Each token's loss from a forward pass over nothing but its own window's tokens before it."""
    losses, end = [], min(length, len(ids))
    for token in range(1, len(ids)):
        if token >= end:
            end = min(end + stride, len(ids))
        context = torch.from_numpy(ids[max(0, end - length) : token])[None]
        logits = model(input_ids=context).logits[0, -1].double()
        losses.append(-F.log_softmax(logits, dim=-1)[ids[token]].item())
    return losses


@pytest.mark.parametrize("kind", ["transxssm", "llama", "gemma2"])
@pytest.mark.parametrize(("length", "stride"), [(8, 4), (8, 7), (8, 3), (50, 25)])
def test_the_figures_are_the_sum_by_hand(kind, length, stride):
    model, documents = random_model(kind), random_documents(29, 8, 3)
    cell = measure(TokenScorer(model), documents, length, stride)
    losses = [loss for document in documents for loss in nats_by_hand(model, document.input_ids, length, stride)]
    num_bytes = sum(int(document.num_bytes[1:].sum()) for document in documents)
    assert (cell["tokens"], cell["bytes"], cell["documents"]) == (37, num_bytes, 3)
    assert cell["nats_per_token"] == pytest.approx(sum(losses) / 37, abs=1e-5)
    assert cell["perplexity"] == pytest.approx(math.exp(sum(losses) / 37), rel=1e-4)
    assert cell["bits_per_byte"] == pytest.approx(sum(losses) / math.log(2) / num_bytes, rel=1e-5)


def test_the_loss_at_a_position_is_the_mean_over_windows():
    """Windows that share one token: every prediction is made once, so positions average over all of them."""
    model, documents = random_model("transxssm"), random_documents(30, 16)
    cell = measure(TokenScorer(model), documents, 8, 7)
    by_position: dict[int, list[float]] = {}
    for document in documents:
        losses = nats_by_hand(model, document.input_ids, 8, 7)
        for window in plan_windows(len(document.input_ids), 8, 7):
            for token in range(window.begin + 1, window.end):
                context = document.input_ids[window.begin : token + 1]
                loss = losses[token - 1] if token >= window.first_scored else nats_by_hand(model, context, 99, 1)[-1]
                by_position.setdefault(token - window.begin, []).append(loss)
    assert sum(bin_["tokens"] for bin_ in cell["positions"]) == sum(map(len, by_position.values()))
    for bin_ in cell["positions"]:
        losses = [loss for position in range(bin_["from"], bin_["to"]) for loss in by_position[position]]
        assert bin_["tokens"] == len(losses)
        assert bin_["nats_per_token"] == pytest.approx(sum(losses) / len(losses), abs=1e-5)


def test_batches_change_nothing():
    scorer, documents = TokenScorer(random_model("transxssm")), random_documents(40, 9, 17)
    one, many = (measure(scorer, documents, 8, 4, batch_tokens) for batch_tokens in (1, 1000))
    assert one["nats_per_token"] == pytest.approx(many["nats_per_token"], abs=1e-6)
    assert [bin_["tokens"] for bin_ in one["positions"]] == [bin_["tokens"] for bin_ in many["positions"]]


@pytest.mark.parametrize("length", [2, 3, 8, 100, 1024])
def test_bins_hold_every_position_once(length):
    bins = position_bins(length)
    assert (bins[0], bins[-1]) == (1, length)
    assert (np.diff(bins) > 0).all()


class TestStandardError:
    def test_of_equal_clusters_is_the_usual_one(self):
        values = np.array([1.0, 2.0, 4.0, 9.0])
        mean, error = mean_and_error(np.stack([10 * values, np.full(4, 10.0)], axis=1))
        assert mean == values.mean()
        assert error == pytest.approx(values.std(ddof=1) / 2)

    def test_clusters_without_values_do_not_count(self):
        sums = np.array([[1.0, 1.0], [3.0, 1.0], [0.0, 0.0]])
        assert mean_and_error(sums) == mean_and_error(sums[:2])

    def test_of_one_cluster_there_is_none(self):
        assert mean_and_error(np.array([[6.0, 3.0]])) == (2.0, None)

    def test_one_document_has_one_over_its_windows(self):
        scorer = TokenScorer(random_model("transxssm"))
        assert measure(scorer, random_documents(40), 8, 4)["standard_error"] > 0
        assert measure(scorer, random_documents(8), 8, 4)["standard_error"] is None


class TestBytes:
    @pytest.mark.parametrize("text", ["abc", "é🙂 def", "", "a\nb  ", "<|endoftext|>x", "🙂"])
    def test_they_add_up_to_the_text(self, bpe, text):
        for tokenizer in (bpe, byte_tokenizer()):
            document = tokenize(text, tokenizer)
            assert document.num_bytes.sum() == len(text.encode())
            assert len(document.num_bytes) == len(document.input_ids)
            assert document.input_ids[0] == document.input_ids[-1] == tokenizer.eos_token_id
            assert (document.num_bytes >= 0).all()

    def test_each_token_has_its_own(self, bpe):
        document = tokenize("state 🙂é", bpe)
        assert bpe.convert_ids_to_tokens(document.input_ids)[1] == "state"
        assert document.num_bytes[1] == 5

    def test_a_character_of_several_tokens_counts_once(self):
        assert tokenize("a🙂b", byte_tokenizer()).num_bytes.tolist() == [0, 1, 4, 0, 0, 0, 1, 0]


class TestSelection:
    TEXTS = ("ab", "abcdefgh", "abcdef", "abcdefghij")

    def select(self, **limits):
        return [len(document.input_ids) for document in select_documents(self.TEXTS, byte_tokenizer(), **limits)]

    def test_short_documents_are_left_out_and_the_last_is_cut(self):
        assert self.select(min_tokens=9, max_tokens=1000) == [10, 12]
        assert self.select(min_tokens=2, max_tokens=16) == [4, 10, 2]
        assert self.select(min_tokens=9, max_tokens=19) == [10, 9]

    def test_none_is_long_enough(self):
        with pytest.raises(ValueError, match=r"13 tokens of the longest window .* the longest has 12"):
            self.select(min_tokens=13, max_tokens=1000)
        with pytest.raises(ValueError, match="within 5 tokens"):
            self.select(min_tokens=9, max_tokens=5)

    def test_the_longest(self):
        assert longest_document(self.TEXTS, byte_tokenizer()) == 12
        assert longest_document([], byte_tokenizer()) == 0


def test_plans_and_table():
    plans = perplexity_plans(
        TokenScorer(random_model("transxssm")), random_documents(20, 20), strides={8: 4, 16: 8}, batch_tokens=64
    )
    assert [(plan.key, plan.num_steps) for plan in plans] == [("8", 8), ("16", 4)]
    steps: list[int] = []
    cells = [plan.measure(steps.append) for plan in reversed(plans)]
    assert sum(steps) == 12
    table = perplexity_table(cells)
    assert [row[0] for row in table.rows] == ["8", "16"]
    assert table.rows[1][3] == f"{cells[0]['nats_per_token']:.4f}"


def test_losses_that_cannot_be_float64_where_they_are(monkeypatch):
    """On an Apple GPU."""
    scorer, documents = TokenScorer(random_model("transxssm")), random_documents(20, 13)
    expected, score = measure(scorer, documents, 8, 4), TokenScorer.__call__
    monkeypatch.setattr(
        TokenScorer, "__call__", lambda *given: TokenScores(*(t.as_subclass(OnAppleGPU) for t in score(*given)))
    )
    assert measure(scorer, documents, 8, 4) == expected


def place(low, high, error=0.1):
    return {"from": low, "to": high, "tokens": 5, "nats_per_token": 2.0 / low, "standard_error": error}


PERPLEXITY = [
    {"length": 8, "positions": [place(1, 2), place(2, 8)]},
    {"length": 4, "positions": [place(1, 2, None), place(2, 4, None)]},
]


@pytest.mark.parametrize("training_length", [6, None])
def test_perplexity_has_a_line_a_window(drawn, training_length):
    axes = drawn(plot_perplexity, PERPLEXITY, training_length)
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert lines["Window 4"].get_ydata() == pytest.approx([2.0, 1.0])
    assert lines["Window 8"].get_xdata() == pytest.approx([1.0, 14**0.5])
    assert axes.get_ylabel() == "loss (nats per token)"
    marks = [line for line in axes.get_lines() if list(line.get_xdata()) == [6, 6]]
    assert len(marks) == (training_length is not None)


def test_a_picture_of_perplexity_is_a_png(tmp_path):
    plot_perplexity(tmp_path / "picture.png", PERPLEXITY, 6)
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
