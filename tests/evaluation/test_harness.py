"""The harness around a loaded model: offline on local tasks, equal to its own `hf` backend, log-likelihoods as by hand."""

import json
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml

from tests.serving.checkpoints import write_random_checkpoint
from transxssm.evaluation import expand_groups, harness, harness_plans, harness_table, plot_harness
from transxssm.models import load_causal_lm, load_tokenizer

lm_eval = pytest.importorskip("lm_eval")
QUESTIONS = [
    {"question": f"def f{n}(x):\n    return", "choices": [" x + é", " None", f" {n}"], "answer": n % 3}
    for n in range(5)
]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    """Two tasks in YAML, with their data beside them: one of choices, one of greedy answers."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "questions.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
    }
    choice = {
        "task": "local_choice",
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    writing = {
        "task": "local_writing",
        "output_type": "generate_until",
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    for task in (choice, writing):
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(common | task))
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("harness") / "model")


@pytest.fixture(scope="module")
def loaded(checkpoint):
    model = load_causal_lm(checkpoint, dtype=None, device=torch.device("cpu"))
    return model, load_tokenizer(checkpoint, model.config)


def plans_for(loaded, names, tasks, **options):
    settings = {"include_path": tasks, "num_fewshot": None, "limit": None, "batch_size": 2} | options
    return harness_plans(*loaded, names, **settings)


def test_figures_are_those_of_the_hf_backend(loaded, checkpoint, tasks):
    names = ["local_choice", "local_writing"]
    cells = {plan.key: plan.measure(lambda steps: None) for plan in plans_for(loaded, names, tasks)}
    theirs = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(checkpoint), "dtype": "float32"},
        tasks=names,
        task_manager=lm_eval.tasks.TaskManager(include_path=str(tasks), include_defaults=False),
        batch_size=1,
        device="cpu",
    )["results"]
    ours = {name: cells[name]["results"][name] for name in names}
    assert set(ours["local_choice"]) == {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr"}
    for name in names:
        assert ours[name] == {
            key.replace(",none", ""): value for key, value in theirs[name].items() if key.endswith(",none")
        }
    assert cells["local_choice"]["samples"] == {"local_choice": 5}


def test_log_likelihoods_are_sums_by_hand(loaded):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = loaded
    pairs = [(question["question"], choice) for question in QUESTIONS for choice in question["choices"]]
    requests = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
    found = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4).loglikelihood(requests, disable_tqdm=True)
    for (context, continuation), (total, greedy) in zip(pairs, found, strict=True):
        ids = tokenizer(context + continuation)["input_ids"]
        first = len(tokenizer(context)["input_ids"])
        with torch.no_grad():
            log_probs = F.log_softmax(model(input_ids=torch.tensor([ids])).logits[0].double(), dim=-1)
        expected = sum(log_probs[place - 1, ids[place]].item() for place in range(first, len(ids)))
        assert total == pytest.approx(expected, abs=1e-4)
        assert greedy == all(log_probs[place - 1].argmax() == ids[place] for place in range(first, len(ids)))


def test_limit_and_shots(loaded, tasks):
    (plan,) = plans_for(loaded, ["local_choice"], tasks, limit=2, num_fewshot=1)
    cell = plan.measure(lambda steps: None)
    assert (cell["samples"], cell["shots"]) == ({"local_choice": 2}, {"local_choice": 1})


def test_data_that_cannot_be_had(loaded, tmp_path):
    for name, path in (("absent", "json"), ("distant", "someone/something")):
        task = {"task": name, "dataset_path": path, "output_type": "multiple_choice", "test_split": "test"}
        if path == "json":
            task["dataset_kwargs"] = {"data_files": {"test": str(tmp_path / "absent.jsonl")}}
        task |= {"doc_to_text": "q", "doc_to_choice": ["a", "b"], "doc_to_target": 0}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(task))
        (plan,) = plans_for(loaded, [name], tmp_path)
        with pytest.raises(ValueError, match=f"the data of task {name} cannot be had: .*--include-path") as caught:
            plan.measure(lambda steps: None)
        assert "\n" not in str(caught.value)


def test_no_folder_of_tasks(loaded, tmp_path):
    with pytest.raises(ValueError, match="no folder of tasks"):
        plans_for(loaded, ["local_choice"], tmp_path / "absent")


def test_an_unknown_task(loaded, tasks, monkeypatch):
    """lm-eval's own tasks are looked through only then; here they are few."""
    own = lm_eval.tasks.TaskManager

    def quick(include_path=None, include_defaults=True):
        return own(include_path=include_path, include_defaults=False)

    monkeypatch.setattr("lm_eval.tasks.TaskManager", quick)
    with pytest.raises(ValueError, match="unknown task 'no_such': expected transxssm-paper"):
        plans_for(loaded, ["local_choice", "no_such"], tasks)


def test_without_the_package(loaded, tasks, monkeypatch):
    def absent(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(harness, "version", absent)
    with pytest.raises(ValueError, match=r"pip install 'transxssm\[eval\]'"):
        plans_for(loaded, ["local_choice"], tasks)


class TestPaperGroup:
    def test_is_seven_tasks(self):
        names = expand_groups(["piqa", "transxssm-paper", "local"])
        assert names == ["piqa", "mmlu", "triviaqa", "hellaswag", "openbookqa", "winogrande", "ai2_arc", "local"]

    def test_tasks_are_there(self):
        folder = Path(lm_eval.__file__).parent / "tasks"
        for name in ("mmlu/default/_mmlu.yaml", "triviaqa/default.yaml", "piqa/piqa.yaml", "arc/arc_easy.yaml"):
            assert (folder / name).is_file()

    def test_its_mean_weighs_every_task_alike(self):
        cells = {name: self.cell(**{name: {"acc": 0.5, "acc_norm": 1.0}}) for name in harness.GROUPS["transxssm-paper"]}
        cells["mmlu"] = self.cell(mmlu={"acc": 0.1}, mmlu_law={"acc": 0.9})
        cells["triviaqa"] = self.cell(triviaqa={"exact_match,remove_whitespace": 0.3})
        cells["ai2_arc"] = self.cell(arc_easy={"acc": 0.6}, arc_challenge={"acc": 0.2})
        assert harness.paper_mean(cells) == pytest.approx((0.1 + 0.3 + 4 * 0.5 + 0.4) / 7)
        table = harness_table(cells)
        assert table.rows[-1][:4] == ["mean of the paper's seven", "acc, exact_match", "", "0.4000"]
        assert [row[0] for row in table.rows].count("mmlu_law") == 0  # of a group the aggregate
        assert {"arc_easy", "arc_challenge"} <= {row[0] for row in table.rows}

    def cell(self, **results):
        return {"results": results, "shots": dict.fromkeys(results, 0), "samples": {}, "versions": {}}


HARNESS = {"piqa": {"results": {"piqa": {"acc": 0.5}}}}


def test_the_harness_has_a_bar_a_task(drawn):
    axes = drawn(plot_harness, HARNESS)
    assert [bar.get_width() for bar in axes.patches] == [0.5]
    assert [text.get_text() for text in axes.texts] == [" 50.0%"]


def test_a_picture_of_harness_is_a_png(tmp_path):
    plot_harness(tmp_path / "picture.png", HARNESS)
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
