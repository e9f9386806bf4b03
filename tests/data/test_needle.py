"""Needle prompts: full but not too long, the needle where it should be, an answer that continues them."""

import re

import pytest

from tests.data.conftest import random_text
from transxssm.data import Corpus, DataArguments, Haystack, build_tokenizer, load_corpus
from transxssm.data.needle import ADJECTIVES, NOUNS

NAME = re.compile(rf"(?:{'|'.join(ADJECTIVES)}) (?:{'|'.join(NOUNS)})")
NUMBER = re.compile(r"(?<!\d)\d{5}(?!\d)")


@pytest.fixture
def texts() -> list[str]:
    return [
        "\n".join(f"line {n} {random_text(n, 9)}" for n in range(200)),
        "a last document\n\n    with an indented line\n",
    ]


@pytest.fixture(params=["bytes", "bpe"])
def tokenizer(request, arguments, folder):
    data = arguments(folder, tokenizer=request.param, vocab_size=400)
    return build_tokenizer(data, load_corpus(data))


@pytest.fixture
def byte_tokenizer():
    return build_tokenizer(DataArguments(tokenizer="bytes"), Corpus(train=None, held_out=None, identity=""))


def text_of(haystack, ids) -> str:
    return haystack.tokenizer.decode(ids, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("length", [200, 777, 2000])
@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_a_prompt_holds_needle_question_and_as_many_lines_as_fit(texts, tokenizer, length, depth):
    haystack = Haystack(texts, tokenizer, max_tokens=10**6)
    longest = max(len(ids) for ids in tokenizer([line + "\n" for line in haystack.lines])["input_ids"])
    example = haystack.example(length=length, depth=depth, seed=0, number=0)
    assert length - longest <= len(example.input_ids) <= length
    assert example.prompt_ids[0] == tokenizer.bos_token_id

    prompt, answer = text_of(haystack, example.prompt_ids[1:]), text_of(haystack, example.answer_ids)
    assert answer == example.answer
    assert re.fullmatch(r" \d{5}", answer)
    *lines, question = prompt.split("\n")
    (needle,) = [line for line in lines if NUMBER.search(line)]
    assert answer.strip() in needle
    (name,) = NAME.findall(question)
    assert name in needle
    assert [line for line in lines if line != needle] == expected_lines(haystack, lines, needle)
    # As one text, canonically: nothing betrays where it was put together.
    assert tokenizer(prompt + answer)["input_ids"] == example.input_ids

    def num_tokens(lines: list[str]) -> int:
        return sum(len(tokenizer(line + "\n")["input_ids"]) - 1 for line in lines)

    where, hay = lines.index(needle), [line for line in lines if line != needle]
    assert example.depth == num_tokens(lines[:where]) / num_tokens(hay)
    assert abs(example.depth - depth) <= longest / num_tokens(hay) / 2


def expected_lines(haystack, lines, needle) -> list[str]:
    """So many lines of the haystack from where the prompt begins, round its end."""
    first = haystack.lines.index(next(line for line in lines if line != needle))
    return [haystack.lines[(first + i) % len(haystack.lines)] for i in range(len(lines) - 1)]


def test_the_depths_at_the_ends_are_the_ends(texts, byte_tokenizer):
    haystack = Haystack(texts, byte_tokenizer, max_tokens=10**6)
    for depth, place in ((0.0, 0), (1.0, -2)):
        lines = text_of(haystack, haystack.example(length=900, depth=depth, seed=0, number=0).prompt_ids[1:]).split(
            "\n"
        )
        assert NUMBER.search(lines[place])


def test_an_example_is_repeatable_and_others_differ(texts, byte_tokenizer):
    haystack = Haystack(texts, byte_tokenizer, max_tokens=10**6)
    arguments = {"length": 500, "depth": 0.5, "seed": 1, "number": 2}
    example = haystack.example(**arguments)
    assert haystack.example(**arguments) == example
    for change in ({"seed": 2}, {"number": 3}, {"depth": 0.6}, {"length": 600}):
        assert haystack.example(**(arguments | change)).answer != example.answer
    questions = {
        text_of(haystack, haystack.example(**(arguments | {"number": n})).prompt_ids).rsplit("\n", 1)[1].split()[0]
        for n in range(20)
    }
    assert len(questions) == 3  # all wordings


def test_distractors_name_others(texts, byte_tokenizer):
    haystack = Haystack(texts, byte_tokenizer, max_tokens=10**6)
    example = haystack.example(length=1500, depth=0.5, seed=0, number=0, num_distractors=3)
    numbers = NUMBER.findall(text_of(haystack, example.prompt_ids))
    assert len(set(numbers)) == 4
    assert numbers.count(example.answer.strip()) == 1
    assert len(example.input_ids) <= 1500


def test_a_lesson_asks_for_every_needle_that_fits(texts, byte_tokenizer):
    haystack = Haystack(texts, byte_tokenizer, max_tokens=4000)
    for length, at_most, expected in [(900, 5, 5), (900, 1, 1), (300, 5, 2), (150, 5, 1)]:
        lesson = haystack.lesson(length=length, depth=0.5, seed=3, number=7, num_needles=at_most)
        assert length - 100 < len(lesson.input_ids) <= length
        assert len(lesson.is_answer) == len(lesson.input_ids)
        ids = [token for token, is_answer in zip(lesson.input_ids, lesson.is_answer, strict=True) if is_answer]
        answers = byte_tokenizer.decode(ids).split()
        assert byte_tokenizer.decode(ids) == "".join(f" {answer}" for answer in answers)
        assert len(answers) == len(set(answers)) == expected
        lines = byte_tokenizer.decode(lesson.input_ids, skip_special_tokens=True).splitlines()
        assert all(line.endswith(answer) for line, answer in zip(lines[-expected:], answers, strict=True))
        assert lesson == haystack.lesson(length=length, depth=0.5, seed=3, number=7, num_needles=at_most)
    for change, words in [
        ({"length": 40}, "ask for a longer one"),
        ({"depth": 2.0}, "depth must lie between"),
        ({"num_needles": 0}, "names of their own"),
        ({"num_needles": 1025}, "names of their own"),
    ]:
        with pytest.raises(ValueError, match=words):
            haystack.lesson(**{"length": 300, "depth": 0.5, "seed": 3, "number": 7, "num_needles": 2} | change)


def test_every_needle_fits_where_the_longest_does(texts, byte_tokenizer):
    haystack = Haystack(texts, byte_tokenizer, max_tokens=4000)
    fewest = haystack.fewest_tokens()
    for number in range(200):
        haystack.lesson(length=fewest, depth=0.5, seed=3, number=number, num_needles=1)
        haystack.example(length=fewest, depth=0.5, seed=3, number=number)


def test_reading_stops_when_there_is_enough(texts, byte_tokenizer):
    def endless():
        yield texts[0]
        raise AssertionError("read on")

    assert len(Haystack(endless(), byte_tokenizer, max_tokens=100).lines) == len(
        [line for line in texts[0].split("\n") if line.strip()]
    )


def test_a_text_that_spells_a_special_token_is_text(byte_tokenizer):
    haystack = Haystack(["<|endoftext|> and more"], byte_tokenizer, max_tokens=10)
    ids = haystack.example(length=400, depth=0.0, seed=0, number=0).input_ids
    assert ids.count(byte_tokenizer.eos_token_id) == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"length": 40}, "a needle and its question need .* got length 40"),
        ({"depth": 1.5}, "between 0 .* got 1.5"),
        ({"num_distractors": 1024}, "got 1024, expected 0 … 1023"),
    ],
    ids=str,
)
def test_refusals(texts, byte_tokenizer, change, words):
    haystack = Haystack(texts, byte_tokenizer, max_tokens=10**6)
    with pytest.raises(ValueError, match=words):
        haystack.example(**({"length": 500, "depth": 0.5, "seed": 0, "number": 0} | change))
    with pytest.raises(ValueError, match="no line of text"):
        Haystack([" \n"], byte_tokenizer, max_tokens=10)
