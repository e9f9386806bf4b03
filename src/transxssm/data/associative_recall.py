"""Multi-query associative recall (MQAR), the synthetic task of Zoology (arXiv 2312.04927): pairs, then questions for them.

A sequence begins with `num_pairs` pairs of key and value. Each key occurs once more, without its value, which is to be
predicted there. The distances follow a power law that puts most of the questions soon after the pairs. The rest of the sequence is
filled with random tokens.

Letters: n sequences, t tokens.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from transxssm.data.packing import IGNORED_LABEL


class RecallBatch(NamedTuple):
    """Sequences and their targets.

    Args:
        input_ids: (n, t) int64.
        targets: (n, t) int64, the value at each question, to be predicted at that position (Hugging Face's `shift_labels`), and −100
            elsewhere.
    """

    input_ids: np.ndarray
    targets: np.ndarray


@dataclass(frozen=True)
class RecallTask:
    """One difficulty of the task. Token ids are the task's own: keys in the lower half of the vocabulary, values in the upper.

    Args:
        length: tokens in a sequence, t.
        num_pairs: number of pairs of key and value. Keys differ from each other, and so do values.
        vocab_size: token ids are below this number. Id 0 is neither key nor value.
        power: the exponent a of the power law: place x after the pairs gets a question with weight x^(a − 1).

    Raises:
        ValueError: the sequence is too short or the vocabulary too small for the pairs, or the power is not positive.
    """

    length: int
    num_pairs: int
    vocab_size: int = 8192
    power: float = 0.01

    def __post_init__(self) -> None:
        if self.num_pairs < 1:
            raise ValueError(f"recall needs at least 1 pair of key and value: got {self.num_pairs}")
        if self.length < 4 * self.num_pairs:
            raise ValueError(
                f"{self.num_pairs} pairs and their questions need at least {4 * self.num_pairs} tokens: got length "
                f"{self.length}; ask for fewer pairs or longer sequences"
            )
        if self.vocab_size // 2 - 1 < self.num_pairs:
            raise ValueError(
                f"{self.num_pairs} different keys and values need a vocabulary of at least {2 * self.num_pairs + 2}: got "
                f"{self.vocab_size}"
            )
        if self.power <= 0:
            raise ValueError(f"the power law's exponent must be more than 0: got {self.power}")

    @property
    def num_tokens(self) -> int:
        """Number of tokens in a sequence, t."""
        return self.length

    @property
    def num_judged(self) -> int:
        """Answers of a sequence that count for the accuracy: all."""
        return self.num_pairs

    def sequences(self, seed: int, first: int, count: int) -> RecallBatch:
        """The sequences number `first` … `first + count − 1` of a seed. Each depends only on seed and number."""
        drawn = [self._sequence(np.random.default_rng((seed, number))) for number in range(first, first + count)]
        return RecallBatch(*(np.stack(column) for column in zip(*drawn, strict=True)))

    def _sequence(self, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        num_pairs, half = self.num_pairs, self.vocab_size // 2
        keys = 1 + generator.choice(half - 1, num_pairs, replace=False)
        values = half + generator.choice(self.vocab_size - half, num_pairs, replace=False)
        begin = 2 * num_pairs  # begin of the part with questions
        # A place has two tokens, as in Zoology.
        num_places = (self.length - begin) // 2
        weights = np.arange(1, num_places + 1) ** (self.power - 1)
        places = generator.choice(num_places, num_pairs, replace=False, p=weights / weights.sum())
        input_ids = generator.integers(self.vocab_size, size=self.length)
        input_ids[0:begin:2], input_ids[1:begin:2] = keys, values
        targets = np.full(self.length, IGNORED_LABEL)
        questions = begin + 2 * places
        input_ids[questions], targets[questions] = keys, values
        return input_ids, targets
