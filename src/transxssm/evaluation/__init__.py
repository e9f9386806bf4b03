"""Layer 2: evaluation of trained models by perplexity over context, needles, associative recall and standard tasks."""

from transxssm.evaluation.harness import expand_groups, harness_plans, harness_table, plot_harness, require_harness
from transxssm.evaluation.needle import Decoding, judge_for, needle_plans, needle_table, plot_needle
from transxssm.evaluation.perplexity import (
    longest_document,
    perplexity_plans,
    perplexity_table,
    plot_perplexity,
    select_documents,
)
from transxssm.evaluation.processes import first_process_first, is_first, is_shared, joined
from transxssm.evaluation.recall import STANDARD_SIZES, key_of, plot_recall, recall_plans, recall_table
from transxssm.evaluation.results import Cell, CellPlan, Results, ResultTable
from transxssm.evaluation.scoring import TokenScorer, TokenScores

__all__ = [
    "STANDARD_SIZES",
    "Cell",
    "CellPlan",
    "Decoding",
    "ResultTable",
    "Results",
    "TokenScorer",
    "TokenScores",
    "expand_groups",
    "first_process_first",
    "harness_plans",
    "harness_table",
    "is_first",
    "is_shared",
    "joined",
    "judge_for",
    "key_of",
    "longest_document",
    "needle_plans",
    "needle_table",
    "perplexity_plans",
    "perplexity_table",
    "plot_harness",
    "plot_needle",
    "plot_perplexity",
    "plot_recall",
    "recall_plans",
    "recall_table",
    "require_harness",
    "select_documents",
]
