"""Needle in a haystack: lines of text, one sentence among them that gives a number to a name, and in the end the question for it."""

import bisect
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
from transformers import BatchEncoding, PreTrainedTokenizerFast

from transxssm.data.tokenizer import document_bounds

ADJECTIVES = (
    *("amber", "ancient", "brave", "bright", "calm", "clever", "crimson", "curious", "distant", "eager", "early", "fallen"),
    *("famous", "gentle", "golden", "hidden", "hollow", "humble", "icy", "lonely", "lucky", "marble", "misty", "noble"),
    *("patient", "purple", "quiet", "rapid", "rustic", "silver", "wooden", "young"),
)  # fmt: skip
NOUNS = (
    *("anchor", "badger", "bridge", "candle", "castle", "cedar", "comet", "compass", "falcon", "garden", "harbor", "island"),
    *("kettle", "ladder", "lantern", "meadow", "mirror", "orchard", "otter", "pebble", "pigeon", "planet", "river", "saddle"),
    *("spider", "teapot", "thistle", "tunnel", "valley", "violin", "walnut", "window"),
)  # fmt: skip
WORDS = (*ADJECTIVES, *NOUNS)
NUM_NAMES = len(ADJECTIVES) * len(NOUNS)
DIGITS = 5


class Wording(NamedTuple):
    """What stands in the haystack, and what is asked in the end; both name the `{name}`, the answer is a space and the number."""

    statement: str
    question: str


WORDINGS = (
    Wording("The secret number of the {name} is {number}.", "The secret number of the {name} is"),
    Wording("Remember that the {name} was given number {number}.", "What was to be remembered: the {name} was given number"),
    Wording("Whoever asks for the {name} should be told {number}.", "Somebody asks for the {name}. The answer is"),
)  # fmt: skip


@dataclass(frozen=True)
class NeedleExample:
    """A prompt and the answer that should follow it.

    Args:
        prompt_ids: token ids, the token that begins a document first.
        answer_ids: token ids that continue them.
        answer: their text, a space and a number.
        depth: share of the haystack's tokens before the needle, as it came out with whole lines.
    """

    prompt_ids: list[int]
    answer_ids: list[int]
    answer: str
    depth: float

    @property
    def input_ids(self) -> list[int]:
        """Prompt and answer."""
        return self.prompt_ids + self.answer_ids


@dataclass(frozen=True)
class NeedleLesson:
    """A text with several needles, each of which is asked for at its end, one after the other, with its answer.

    Args:
        input_ids: token ids, the token that begins a document first.
        is_answer: for each of them, whether it belongs to an answer.
    """

    input_ids: list[int]
    is_answer: list[bool]


_Laid = TypeVar("_Laid", NeedleExample, NeedleLesson)


