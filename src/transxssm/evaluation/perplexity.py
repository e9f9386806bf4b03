"""Perplexity over windows of several lengths: whether a model uses its context, also beyond the length of its training.

Every length scores the same tokens of the same documents, so that lengths can be compared. Only the number of earlier tokens in a
window differs. A document is `[bos] + tokens + [eos]`, no window spans two, and every token but bos is scored, as in training.
"""

import math
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from transxssm.data import document_bounds
from transxssm.evaluation.processes import in_turn
from transxssm.evaluation.results import Advance, Cell, CellPlan, ResultTable
from transxssm.evaluation.scoring import TokenScorer
from transxssm.plotting import GREY, draw_line, label_lines, looks_of, picture, set_ticks, tick

BINS_PER_OCTAVE = 2  # bins of positions, each with its mean loss


class TokenizedDocument(NamedTuple):
    """A document, and the number of bytes of its text that each token stands for.

    Args:
        input_ids: (t,) int64, bos and eos included.
        num_bytes: (t,) int64, UTF-8 bytes, which add up to the text. If a character has several tokens, the first has all its bytes. bos
            has 0.
    """

    input_ids: np.ndarray
    num_bytes: np.ndarray


class Window(NamedTuple):
    """Tokens `begin` … `end − 1` of a document, of which those from `first_scored` on count."""

    begin: int
    end: int
    first_scored: int


def tokenize(text: str, tokenizer: PreTrainedTokenizerFast) -> TokenizedDocument:
    """Tokenizes a text as a document. Text that spells a special token is treated as text, as in training.

    Raises:
        ValueError: the tokenizer does not say which characters a token stands for, or has no eos token.
    """
    if not tokenizer.is_fast:
        raise ValueError(f"bits per byte need a fast tokenizer (tokenizer.json): got {type(tokenizer).__name__}")
    begin, end = document_bounds(tokenizer)
    encoded = tokenizer(
        text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False
    )
    characters = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    sizes = 1 + (characters > 0x7F) + (characters > 0x7FF) + (characters > 0xFFFF)
    bytes_before = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])  # before each character
    ends = np.array([last for _, last in encoded["offset_mapping"]], dtype=np.int64)
    reached = bytes_before[ends]
    # Text that the tokenizer drops at the end, such as blanks, counts for eos.
    num_bytes = np.diff(reached, prepend=0, append=bytes_before[-1])
    return TokenizedDocument(
        input_ids=np.array([begin, *encoded["input_ids"], end], dtype=np.int64),
        num_bytes=np.concatenate([[0], num_bytes]),
    )


def select_documents(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerFast, *, min_tokens: int, max_tokens: int
) -> list[TokenizedDocument]:
    """Selects documents of at least `min_tokens` tokens, in order, until there are `max_tokens`. The last one is cut there.

    Raises:
        ValueError: fewer than 2 tokens are requested, or no document is long enough. The message says how long the longest is.
    """
    if min_tokens < 2:
        raise ValueError(
            f"a document needs at least 2 tokens, one to be predicted from the other: got min_tokens={min_tokens}"
        )
    documents: list[TokenizedDocument] = []
    longest = total = 0
    for text in texts:
        document = tokenize(text, tokenizer)
        longest = max(longest, len(document.input_ids))
        rest = max_tokens - total
        if len(document.input_ids) < min_tokens or rest < min_tokens:
            continue
        documents.append(TokenizedDocument(document.input_ids[:rest], document.num_bytes[:rest]))
        total += len(documents[-1].input_ids)
        if total >= max_tokens:
            break
    if not documents:
        raise ValueError(
            f"no document has the {min_tokens:,} tokens of the longest window within {max_tokens:,} tokens in all: the longest has "
            f"{longest:,}; choose shorter lengths, or a longer text"
        )
    return documents


def longest_document(texts: Iterable[str], tokenizer: PreTrainedTokenizerFast) -> int:
    """Number of tokens in the longest text, bos and eos included. 0 if there is no text."""
    return max((len(tokenize(text, tokenizer).input_ids) for text in texts), default=0)


