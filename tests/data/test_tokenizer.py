import json

import pytest
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from transxssm.data import build_tokenizer, load_corpus, tokenize_documents
from transxssm.data import tokenizer as tokenizer_module
from transxssm.data.tokenizer import tokenizer_identity

AWKWARD = {
    "emoji": "🙂👩‍👩‍👧 ok 🏴‍☠️",
    "crlf": "a\r\nb\rc\n\n  d\r\n",
    "tabs": "\tif x:\n\t\treturn\t1\n",
    "spaces": "  leading,   inner    and trailing   ",
    "control": "".join(map(chr, range(1, 32))) + "\x7f\x80\x9f\xa0\xad",
    "scripts": "नमस्ते दुनिया 你好 مرحبا ﬁ e\u0301 é",
    "rare": "\ufeff\u2028\u2029\uffff\U0010ffff\ue000",
    "special": "a<|endoftext|>b<|pad|> <|endoftext|>",
    "digits": "1234567 3.14159 0xdeadbeef ١٢٣",
    "code": "class A:\n    def f(self, *args):\n        return {'a': [1, 2]}\n\n\n# -----\n",
    "empty": "",
}


@pytest.fixture
def build(folder, arguments):
    def make(name: str, **fields) -> PreTrainedTokenizerFast:
        data = arguments(folder, tokenizer=name, **fields)
        return build_tokenizer(data, load_corpus(data))

    return make


@pytest.fixture(params=["bpe", "bytes"])
def tokenizer(request, build) -> PreTrainedTokenizerFast:
    return build(request.param)


@pytest.mark.parametrize("text", AWKWARD.values(), ids=AWKWARD)
def test_every_text_comes_back_to_the_byte(tokenizer, text):
    (document,) = tokenize_documents([text], tokenizer)
    assert tokenizer.decode(document[1:-1]) == text
    if "<|" not in text:
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_a_document_stands_between_the_special_tokens(tokenizer):
    documents = tokenize_documents(["some text", "", "<|endoftext|>"], tokenizer)
    end = tokenizer.eos_token_id
    assert all(document[0] == document[-1] == end for document in documents)
    assert len(documents[1]) == 2
    assert not any(end in document[1:-1] for document in documents), "only packing may end a document"


def test_a_prompt_begins_like_a_document(tokenizer):
    (document,) = tokenize_documents(["some text"], tokenizer)
    assert tokenizer("some text")["input_ids"] == list(document[:-1])


def test_a_run_folder_loads_it_by_auto_tokenizer(tokenizer, tmp_path):
    run = tmp_path / "run"
    tokenizer.save_pretrained(run)
    (run / "config.json").write_text(json.dumps({"model_type": "transxssm"}))
    loaded = AutoTokenizer.from_pretrained(run)
    assert isinstance(loaded, PreTrainedTokenizerFast)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    for text in AWKWARD.values():
        assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert loaded.decode(tokenizer(text)["input_ids"]) == tokenizer.decode(tokenizer(text)["input_ids"])
    assert (loaded.bos_token, loaded.eos_token, loaded.pad_token) == ("<|endoftext|>", "<|endoftext|>", "<|pad|>")
    assert loaded.padding_side == "left"  # so that every prompt of a batch ends where `generate` goes on
    assert tokenizer_identity(loaded) == tokenizer_identity(tokenizer)


def test_bytes_are_their_own_ids(build):
    tokenizer = build("bytes")
    text = "".join(map(chr, range(1, 0x500))) + "🙂"
    (document,) = tokenize_documents([text], tokenizer)
    assert document[1:-1].tolist() == list(text.encode())
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, len(tokenizer)) == (256, 257, 258)


def test_bpe_has_the_size_asked_for_and_its_merges_shorten(build):
    small, large = build("bpe", vocab_size=258), build("bpe", vocab_size=300)
    assert (len(small), len(large)) == (258, 300)
    text = "return value for self in range"
    assert len(small(text)["input_ids"]) == 1 + len(text)
    assert len(large(text)["input_ids"]) < len(text) / 2


def test_a_small_corpus_gives_fewer_tokens_and_says_so(build, caplog):
    tokenizer = build("bpe", vocab_size=4000)
    assert len(tokenizer) < 4000
    assert "asked for 4000" in caplog.text


def test_bpe_never_sees_the_held_out_split(folder, arguments):
    data = arguments(folder)
    corpus = load_corpus(data)
    for name in corpus.held_out["name"]:
        (folder / name).write_text("heldoutword " * 20)
    tokenizer = build_tokenizer(data, load_corpus(data))
    assert not any("held" in token for token in tokenizer.get_vocab())


def test_pieces_keep_indentation_together_and_digits_short(write, arguments):
    code = "def f(x):\n        y = x + 123456\n        return y\n\n\n"
    data = arguments(write({f"{n}.py": code * 20 + f"# {n}\n" for n in range(20)}), vocab_size=400)
    tokenizer = build_tokenizer(data, load_corpus(data))
    tokens = [tokenizer.decode([token]) for token in tokenizer(code)["input_ids"][1:]]
    assert "):\n        " in tokens
    assert "\n        " in tokens
    assert "123" in tokens
    assert "456" in tokens


def test_bpe_is_trained_once_and_the_same_each_time(folder, arguments, tmp_path, monkeypatch):
    first = build_tokenizer(arguments(folder), load_corpus(arguments(folder)))
    elsewhere = arguments(folder, cache_dir=str(tmp_path / "other"))
    second = build_tokenizer(elsewhere, load_corpus(elsewhere))
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()

    def retrained(*_):
        raise AssertionError("trained again")

    monkeypatch.setattr(tokenizer_module, "_train_bpe", retrained)
    cached = build_tokenizer(arguments(folder), load_corpus(arguments(folder)))
    assert cached.backend_tokenizer.to_str() == first.backend_tokenizer.to_str()
    with pytest.raises(AssertionError, match="trained again"):
        build_tokenizer(arguments(folder, vocab_size=290), load_corpus(arguments(folder)))


def test_a_large_corpus_trains_bpe_on_a_sample(folder, arguments, monkeypatch):
    monkeypatch.setattr(tokenizer_module, "BPE_TRAINING_BYTES", 2000)
    corpus = load_corpus(arguments(folder))
    texts = list(tokenizer_module._training_texts(corpus))
    assert 2000 <= sum(len(text.encode()) for text in texts) < 2000 + max(map(len, map(str.encode, texts)))
    assert texts == list(tokenizer_module._training_texts(corpus))


def test_any_fast_tokenizer_loads_from_a_path(build, tmp_path):
    build("bpe").save_pretrained(tmp_path / "mine")
    tokenizer = build(str(tmp_path / "mine"))
    assert tokenizer.get_vocab() == build("bpe").get_vocab()


def test_a_tokenizer_that_does_not_exist_is_refused(build):
    with pytest.raises(ValueError, match="cannot load tokenizer 'no/such'") as refusal:
        build("no/such")
    assert "expected bpe, bytes" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_tokenizer_without_an_end_is_refused(build, tmp_path):
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE())).save_pretrained(tmp_path / "endless")
    with pytest.raises(ValueError, match="no eos_token"):
        build(str(tmp_path / "endless"))


def test_use_leaves_the_identity_unchanged(tokenizer):
    before = tokenizer_identity(tokenizer)
    tokenizer(["a", "longer text"], padding=True, truncation=True, max_length=3)
    assert tokenizer_identity(tokenizer) == before
    tokenize_documents(["text"], tokenizer)
    assert tokenizer_identity(tokenizer) == before
    tokenizer.add_tokens(["another"])
    assert tokenizer_identity(tokenizer) != before
