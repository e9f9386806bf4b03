"""What is measured of a trained contender beside its held-out loss: perplexity over lengths, recall over tasks, needles."""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from transxssm.data import load_corpus
from transxssm.evaluation import (
    CellPlan,
    Decoding,
    Results,
    TokenScorer,
    judge_for,
    needle_plans,
    perplexity_plans,
    recall_plans,
    select_documents,
)
from transxssm.models import (
    TransXSSMConfig,
    TransXSSMForCausalLM,
    load_causal_lm,
    load_tokenizer,
    read_config,
    read_device,
)
from transxssm.training import Recipe
from transxssm_lab.studies.definition import Study
from transxssm_lab.studies.needle_data import haystack_of
from transxssm_lab.studies.recall_data import MEASURED_SEED, tasks_of

MEASURES = ("perplexity", "recall", "needle")  # sections of a study, which has one of them at most
BATCH_TOKENS = 16384
# Keys of a recipe's model section that are no fields of a configuration.
_NO_FIELDS = ("preset", "architecture")


def evaluate_run(
    study: Study, run_dir: Path, recipe: Recipe, path: Path, overrides: dict[str, Any] | None
) -> dict[str, Any]:
    """Measures what the study asks for of the model in a run folder; measurements that are there already are kept.

    Args:
        study: its `perplexity`, `recall` and `needle` sections say what.
        run_dir: of the trained model.
        recipe: of the run, for its text.
        path: of the JSON file.
        overrides: model keys under which the weights are read; None: as they were trained.

    Returns:
        the cells: by length, by task as "length/pairs", or by place as "length/depth".

    Raises:
        ValueError: no held-out document is as long as the longest window.
    """
    name = next((name for name in MEASURES if getattr(study, name) is not None), None)
    if name is None:
        return {}
    results = Results.open(path, name, {name: study.settings()[name], "model": overrides}, {})
    if wanted_cells(study) <= results.cells.keys():
        return results.cells
    model = _load(run_dir, overrides)
    plans = _plans(
        study, TokenScorer(model), recipe, load_tokenizer(run_dir, model.config) if study.recall is None else None
    )
    results.measure(plans, advance=lambda steps: None, finished=lambda key: None)
    return results.cells


def wanted_cells(study: Study) -> set[str]:
    """Keys of the cells that the study asks for."""
    if study.recall is not None:
        return {f"{length}/{pairs}" for length, pairs in study.recall.sizes}
    if study.needle is not None:
        return {f"{length}/{depth:g}" for length in study.needle.lengths for depth in study.needle.depths}
    return set(map(str, study.perplexity.lengths)) if study.perplexity else set()


def _plans(
    study: Study, scorer: TokenScorer, recipe: Recipe, tokenizer: PreTrainedTokenizerFast | None
) -> list[CellPlan]:
    if study.recall is not None:
        return recall_plans(
            scorer,
            tasks_of(study.recall),
            num_examples=study.recall.num_examples,
            seed=MEASURED_SEED,
            batch_tokens=BATCH_TOKENS,
        )
    assert tokenizer is not None
    texts = load_corpus(recipe.data).held_out["text"]
    if study.needle is not None:
        haystack = haystack_of(study.needle, texts, tokenizer)
        return needle_plans(
            judge_for(Decoding.TEACHER_FORCED, scorer, haystack),
            haystack,
            lengths=study.needle.lengths,
            depths=study.needle.depths,
            num_examples=study.needle.num_examples,
            num_distractors=0,
            seed=MEASURED_SEED,
        )
    assert study.perplexity is not None
    lengths = study.perplexity.lengths
    documents = select_documents(texts, tokenizer, min_tokens=max(lengths), max_tokens=study.perplexity.max_tokens)
    strides = {length: length // 2 for length in lengths}
    return perplexity_plans(scorer, documents, strides=strides, batch_tokens=BATCH_TOKENS)


def _load(run_dir: Path, overrides: dict[str, Any] | None) -> PreTrainedModel:
    device = read_device("auto")
    if overrides is None:
        return load_causal_lm(run_dir, dtype=None, device=device)
    fields = {name: value for name, value in overrides.items() if name not in _NO_FIELDS}
    trained = {
        name: value for name, value in read_config(run_dir).to_dict().items() if name in TransXSSMConfig.__annotations__
    }
    config = TransXSSMConfig(**{**trained, **fields})
    return TransXSSMForCausalLM.from_pretrained(run_dir, config=config, dtype=torch.float32).to(device).eval()