def plan_windows(num_tokens: int, length: int, stride: int) -> list[Window]:
    """Windows of `length` tokens, each ending `stride` tokens after the one before, the last one at the document's end.

    Every token but the first is scored once, by the first window that reaches it: from the second window on the last `stride`
    tokens count. With stride = length − 1 windows share one token, and each has only its own context ("rolling").

    Raises:
        ValueError: the length is below 2, or the stride would skip tokens.
    """
    if length < 2:
        raise ValueError(f"a window needs at least 2 tokens, one to be predicted from the other: got {length}")
    if not 1 <= stride < length:
        raise ValueError(f"the stride must be at least 1 and less than the window's length: got {stride} and {length}")
    end = min(length, num_tokens)
    windows = [Window(0, end, 1)]
    while end < num_tokens:
        first_scored, end = end, min(end + stride, num_tokens)
        windows.append(Window(max(0, end - length), end, first_scored))
    return windows


def perplexity_plans(
    scorer: TokenScorer, documents: Sequence[TokenizedDocument], *, strides: dict[int, int], batch_tokens: int
) -> list[CellPlan]:
    """Plans one cell for each length.

    Args:
        scorer: scorer of the model.
        documents: documents from `select_documents`.
        strides: stride of the windows of each length.
        batch_tokens: tokens that the model reads at once, at least one window.
    """
    return [
        CellPlan(
            key=str(length),
            num_steps=sum(len(plan_windows(len(document.input_ids), length, stride)) for document in documents),
            measure=partial(measure_length, scorer, documents, length, stride, batch_tokens),
        )
        for length, stride in strides.items()
    ]


def measure_length(
    scorer: TokenScorer,
    documents: Sequence[TokenizedDocument],
    length: int,
    stride: int,
    batch_tokens: int,
    advance: Advance,
) -> Cell:
    """Measures the loss of every token of the documents under windows of one length.

    Returns:
        The numbers of tokens and bytes scored, nats_per_token, perplexity, bits_per_byte, and positions: for bins of the number of
        tokens before the predicted one, [from, to), the mean loss over all predictions of all windows. Each mean has a standard
        error from the spread between documents, or between windows if there is one document. It is None if there is only one.
    """
    jobs = [
        (index, window)
        for index, document in enumerate(documents)
        for window in plan_windows(len(document.input_ids), length, stride)
    ]
    bins = position_bins(length)
    clusters = [index if len(documents) > 1 else number for number, (index, _) in enumerate(jobs)]
    num_clusters = max(clusters) + 1
    scored = np.zeros((num_clusters, 2))  # nats, tokens
    by_position = np.zeros((num_clusters, len(bins) - 1, 2))
    num_bytes = 0

    def losses_of(batch: list[tuple[int, tuple[int, Window]]]) -> np.ndarray:
        rows = np.stack([documents[index].input_ids[window.begin : window.end] for _, (index, window) in batch])
        ids = torch.from_numpy(rows)
        losses: np.ndarray = scorer(ids[:, :-1], ids[:, 1:]).losses.reshape(len(batch), -1).cpu().double().numpy()
        return losses

    batches = list(_batches(jobs, batch_tokens))
    for batch, losses in zip(batches, in_turn(losses_of, batches), strict=True):
        for row, (number, (index, window)) in zip(losses, batch, strict=True):
            counted = row[window.first_scored - window.begin - 1 :]
            scored[clusters[number]] += counted.sum(), len(counted)
            num_bytes += int(documents[index].num_bytes[window.first_scored : window.end].sum())
            where = np.digitize(np.arange(1, len(row) + 1), bins) - 1
            by_position[clusters[number], :, 0] += np.bincount(where, row, minlength=len(bins) - 1)
            by_position[clusters[number], :, 1] += np.bincount(where, minlength=len(bins) - 1)
        advance(len(batch))
    nats, standard_error = mean_and_error(scored)
    return {
        "length": length,
        "stride": stride,
        "documents": len(documents),
        "windows": len(jobs),
        "tokens": int(scored[:, 1].sum()),
        "bytes": num_bytes,
        "nats_per_token": nats,
        "standard_error": standard_error,
        "perplexity": math.exp(nats),
        "bits_per_byte": float(scored[:, 0].sum()) / math.log(2) / num_bytes,
        "positions": [
            {
                "from": int(low),
                "to": int(high),
                "tokens": int(sums[:, 1].sum()),
                "nats_per_token": mean,
                "standard_error": error,
            }
            for low, high, sums in zip(bins[:-1], bins[1:], by_position.transpose(1, 0, 2), strict=True)
            if sums[:, 1].any()  # perhaps no document is that long
            for mean, error in [mean_and_error(sums)]
        ],
    }


