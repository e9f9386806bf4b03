"""Needles score an oracle 100 % and a random model 0 %, whichever way the answer is heard."""

import re

import pytest
import torch

from tests.evaluation.models import Oracle, random_model
from tests.models.tiny import tiny_model
from tests.serving.checkpoints import byte_tokenizer
from transxssm.data import Haystack
from transxssm.evaluation import Decoding, TokenScorer, judge_for, needle_plans, needle_table, plot_needle
from transxssm.evaluation.needle import expects_answer, greedy_continuation, measure_needle

TOKENIZER = byte_tokenizer()
NUMBER = re.compile(r"\d{5}(?!\d)")


@pytest.fixture(scope="module")
def haystack():
    return Haystack(["\n".join(f"def function_{n}(): return {n}" for n in range(99))], TOKENIZER, max_tokens=10**5)


def next_byte_of_answer(ids):
    """The answer is the only number of five digits; how much of it is written already is told by the text's end."""
    text = TOKENIZER.decode(ids)
    answer = " " + NUMBER.search(text).group()
    written = next(size for size in range(len(answer), -1, -1) if text.endswith(answer[:size]))
    return ord(answer[written]) if written < len(answer) else None


def reads(model, haystack, decoding, **options):
    arguments = {"length": 400, "depth": 0.4, "num_examples": 6, "num_distractors": 0, "seed": 0} | options
    judge = judge_for(decoding, TokenScorer(model), haystack)
    return measure_needle(judge, haystack, **arguments, advance=lambda steps: None)


@pytest.mark.parametrize("decoding", list(Decoding))
def test_an_oracle_finds_every_needle(haystack, decoding):
    cell = reads(Oracle(258, next_byte_of_answer, last=8), haystack, decoding)
    assert (cell["found"], cell["accuracy"], cell["examples"]) == (6, 1.0, 6)
    assert 350 < cell["mean_tokens"] <= 400


@pytest.mark.parametrize("decoding", list(Decoding))
def test_one_that_errs_in_the_last_digit_finds_none(haystack, decoding):
    def rule(ids):
        byte = next_byte_of_answer(ids)
        return ord("x") if NUMBER.search(TOKENIZER.decode(ids)).group()[:-1] in TOKENIZER.decode(ids[-4:]) else byte

    assert reads(Oracle(258, rule, last=8), haystack, decoding)["found"] == 0


@pytest.mark.parametrize("decoding", list(Decoding))
def test_a_random_model_finds_none(haystack, decoding):
    assert reads(tiny_model(vocab_size=258, dtype=torch.float32), haystack, decoding)["found"] == 0


@pytest.mark.parametrize("kind", ["transxssm", "llama"])
def test_both_ways_of_hearing_agree_on_what_a_model_writes(kind):
    """An example whose answer is what the model would write: found; with another last token: not."""
    model = random_model(kind)
    prompt = [5, 9, 2, 7, 7, 30, 4]
    written = greedy_continuation(model, prompt, 5)
    ids = list(prompt)
    for token in written:  # without a cache
        with torch.no_grad():
            assert token == model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()
        ids.append(token)
    from transxssm.data import NeedleExample

    scorer = TokenScorer(model)
    assert expects_answer(scorer, NeedleExample(prompt, written, "", 0.0))
    assert not expects_answer(scorer, NeedleExample(prompt, [*written[:-1], (written[-1] + 1) % 97], "", 0.0))


def test_settings_of_the_checkpoint_do_not_reach_greedy_decoding():
    model = random_model("llama")
    written = greedy_continuation(model, [5, 9, 2], 12)
    model.generation_config.repetition_penalty = 9.0
    model.generation_config.do_sample = True
    model.generation_config.temperature = 5.0
    assert greedy_continuation(model, [5, 9, 2], 12) == written


def test_more_tokens_than_a_model_has_positions():
    with pytest.raises(ValueError, match="cannot read 65 tokens"):
        greedy_continuation(random_model("gpt2"), [1] * 65, 2)


def test_plans_and_table(haystack):
    judge = judge_for(Decoding.TEACHER_FORCED, TokenScorer(Oracle(258, next_byte_of_answer, last=8)), haystack)
    plans = needle_plans(
        judge, haystack, lengths=[300, 400], depths=[0.0, 0.5], num_examples=1, num_distractors=0, seed=0
    )
    assert [plan.key for plan in plans] == ["300/0", "300/0.5", "400/0", "400/0.5"]
    steps: list[int] = []
    table = needle_table([plan.measure(steps.append) for plan in plans[:3]])
    assert steps == [1, 1, 1]
    assert table.headings == ["depth", "300", "400"]
    assert table.rows == [["0%", "100%", "100%"], ["50%", "100%", ""]]


NEEDLE = [
    {"length": 512, "depth": 0.0, "accuracy": 1.0},
    {"length": 512, "depth": 1.0, "accuracy": 0.5},
    {"length": 1024, "depth": 0.0, "accuracy": 0.0},
]


def test_needle_is_a_map(drawn):
    axes = drawn(plot_needle, NEEDLE)
    assert axes.get_images()[0].get_array().tolist() == [[1.0, 0.0], [0.5, None]]


def test_a_picture_of_needle_is_a_png(tmp_path):
    plot_needle(tmp_path / "picture.png", NEEDLE)
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
