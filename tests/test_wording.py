"""Lengths as people write them."""

import pytest

from transxssm.wording import format_length, nearest, one_line, parse_length


@pytest.mark.parametrize(("text", "length"), [("4096", 4096), ("4K", 4096), ("64k", 65536), (" 1K ", 1024), ("7", 7)])
def test_parse(text, length):
    assert parse_length(text) == length


@pytest.mark.parametrize("text", ["0", "0K", "-1", "4M", "1.5K", "K", "", "four"])
def test_refusals(text):
    with pytest.raises(ValueError, match="such as 4096 or 4K: got"):
        parse_length(text)


@pytest.mark.parametrize(("length", "text"), [(4096, "4K"), (1000, "1000"), (65536, "64K")])
def test_format(length, text):
    assert format_length(length) == text
    assert parse_length(text) == length


def test_the_nearest_name_is_near():
    assert nearest("tinny", ["small", "tiny", "tiny-conv"]) == "tiny"
    assert nearest("elephant", ["small", "tiny"]) is None
    assert nearest("seed", ["lead", "seeds"], least=0.85) == "seeds"
    assert nearest("elephant", ["small", "tiny", "element"], least=0) == "element"
    assert nearest("tiny", []) is None


def test_an_error_is_one_line_whatever_it_says():
    assert one_line(ValueError("a\n   b\tc")) == "a b c"
    assert one_line(ValueError()) == "ValueError"