def position_bins(length: int) -> np.ndarray:
    """Edges of the bins for 1 … length − 1 tokens of context, evenly spaced on a logarithmic scale as far as integers allow."""
    octaves = np.arange(0, BINS_PER_OCTAVE * math.log2(length)) / BINS_PER_OCTAVE
    return np.unique([*np.round(2**octaves).astype(int), length])


def mean_and_error(sums: np.ndarray) -> tuple[float, float | None]:
    """Mean over all tokens, with a cluster-robust standard error, since the tokens of a cluster are not independent.

    Args:
        sums: (clusters, 2) sum and number of each cluster's values. Clusters without values do not count.
    """
    sums = sums[sums[:, 1] > 0]
    total, count = sums.sum(0)
    mean, num_clusters = total / count, len(sums)
    if num_clusters < 2:
        return float(mean), None
    residuals = sums[:, 0] - mean * sums[:, 1]
    return float(mean), float(math.sqrt(num_clusters / (num_clusters - 1) * (residuals**2).sum()) / count)


def perplexity_table(cells: Iterable[Cell]) -> ResultTable:
    """A table with a row for each length, in ascending order."""
    return ResultTable(
        ["window", "stride", "tokens scored", "nats per token", "± s.e.", "perplexity", "bits per byte"],
        [
            [
                f"{cell['length']:,}",
                f"{cell['stride']:,}",
                f"{cell['tokens']:,}",
                f"{cell['nats_per_token']:.4f}",
                "–" if cell["standard_error"] is None else f"{cell['standard_error']:.4f}",
                f"{cell['perplexity']:.3f}",
                f"{cell['bits_per_byte']:.4f}",
            ]
            for cell in sorted(cells, key=lambda cell: cell["length"])
        ],
    )


def _batches(jobs: list[tuple[int, Window]], batch_tokens: int) -> Iterable[list[tuple[int, tuple[int, Window]]]]:
    """Batches of numbered windows of equal size, so that no row needs padding."""
    by_size: dict[int, list[Any]] = {}
    for number, (index, window) in enumerate(jobs):
        by_size.setdefault(window.end - window.begin, []).append((number, (index, window)))
    for size, numbered in by_size.items():
        rows = max(1, batch_tokens // size)
        yield from (numbered[first : first + rows] for first in range(0, len(numbered), rows))


def plot_perplexity(path: Path, cells: Iterable[Cell], training_length: int | None) -> None:
    """Plots loss over the number of tokens before the predicted one, a line for each length, with bands of one standard error.

    Args:
        path: path of the PNG.
        cells: cells from `measure_length`.
        training_length: is marked in the plot if it is known.
    """
    cells = sorted(cells, key=lambda cell: cell["length"])
    looks = looks_of(f"window {tick(cell['length'])}" for cell in cells)
    with picture(path) as axes:
        for cell, look in zip(cells, looks.values(), strict=True):
            # The geometric mean of a bin's first and last position.
            middles = [(bin_["from"] * (bin_["to"] - 1)) ** 0.5 for bin_ in cell["positions"]]
            means = np.array([bin_["nats_per_token"] for bin_ in cell["positions"]])
            errors = np.array([bin_["standard_error"] or 0.0 for bin_ in cell["positions"]])
            draw_line(axes, look, middles, list(means), list(means - errors), list(means + errors))
        set_ticks(axes, [cell["length"] for cell in cells] + [1])
        if training_length is not None:
            axes.axvline(training_length, color=GREY, linestyle="--", linewidth=1)
            top = axes.get_xaxis_transform()
            axes.text(training_length, 1.0, " training length", transform=top, fontsize=8, va="bottom", ha="center")
        axes.set_xlabel("tokens before the predicted one, in the window")
        axes.set_ylabel("loss (nats per token)")
        label_lines(axes)
