"""Conversations: what is refused, how they are laid out, and that only the answers are learnt, up to a trained model that answers."""

import json

import numpy as np
import pytest
from transformers import AutoTokenizer

from tests.serving.checkpoints import byte_tokenizer, write_random_checkpoint
from transxssm.data import Corpus, DataArguments, PackedCollator, build_datasets, build_tokenizer, load_corpus
from transxssm.data.chat import conversation_text, said, set_chat_template, tokenize_conversations
from transxssm.data.packing import IGNORED_LABEL
from transxssm.training import load_recipe, train

CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " ¿Qué? "},
    {"role": "assistant", "content": "Sí 😀."},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "Bye."},
]


def write_conversations(path, number: int = 40):
    lines = [
        json.dumps({"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n}!"}]})
        for n in range(number)
    ]
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def tokenizer():
    tokenizer = byte_tokenizer()
    set_chat_template(tokenizer)
    return tokenizer


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ("hello", "must be a list"),
        ([], "must be a list that is not empty"),
        ([{"role": "robot", "content": "x"}], "one of system, user, assistant"),
        (["x"], "expected messages with a role"),
        ([{"role": "user", "content": ["x"]}], "must be a string"),
        ([{"role": "user", "content": "x"}], "the assistant says nothing"),
        ([{"role": "assistant", "content": " "}], "the assistant says nothing"),
    ],
)
def test_refuses(messages, expected):
    with pytest.raises(ValueError, match=rf"line 3.*{expected}"):
        conversation_text(messages, "line 3")


def test_targets_are_the_answers_and_their_ends(tokenizer):
    [(ids, is_target)] = tokenize_conversations([conversation_text(CONVERSATION, "here")], tokenizer)
    assert tokenizer.decode(ids) == (
        "<|endoftext|>system\nBe brief.<|endoftext|>user\n¿Qué?<|endoftext|>assistant\nSí 😀.<|endoftext|>"
        "user\nBye<|endoftext|>assistant\nBye.<|endoftext|>"
    )
    assert tokenizer.decode(ids[is_target == 1]) == "Sí 😀.<|endoftext|>Bye.<|endoftext|>"
    assert said(conversation_text(CONVERSATION, "here"), roles=("assistant",)) == "Sí 😀.\nBye."


def test_prompt_is_what_stands_before_an_answer(tokenizer):
    prompt = tokenizer.apply_chat_template(CONVERSATION[:2], add_generation_prompt=True)["input_ids"]
    [(ids, is_target)] = tokenize_conversations([conversation_text(CONVERSATION, "here")], tokenizer)
    assert list(ids[: len(prompt)]) == prompt
    assert not is_target[: len(prompt)].any()
    assert is_target[len(prompt)]


def test_template_that_marks_no_answers_is_refused(tokenizer):
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match="does not mark what the assistant says"):
        set_chat_template(tokenizer)


def test_rows_and_labels(tmp_path):
    path = write_conversations(tmp_path / "talk.jsonl")
    data = DataArguments(
        corpus=str(path), format="chat", tokenizer="bytes", sequence_length=40, cache_dir=str(tmp_path / "cache")
    )
    corpus = load_corpus(data)
    assert (len(corpus.train), len(corpus.held_out)) == (38, 2)  # none is cut
    tokenizer = build_tokenizer(data, corpus)
    rows = build_datasets(data, corpus, tokenizer)
    batch = PackedCollator(tokenizer)([rows.train[index] for index in range(len(rows.train))])
    labels, ids = batch["labels"].numpy(), batch["input_ids"].numpy()
    answers = tokenizer.decode(ids[labels != IGNORED_LABEL])
    assert set(answers.replace("<|endoftext|>", "")) <= set("0123456789!")
    assert np.array_equal(labels[labels != IGNORED_LABEL], ids[labels != IGNORED_LABEL])
    assert rows.held_out_bytes == sum(len(said(text, roles=("assistant",))) for text in corpus.held_out["text"])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"format": "talk"}, "data.format must be one of text, chat"),
        ({"text_column": "messages"}, "data.format=chat reads conversations"),
        ({"format": "chat", "text_column": "turns"}, "in the column 'messages'"),
    ],
)
def test_settings_that_contradict_each_other(settings, expected):
    with pytest.raises(ValueError, match=expected):
        DataArguments(**settings)


def test_embedded_text_holds_no_conversations():
    with pytest.raises(ValueError, match="which has none; name a file"):
        load_corpus(DataArguments(format="chat"))


def test_one_conversation_cannot_be_split(tmp_path):
    path = write_conversations(tmp_path / "talk.jsonl", number=1)
    with pytest.raises(ValueError, match="it is one conversation"):
        load_corpus(DataArguments(corpus=str(path), format="chat", cache_dir=str(tmp_path)))


def test_bpe_learns_what_is_said_and_not_its_json(tmp_path):
    path = tmp_path / "talk.jsonl"
    message = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path.write_text("\n".join(json.dumps({"messages": message, "name": str(n)}) for n in range(50)))
    data = DataArguments(corpus=str(path), format="chat", vocab_size=300, cache_dir=str(tmp_path / "cache"))
    vocabulary = build_tokenizer(data, load_corpus(data)).get_vocab()
    assert not any("role" in token or "assist" in token for token in vocabulary)


def test_training_goes_on_from_a_checkpoint(tmp_path):
    base = write_random_checkpoint(tmp_path / "base")
    path = write_conversations(tmp_path / "talk.jsonl", number=100)
    overrides = [
        f"model.checkpoint={base}",
        f"data.corpus={path}",
        f"data.cache_dir={tmp_path / 'cache'}",
        "data.sequence_length=32",
        f"training.output_dir={tmp_path / 'run'}",
        "training.max_steps=2",
        "training.learning_rate=1.0e-9",
        "training.weight_decay=0.0",
        "training.use_cpu=true",
    ]
    recipe = load_recipe("chat", overrides)
    train(recipe)
    tuned = AutoTokenizer.from_pretrained(tmp_path / "run")
    assert tuned.chat_template == build_tokenizer(recipe.data, Corpus(None, None, "")).chat_template
    from transxssm import TransXSSMForCausalLM

    before, after = (TransXSSMForCausalLM.from_pretrained(folder).state_dict() for folder in (base, tmp_path / "run"))
    assert before.keys() == after.keys()
    for name, weight in before.items():
        np.testing.assert_allclose(after[name].float(), weight.float(), atol=1e-6, err_msg=name)


def test_checkpoint_says_what_the_model_is(tmp_path):
    base = write_random_checkpoint(tmp_path / "base")
    with pytest.raises(ValueError, match=r"got model\.preset beside it"):
        load_recipe("chat", [f"model.checkpoint={base}", "model.preset=tiny"])
    with pytest.raises(ValueError, match="nowhere"):
        load_recipe("chat", ["model.checkpoint=nowhere"])
