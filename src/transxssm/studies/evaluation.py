"""What is measured of a trained contender beside its held-out loss: perplexity over lengths, recall over tasks."""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from transxssm.data import load_corpus
from transxssm.evaluation import Results, TokenScorer, perplexity_plans, recall_plans, select_documents
from transxssm.models import (
    TransXSSMConfig,
    TransXSSMForCausalLM,
    load_causal_lm,
    load_tokenizer,
    read_config,
    read_device,
)
from transxssm.studies.definition import Study
from transxssm.studies.recall_data import MEASURED_SEED, tasks_of
from transxssm.training import Recipe

BATCH_TOKENS = 16384
# Keys of a recipe's model section that are no fields of a configuration.
_NO_FIELDS = ("preset", "architecture")


def evaluate_run(
    study: Study, run_dir: Path, recipe: Recipe, path: Path, overrides: dict[str, Any] | None
) -> dict[str, Any]:
    """Measures what the study asks for of the model in a run folder; measurements that are there already are kept.

    Args:
        study: its `perplexity` and `recall` sections say what.
        run_dir: of the trained model.
        recipe: of the run, for its text.
        path: of the JSON file.
        overrides: model keys under which the weights are read; None: as they were trained.

    Returns:
        the cells: by length, or by task as "length/pairs".

    Raises:
        ValueError: no held-out document is as long as the longest window.
    """
    if study.perplexity is None and study.recall is None:
        return {}
    name = "recall" if study.perplexity is None else "perplexity"
    results = Results.open(path, name, _settings(study, overrides), {})
    if study.recall is not None:
        wanted = {f"{length}/{pairs}" for length, pairs in study.recall.sizes}
    else:
        wanted = set(map(str, study.perplexity.lengths)) if study.perplexity else set()
    if wanted <= results.cells.keys():
        return results.cells
    model = _load(run_dir, overrides)
    scorer = TokenScorer(model)
    if study.recall is not None:
        plans = recall_plans(
            scorer,
            tasks_of(study.recall),
            num_examples=study.recall.num_examples,
            seed=MEASURED_SEED,
            batch_tokens=BATCH_TOKENS,
        )
    else:
        assert study.perplexity is not None
        lengths = study.perplexity.lengths
        documents = select_documents(
            load_corpus(recipe.data).held_out["text"],
            load_tokenizer(run_dir, model.config),
            min_tokens=max(lengths),
            max_tokens=study.perplexity.max_tokens,
        )
        strides = {length: length // 2 for length in lengths}
        plans = perplexity_plans(scorer, documents, strides=strides, batch_tokens=BATCH_TOKENS)
    results.measure(plans, advance=lambda steps: None, finished=lambda key: None)
    return results.cells


def _settings(study: Study, overrides: dict[str, Any] | None) -> dict[str, Any]:
    settings = study.settings()
    return {"perplexity": settings["perplexity"], "recall": settings["recall"], "model": overrides}


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
