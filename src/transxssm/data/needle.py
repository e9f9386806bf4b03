"""Needle in a haystack: lines of text with a sentence that gives a name a number, and at the end a question for that number."""

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
    """The sentence in the haystack and the question at the end. Both have the `{name}`, and the answer is a space and the number."""

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
        prompt_ids: token ids, which begin with the token that begins a document.
        answer_ids: token ids of the answer.
        answer: text of the answer, a space and a number.
        depth: share of the haystack's tokens before the needle, which depends on the lengths of lines.
    """

    prompt_ids: list[int]
    answer_ids: list[int]
    answer: str
    depth: float

    @property
    def input_ids(self) -> list[int]:
        """Token ids of prompt and answer."""
        return self.prompt_ids + self.answer_ids


@dataclass(frozen=True)
class NeedleLesson:
    """A text with several needles, at whose end all of them are asked for in turn, with the answers.

    Args:
        input_ids: token ids, which begin with the token that begins a document.
        is_answer: whether each token belongs to an answer.
    """

    input_ids: list[int]
    is_answer: list[bool]


_Laid = TypeVar("_Laid", NeedleExample, NeedleLesson)


class Haystack:
    """Lines of text in order, among which needles are placed. The first line follows the last one."""

    def __init__(self, texts: Iterable[str], tokenizer: PreTrainedTokenizerFast, max_tokens: int) -> None:
        """
        Args:
            texts: documents, which are read until there are `max_tokens` tokens.
            tokenizer: tokenizer of the model that will read the prompts.
            max_tokens: tokens of the longest prompt, or more, so that prompts differ.

        Raises:
            ValueError: there is no text, or the tokenizer has no eos token.
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
        """A prompt of at most `length` tokens, answer included, of whole lines. It depends only on the arguments.

        Args:
            length: largest number of tokens of prompt and answer. There are usually fewer, by up to a line.
            depth: place of the needle, from 0 before the first line to 1 after the last.
            seed, number: seed and index of the example, which determine its place in the text, name, number and wording.
            num_distractors: number of sentences of the same wording about other names, at random depths.

        Raises:
            ValueError: the depth is not in 0 … 1, there are more distractors than names, or the needle and its question alone exceed the
                length.
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
        """A text of at most `length` tokens with needles and questions for all of them. Fewer if they do not fit, but at least one.

        Args:
            length, depth, seed, number: as for an example. The depth is that of the needle that is asked for first.
            num_needles: largest number of needles, each with its own wording.

        Raises:
            ValueError: the depth is not in 0 … 1, there is no needle or more needles than names, or one needle and its question alone
                exceed the length.
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
        """Tokens of a needle and its question with the longest wording and name, for which every prompt must have room."""
        sizes = {word: len(ids) for word, ids in zip(WORDS, self._encode([f" {word}" for word in WORDS]), strict=True)}
        name = " ".join(max(words, key=sizes.__getitem__) for words in (ADJECTIVES, NOUNS))
        number = f"{10**DIGITS - 1}"
        texts = [
            f"{wording.statement.format(name=name, number=number)}\n{wording.question.format(name=name)} {number}"
            for wording in WORDINGS
        ]
        return 1 + max(map(len, self._encode(texts)))

    def _filled(self, laid: Callable[[int], _Laid], first_line: int, length: int) -> _Laid:
        """The result of `laid` for the largest number of lines that fits into `length` tokens."""
        bare = laid(0)
        if len(bare.input_ids) > length:
            raise ValueError(
                f"a needle and its question need {len(bare.input_ids)} tokens: got length {length}; ask for a longer one"
            )
        # If tokens cross line ends, joined lines have fewer tokens than single lines, so that lines are added repeatedly.
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
        """Lines of haystack with the statements among them, and the actual depth of the first statement."""
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
        answers = []  # first character of each answer, and the one after its last
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
        """The example with a number of lines of haystack. The first of the statements is the needle."""
        lines, depth = self._lines_around(first_line, num_lines, statements, depths)
        prompt = "".join(f"{line}\n" for line in [*lines, question])[:-1]
        prompt_ids, whole_ids = self._encode([prompt, prompt + answer])
        # If the tokenizer merges across the boundary, the answer begins where both token sequences differ.
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