class Haystack:
    """Lines of text in order, to be laid around needles; after the last line the first one follows again."""

    def __init__(self, texts: Iterable[str], tokenizer: PreTrainedTokenizerFast, max_tokens: int) -> None:
        """
        Args:
            texts: documents, of which as many are read as have `max_tokens` tokens.
            tokenizer: of the model that will read the prompts.
            max_tokens: of the longest prompt, or more, so that prompts differ.

        Raises:
            ValueError: no text, a tokenizer without eos token.
        """
        self.tokenizer = tokenizer
        self.lines: list[str] = []
        sizes: list[int] = []
        total = 0
        for text in texts:
            lines = [line for line in text.splitlines() if line.strip()]
            if not lines:
                continue
            self.lines += lines
            counts = [len(ids) for ids in self._encode([line + "\n" for line in lines])]
            sizes += counts
            total += sum(counts)
            if total >= max_tokens:
                break
        if not self.lines:
            raise ValueError("the haystack has no line of text: expected a corpus or a file with text in it")
        self._begin = document_bounds(tokenizer)[0]
        self._line_tokens = np.array(sizes)

    def example(self, *, length: int, depth: float, seed: int, number: int, num_distractors: int = 0) -> NeedleExample:
        """A prompt of at most `length` tokens, answer included, of whole lines; the same for the same arguments.

        Args:
            length: tokens of prompt and answer at most; about one line less is the rule.
            depth: where the needle stands: 0 before the first line, 1 after the last.
            seed, number: of the seed's examples the one of this number: its place in the text, name, number and wording.
            num_distractors: sentences of the same wording about other names, at random depths.

        Raises:
            ValueError: a depth out of 0 … 1; more distractors than names; a length that the needle and its question alone exceed.
        """
        _check_depth(depth)
        if not 0 <= num_distractors < NUM_NAMES:
            raise ValueError(
                f"distractors need names of their own: got {num_distractors}, expected 0 … {NUM_NAMES - 1}"
            )
        generator = np.random.default_rng((seed, number, length, round(depth * 1e6), num_distractors))
        wording = WORDINGS[generator.integers(len(WORDINGS))]
        names = _names(generator, 1 + num_distractors)
        low, high = 10 ** (DIGITS - 1), 10**DIGITS
        numbers = low + generator.choice(high - low, 1 + num_distractors, replace=False)
        statements = [
            wording.statement.format(name=name, number=number) for name, number in zip(names, numbers, strict=True)
        ]
        depths = [depth, *generator.random(num_distractors)]
        question = wording.question.format(name=names[0])
        answer = f" {numbers[0]}"
        first_line = int(generator.integers(len(self.lines)))

        def laid(num_lines: int) -> NeedleExample:
            return self._laid(first_line, num_lines, statements, depths, question, answer)

        return self._filled(laid, first_line, length)

    def lesson(self, *, length: int, depth: float, seed: int, number: int, num_needles: int) -> NeedleLesson:
        """A text of at most `length` tokens with needles and questions for all of them, or for as many as fit, at least one.

        Args:
            length, depth, seed, number: as for an example; the depth is that of the needle that is asked for first.
            num_needles: at most; each has a wording of its own.

        Raises:
            ValueError: a depth out of 0 … 1; no needle, or more than names; a length that one needle and its question alone exceed.
        """
        _check_depth(depth)
        if not 0 < num_needles <= NUM_NAMES:
            raise ValueError(f"needles need names of their own: got {num_needles}, expected 1 … {NUM_NAMES}")
        generator = np.random.default_rng((seed, number, length, round(depth * 1e6), num_needles))
        names = _names(generator, num_needles)
        low, high = 10 ** (DIGITS - 1), 10**DIGITS
        numbers = low + generator.choice(high - low, num_needles, replace=False)
        wordings = [WORDINGS[index] for index in generator.integers(len(WORDINGS), size=num_needles)]
        needles = list(zip(wordings, names, numbers, strict=True))
        statements = [wording.statement.format(name=name, number=value) for wording, name, value in needles]
        questions = [(wording.question.format(name=name), f" {value}") for wording, name, value in needles]
        depths = [depth, *generator.random(num_needles - 1)]
        first_line = int(generator.integers(len(self.lines)))

        def of_needles(count: int) -> Callable[[int], NeedleLesson]:
            return lambda num_lines: self._laid_lesson(
                first_line, num_lines, statements[:count], depths[:count], questions[:count]
            )

        def is_too_long(count: int) -> bool:
            return len(of_needles(count)(0).input_ids) > length

        num_fitting = bisect.bisect_left(range(1, num_needles + 1), True, key=is_too_long)
        return self._filled(of_needles(max(1, num_fitting)), first_line, length)

    def fewest_tokens(self) -> int:
        """Tokens of a needle and its question in the longest wording, about the longest name: what every prompt needs room for."""
        sizes = {word: len(ids) for word, ids in zip(WORDS, self._encode([f" {word}" for word in WORDS]), strict=True)}
        name = " ".join(max(words, key=sizes.__getitem__) for words in (ADJECTIVES, NOUNS))
        number = f"{10**DIGITS - 1}"
        texts = [
            f"{wording.statement.format(name=name, number=number)}\n{wording.question.format(name=name)} {number}"
            for wording in WORDINGS
        ]
        return 1 + max(map(len, self._encode(texts)))

    def _filled(self, laid: Callable[[int], _Laid], first_line: int, length: int) -> _Laid:
        """What `laid` makes of as many lines as fit into `length` tokens."""
        bare = laid(0)
        if len(bare.input_ids) > length:
            raise ValueError(
                f"a needle and its question need {len(bare.input_ids)} tokens: got length {length}; ask for a longer one"
            )
        # Joined lines have fewer tokens than the lines by themselves, where tokens cross line ends: so not once but until full.
        example, num_lines = bare, 0
        while True:
            step = max(1, self._lines_that_fit(first_line + num_lines, length - len(example.input_ids)))
            longer = laid(num_lines + step)
            while len(longer.input_ids) > length and step > 1:
                step //= 2
                longer = laid(num_lines + step)
            if len(longer.input_ids) > length:
                return example
            example, num_lines = longer, num_lines + step

    def _lines_that_fit(self, first_line: int, num_tokens: int) -> int:
        count = 0
        while num_tokens >= (size := self._line_tokens[(first_line + count) % len(self.lines)]):
            num_tokens -= size
            count += 1
        return count

    def _lines_around(
        self, first_line: int, num_lines: int, statements: list[str], depths: list[float]
    ) -> tuple[list[str], float]:
        """So many lines of haystack with the statements among them; the depth of the first statement as it came out."""
        indices = [(first_line + i) % len(self.lines) for i in range(num_lines)]
        ends = [0, *itertools.accumulate(int(self._line_tokens[i]) for i in indices)]  # tokens before each gap
        gaps = [_nearest(ends, share * ends[-1]) for share in depths]
        parts: list[list[str]] = [[] for _ in range(num_lines + 1)]
        for gap, statement in zip(gaps, statements, strict=True):
            parts[gap].append(statement)
        lines = [*parts[0]]
        for index, inserted in zip(indices, parts[1:], strict=True):
            lines += [self.lines[index], *inserted]
        return lines, ends[gaps[0]] / ends[-1] if ends[-1] else 0.0

    def _laid_lesson(
        self,
        first_line: int,
        num_lines: int,
        statements: list[str],
        depths: list[float],
        questions: list[tuple[str, str]],
    ) -> NeedleLesson:
        text = "".join(f"{line}\n" for line in self._lines_around(first_line, num_lines, statements, depths)[0])
        answers = []  # from which character to before which
        for question, answer in questions:
            text += question
            answers.append((len(text), len(text) + len(answer)))
            text += answer + "\n"
        encoded = self._encoded([text[:-1]], return_offsets_mapping=True)
        spans = encoded["offset_mapping"][0]
        belongs = [any(begin < last and end > first for first, last in answers) for begin, end in spans]
        return NeedleLesson([self._begin, *encoded["input_ids"][0]], [False, *belongs])

    def _laid(
        self,
        first_line: int,
        num_lines: int,
        statements: list[str],
        depths: list[float],
        question: str,
        answer: str,
    ) -> NeedleExample:
        """The example with so many lines of haystack; the first of the statements is the needle."""
        lines, depth = self._lines_around(first_line, num_lines, statements, depths)
        prompt = "".join(f"{line}\n" for line in [*lines, question])[:-1]
        prompt_ids, whole_ids = self._encode([prompt, prompt + answer])
        # A tokenizer that merges across the seam has the answer begin where both part.
        seam = next(
            (i for i, (own, joined) in enumerate(zip(prompt_ids, whole_ids, strict=False)) if own != joined),
            len(prompt_ids),
        )
        return NeedleExample(
            prompt_ids=[self._begin, *whole_ids[:seam]],
            answer_ids=whole_ids[seam:],
            answer=answer,
            depth=depth,
        )

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return self._encoded(texts)["input_ids"]

    def _encoded(self, texts: list[str], **options: bool) -> BatchEncoding:
        return self.tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False, **options)


def _check_depth(depth: float) -> None:
    if not 0 <= depth <= 1:
        raise ValueError(f"a needle's depth must lie between 0 (the beginning) and 1 (the end): got {depth}")


def _names(generator: np.random.Generator, count: int) -> list[str]:
    chosen = generator.choice(NUM_NAMES, count, replace=False)
    return [f"{ADJECTIVES[index // len(NOUNS)]} {NOUNS[index % len(NOUNS)]}" for index in chosen]


def _nearest(ends: list[int], target: float) -> int:
    """Index of the value nearest to the target, in ascending values."""
    above = min(bisect.bisect_left(ends, target), len(ends) - 1)
    return above if above == 0 or ends[above] - target <= target - ends[above - 1] else above - 1
