"""Needle in a haystack: whether a number is found again, over the length of the text and the depth of the number."""

from collections.abc import Callable, Iterable, Sequence
from enum import StrEnum
from functools import partial
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedModel

from transxssm.data import Haystack, NeedleExample
from transxssm.data.packing import IGNORED_LABEL
from transxssm.evaluation.processes import in_turn
from transxssm.evaluation.results import Advance, Cell, CellPlan, ResultTable
from transxssm.evaluation.scoring import TokenScorer
from transxssm.plotting import draw_heat_map, picture

Judge = Callable[[NeedleExample], bool]


class Decoding(StrEnum):
    """How the answer is obtained.

    GREEDY: the model generates as many tokens as the answer has. TEACHER_FORCED: one forward pass over prompt and answer, in which each
    token of the answer must be the likeliest. In exact arithmetic both give the same result; the latter needs no cache.
    """

    GREEDY = "greedy"
    TEACHER_FORCED = "teacher-forced"


def judge_for(decoding: Decoding, scorer: TokenScorer, haystack: Haystack) -> Judge:
    """The function that says whether a model answers an example exactly."""
    match decoding:
        case Decoding.GREEDY:
            tokenizer = haystack.tokenizer

            def writes_answer(example: NeedleExample) -> bool:
                written = greedy_continuation(scorer.model, example.prompt_ids, len(example.answer_ids))
                return tokenizer.decode(written) == tokenizer.decode(example.answer_ids)

            return writes_answer
        case Decoding.TEACHER_FORCED:
            return lambda example: expects_answer(scorer, example)


def greedy_continuation(model: PreTrainedModel, prompt_ids: Sequence[int], num_tokens: int) -> list[int]:
    """Decodes greedily at most `num_tokens` tokens, or fewer if the model ends the text.

    Raises:
        ValueError: there are more tokens than the model has positions.
    """
    input_ids = torch.tensor([prompt_ids], device=model.device)
    # All settings are given, since a checkpoint's own generation settings would apply to the others. The pad id is never used.
    settings = GenerationConfig(
        max_new_tokens=num_tokens, do_sample=False, num_beams=1, repetition_penalty=1.0, pad_token_id=0
    )
    try:
        written = model.generate(input_ids, attention_mask=torch.ones_like(input_ids), generation_config=settings)
    except IndexError as error:  # more tokens than learned positions
        raise ValueError(f"the model cannot read {len(prompt_ids)} tokens ({error}); choose shorter lengths") from error
    return written[0, len(prompt_ids) :].tolist()


def expects_answer(scorer: TokenScorer, example: NeedleExample) -> bool:
    """Whether every token of the answer is the likeliest after the prompt and the tokens before it."""
    input_ids = torch.tensor([example.input_ids])
    targets = torch.full_like(input_ids, IGNORED_LABEL)
    targets[:, len(example.prompt_ids) - 1 : -1] = torch.tensor(example.answer_ids)
    return bool(scorer(input_ids, targets).hits.all())


def needle_plans(
    judge: Judge,
    haystack: Haystack,
    *,
    lengths: Sequence[int],
    depths: Sequence[float],
    num_examples: int,
    num_distractors: int,
    seed: int,
) -> list[CellPlan]:
    """Plans one cell for each length and depth, with `num_examples` prompts that differ in text, name, number and wording."""
    return [
        CellPlan(
            key=f"{length}/{depth:g}",
            num_steps=num_examples,
            measure=partial(measure_needle, judge, haystack, length, depth, num_examples, num_distractors, seed),
        )
        for length in lengths
        for depth in depths
    ]


def measure_needle(
    judge: Judge,
    haystack: Haystack,
    length: int,
    depth: float,
    num_examples: int,
    num_distractors: int,
    seed: int,
    advance: Advance,
) -> Cell:
    """Measures the share of exact answers at one length and depth."""

    def judged(number: int) -> tuple[bool, int]:
        example = haystack.example(
            length=length, depth=depth, seed=seed, number=number, num_distractors=num_distractors
        )
        return judge(example), len(example.input_ids)

    found, num_tokens = 0, 0
    for is_found, tokens in in_turn(judged, range(num_examples)):
        found += is_found
        num_tokens += tokens
        advance(1)
    return {
        "length": length,
        "depth": depth,
        "examples": num_examples,
        "found": found,
        "accuracy": found / num_examples,
        "mean_tokens": num_tokens / num_examples,
    }


def needle_table(cells: Iterable[Cell]) -> ResultTable:
    """A table of the accuracy, with a row for each depth and a column for each length."""
    accuracy = {(cell["length"], cell["depth"]): cell["accuracy"] for cell in cells}
    lengths = sorted({length for length, _ in accuracy})
    return ResultTable(
        ["depth", *(f"{length:,}" for length in lengths)],
        [
            [
                f"{depth:.0%}",
                *(f"{accuracy[length, depth]:.0%}" if (length, depth) in accuracy else "" for length in lengths),
            ]
            for depth in sorted({depth for _, depth in accuracy})
        ],
    )


def plot_needle(path: Path, cells: Iterable[Cell]) -> None:
    """Plots the share of needles found over lengths and, downwards, depths (the paper's Figure 5)."""
    with picture(path) as axes:
        image = draw_heat_map(axes, cells)
        axes.set_ylabel("depth of the needle")
        axes.figure.colorbar(image, label="found").ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
