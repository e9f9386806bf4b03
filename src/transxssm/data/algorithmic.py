"""Tasks with exact answers at any length: the running product in a group (parity, modular addition, permutations), and copying a string.

State tracking: after each element of a group the model predicts the product of all elements so far. A model whose state only decays, or
rotates by angles that do not depend on the tokens, cannot do this at all lengths, not even for parity (arXiv 2411.12537). S5 is the
smallest symmetric group that is not solvable, which circuits of constant depth are conjectured not to track.

Letters: n sequences, t tokens.
"""

import itertools
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from transxssm.data.associative_recall import RecallBatch
from transxssm.data.packing import IGNORED_LABEL

COPYING = "copying"
ALPHABET = 26
_ORDERS = {"parity": 2, "modular-3": 3, "modular-5": 5}  # modulus of the addition
_PERMUTED = {"s3": 3, "s5": 5}  # number of permuted items
ALGORITHMIC_TASKS = (*_ORDERS, *_PERMUTED, COPYING)


@dataclass(frozen=True)
class AlgorithmicTask:
    """A task at one length. Token ids are the task's own: elements or letters from 0 on, then the token that begins or separates.

    State tracking: the first token, then `length` uniform elements, each with the product of all elements so far as its answer, then an
    element without an answer. Only the last answer counts for the accuracy.

    Copying: `length` uniform letters, the separator, and the letters again, all of which are predicted and count for the accuracy.

    Args:
        name: "parity", "modular-3" or "modular-5" (addition), "s3" or "s5" (permutations), or "copying".
        length: number of elements or letters.

    Raises:
        ValueError: the name is unknown, or the length is below 1.
    """

    name: str
    length: int

    def __post_init__(self) -> None:
        if self.name not in ALGORITHMIC_TASKS:
            raise ValueError(f"unknown task {self.name!r}: expected one of {', '.join(ALGORITHMIC_TASKS)}")
        if self.length < 1:
            raise ValueError(f"a task needs at least 1 element or letter: got length {self.length}")

    @property
    def num_tokens(self) -> int:
        """Number of tokens in a sequence, t."""
        return 2 * self.length + 1 if self.name == COPYING else self.length + 2

    @property
    def num_judged(self) -> int:
        """Number of answers at the end of a sequence that count for the accuracy."""
        return self.length if self.name == COPYING else 1

    @property
    def num_elements(self) -> int:
        """Number of elements of the group, or of letters of the alphabet."""
        return ALPHABET if self.name == COPYING else len(self._products)

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.num_elements + 1

    def sequences(self, seed: int, first: int, count: int) -> RecallBatch:
        """The sequences number `first` … `first + count − 1` of a seed. Each depends only on seed and number."""
        drawn = [
            np.random.default_rng((seed, number)).integers(self.num_elements, size=self.length + 1)
            for number in range(first, first + count)
        ]
        elements = np.stack(drawn)  # (n, length + 1)
        mark = np.full((count, 1), self.num_elements)
        if self.name == COPYING:
            letters = elements[:, :-1]
            nothing = np.full_like(letters, IGNORED_LABEL)
            return RecallBatch(
                np.concatenate((letters, mark, letters), axis=1),
                np.concatenate((nothing, letters, nothing[:, :1]), axis=1),
            )
        targets = np.full((count, self.num_tokens), IGNORED_LABEL)
        state = np.zeros(count, dtype=np.int64)  # the neutral element
        for place in range(self.length):
            state = self._products[elements[:, place], state]
            targets[:, 1 + place] = state
        return RecallBatch(np.concatenate((mark, elements), axis=1), targets)

    @cached_property
    def _products(self) -> np.ndarray:
        """(e, e): the number of the product of two elements; element 0 is neutral."""
        if self.name in _ORDERS:
            numbers = np.arange(_ORDERS[self.name])
            return (numbers[:, None] + numbers) % _ORDERS[self.name]
        permutations = list(itertools.permutations(range(_PERMUTED[self.name])))
        number_of = {permutation: number for number, permutation in enumerate(permutations)}
        return np.array(
            [[number_of[tuple(after[place] for place in before)] for before in permutations] for after in permutations]
        )
