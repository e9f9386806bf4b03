"""Text comes in whole characters, and not beyond a stop string."""

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from tests.serving.checkpoints import byte_tokenizer
from transxssm.serving import TextStream


def pieces_of(tokenizer, ids: list[int], stop_strings=()) -> list[str]:
    """What a stream writes, with "|" after each token."""
    pieces = []
    stream = TextStream(tokenizer, pieces.append, stop_strings)
    for token in ids:
        stream.push(token)
        pieces.append("|")
    stream.end()
    return pieces


def text_of(pieces: list[str]) -> str:
    return "".join(piece for piece in pieces if piece != "|")


TEXTS = ["plain", "é€😀", "a\u0301 e\u200d👩‍👩‍👧", "\r\n\t\x00", "a\ufffdb"]


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_a_character_comes_when_all_its_bytes_are_there(text):
    pieces = pieces_of(byte_tokenizer(), list(text.encode()))
    assert text_of(pieces) == text
    if "\ufffd" not in text:  # that one looks like an incomplete character until the next token
        expected = [part for character in text for part in ["|"] * (len(character.encode()) - 1) + [character, "|"]]
        assert pieces == expected


def test_bytes_that_are_no_text_hold_nothing_up():
    pieces = pieces_of(byte_tokenizer(), [0xFF, 0xE2, ord("a"), ord("b")])
    assert text_of(pieces).endswith("ab")
    assert pieces[:2] == ["|", "|"]


def test_a_character_that_never_gets_all_its_bytes_is_left_out():
    assert text_of(pieces_of(byte_tokenizer(), [ord("a"), 0xE2, 0x82])) == "a"


def test_special_tokens_are_left_out():
    tokenizer = byte_tokenizer()
    assert text_of(pieces_of(tokenizer, [ord("a"), tokenizer.eos_token_id, ord("b")])) == "ab"


def test_a_tokens_text_may_depend_on_the_one_before():
    """A decoder that drops the first word's space must keep those of the others."""
    words = {"▁state": 0, "▁space": 1, "s": 2}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="s"))
    tokenizer.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    assert text_of(pieces_of(tokenizer, [0, 1, 2, 0])) == "state spaces state"


@pytest.mark.parametrize(
    ("text", "stop_strings", "expected"),
    [
        ("one\ntwo", ["\n"], "one"),
        ("a##b###c", ["###"], "a##b"),
        ("a####c", ["###"], "a"),
        ("aab", ["aab"], ""),
        ("aaab", ["aab"], "a"),
        ("xyz", ["yq", "z"], "xy"),
        ("1 end 2 stop", ["stop", "end"], "1 "),
        ("pré€fix", ["€"], "pré"),
        ("never", ["absent"], "never"),
        ("half of a sto", ["stop"], "half of a sto"),
    ],
)
def test_nothing_from_a_stop_string_on(text, stop_strings, expected):
    assert text_of(pieces_of(byte_tokenizer(), list(text.encode()), stop_strings)) == expected


@pytest.mark.parametrize("stop_strings", [["\n"], ["#", "\n"], ["\n", "#"]], ids=ascii)
def test_a_stop_string_inside_one_token_ends_the_text_before_the_first(stop_strings):
    tokenizer = Tokenizer(models.WordLevel({"ab\ncd#": 0, "x": 1}, unk_token="x"))
    assert text_of(pieces_of(PreTrainedTokenizerFast(tokenizer_object=tokenizer), [0, 1], stop_strings)) == "ab"


def test_text_is_held_back_only_while_it_could_become_a_stop_string():
    assert pieces_of(byte_tokenizer(), list(b"a#b##c"), ["##!"]) == ["a", "|", "|", "#b", "|", "|", "|", "##c", "|"]
