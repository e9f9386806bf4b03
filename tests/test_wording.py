"""Lengths as people write them."""

import pytest

from transxssm_lab.benchmarking import format_length, parse_length


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
