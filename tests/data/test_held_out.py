import itertools

import hypothesis
import hypothesis.strategies as st
import pytest

from transxssm.data.held_out import cut_and_chosen, is_near, piece_bounds

TEXTS = st.text(alphabet="ab. \n\ré\u0301🙂", max_size=300)


@hypothesis.given(text=TEXTS, size=st.integers(1, 40))
def test_pieces_are_the_text_and_none_is_blank(text, size):
    bounds = piece_bounds(text, size)
    assert "".join(text[begin:end] for begin, end in bounds) == text
    assert all(begin < end for begin, end in bounds)
    if text.strip():
        assert all(text[begin:end].strip() for begin, end in bounds)


@hypothesis.given(texts=st.lists(TEXTS.filter(str.strip), min_size=1, max_size=6), fraction=st.floats(0.01, 0.99))
def test_every_character_is_on_one_side_and_neither_is_empty(texts, fraction):
    total = sum(map(len, texts))
    names = [f"{n}.txt" for n in range(len(texts))]
    try:
        runs = cut_and_chosen(names, texts, total, fraction)
    except ValueError:
        assert len(texts) == 1
        assert len(piece_bounds(texts[0], 1)) == 1
        return
    assert {run.is_held_out for run in runs} == {True, False}
    for index, text in enumerate(texts):
        own = [run for run in runs if run.document == index]
        assert [run.begin for run in own] == [0, *(run.end for run in own[:-1])]
        assert own[-1].end == len(text)
        assert all(a.is_held_out != b.is_held_out for a, b in itertools.pairwise(own)), "neighbours are joined"
    assert runs == cut_and_chosen(names, texts, total, fraction)


@pytest.mark.parametrize("fraction", [0.001, 0.05, 0.1, 0.5, 0.9, 0.99])
def test_what_is_held_out_is_about_the_fraction(fraction):
    texts = ["word " * 100_000, "another line\n" * 2_000, "x" * 40_000]
    total = sum(map(len, texts))
    runs = cut_and_chosen(["a", "b", "c"], texts, total, fraction)
    assert is_near(sum(run.end - run.begin for run in runs if run.is_held_out), total, fraction)


def test_copies_of_a_text_stay_on_one_side():
    texts = ["first line of it\nsecond line of it\n" * 20] * 4 + ["something else\n" * 30]
    names = ["copy"] * 4 + ["other"]
    runs = cut_and_chosen(names, texts, sum(map(len, texts)), 0.2)
    held = {(names[r.document], r.begin, r.end) for r in runs if r.is_held_out}
    trained = {(names[r.document], r.begin, r.end) for r in runs if not r.is_held_out}
    assert not held & trained


@pytest.mark.parametrize(("held_out", "near"), [(49, True), (24, False), (101, False), (0, False), (100, True)])
def test_near_is_between_half_and_twice(held_out, near):
    assert is_near(held_out, 1000, 0.05) is near
