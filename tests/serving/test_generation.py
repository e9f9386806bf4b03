"""A prompt is continued as asked: what comes, when it stops, what it was."""

import copy

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from tests.serving.checkpoints import RECITED, byte_tokenizer, write_random_checkpoint, write_reciting_checkpoint
from transxssm.models import TransXSSMConfig, TransXSSMForCausalLM, load_model
from transxssm.serving import GenerationSettings, TextStream, encode_prompt, generate_text
from transxssm.serving.generation import decoding_threads

CPU = torch.device("cpu")
GREEDY = {"temperature": 0.0}
TOKENIZER = byte_tokenizer()


@pytest.fixture(scope="module")
def reciting(tmp_path_factory):
    return load_model(write_reciting_checkpoint(tmp_path_factory.mktemp("reciting")), dtype=None, device=CPU)


@pytest.fixture(scope="module")
def random_model(tmp_path_factory):
    return load_model(write_random_checkpoint(tmp_path_factory.mktemp("random")), dtype=None, device=CPU)


def complete(model, prompt: str, **settings):
    pieces = []
    ids = encode_prompt(TOKENIZER, prompt, model.config.vocab_size)
    generation = generate_text(model, TOKENIZER, ids, pieces.append, GenerationSettings(**settings))
    return "".join(pieces), generation


@pytest.mark.parametrize("prompt", ["", "x", "x = für ü"])
def test_the_completion_and_what_it_took(reciting, prompt):
    num_bytes = len(RECITED.encode())
    text, generation = complete(reciting, prompt, max_new_tokens=2 * num_bytes, **GREEDY)
    assert text == 2 * RECITED
    assert generation.num_prompt_tokens == 1 + len(prompt.encode())  # bos
    assert generation.num_new_tokens == 2 * num_bytes
    assert generation.prompt_seconds > 0
    assert generation.decode_seconds > 0


def test_it_ends_with_the_document(tmp_path):
    model = load_model(write_reciting_checkpoint(tmp_path, rounds=False), dtype=None, device=CPU)
    text, generation = complete(model, "x", max_new_tokens=100, **GREEDY)
    assert text == RECITED
    assert generation.num_new_tokens == len(RECITED.encode()) + 1  # eos


def test_a_stop_string_ends_generation_at_once(reciting):
    calls = []
    with reciting.register_forward_hook(lambda *arguments: calls.append(1)):
        text, generation = complete(reciting, "x", max_new_tokens=1000, stop_strings=["no", "€"], **GREEDY)
    assert text == "def(é"
    assert generation.num_new_tokens == len(calls) == len("def(é€".encode())


def test_the_seed_decides(random_model):
    first, _ = complete(random_model, "a", max_new_tokens=30, seed=3)
    assert complete(random_model, "a", max_new_tokens=30, seed=3)[0] == first
    assert complete(random_model, "a", max_new_tokens=30, seed=4)[0] != first


def test_greedy_is_the_limit_of_a_low_temperature_and_of_a_low_top_p(random_model):
    greedy, _ = complete(random_model, "a", max_new_tokens=30, **GREEDY)
    assert complete(random_model, "a", max_new_tokens=30, temperature=1e-4)[0] == greedy
    assert complete(random_model, "a", max_new_tokens=30, temperature=1.0, top_p=1e-6)[0] == greedy
    assert complete(random_model, "a", max_new_tokens=30, temperature=1.0, top_p=1.0)[0] != greedy
    assert complete(random_model, "a", max_new_tokens=30, temperature=1.0, top_p=1.0, top_k=1)[0] == greedy


def test_top_k_draws_from_the_likeliest_tokens(random_model):
    prompt = encode_prompt(TOKENIZER, "a", 258)
    likeliest = {bytes([token]) for token in random_model(prompt).logits[0, -1].topk(3).indices.tolist() if token < 256}
    drawn = {
        complete(random_model, "a", max_new_tokens=1, temperature=9.0, top_p=1.0, top_k=3, seed=seed)[0].encode()
        for seed in range(30)
    }
    assert drawn - {b""} <= likeliest  # nothing is written of a byte that is no whole character
    assert (
        complete(random_model, "a", max_new_tokens=30, temperature=9.0, top_p=1.0)[0]
        != (complete(random_model, "a", max_new_tokens=30, temperature=9.0, top_p=1.0, top_k=3)[0])
    )


def test_a_penalty_on_repetition_holds_for_greedy_choices_too(random_model):
    prompt = encode_prompt(TOKENIZER, "a", 258)
    tokens = random_model.generate(prompt, max_new_tokens=12, do_sample=False, repetition_penalty=1e9)[0].tolist()
    assert len(set(tokens)) == len(tokens)  # none comes twice
    expected = TOKENIZER.decode(tokens[prompt.shape[1] :], skip_special_tokens=True).removesuffix("\ufffd")
    assert complete(random_model, "a", max_new_tokens=12, repetition_penalty=1e9, **GREEDY)[0] == expected
    assert complete(random_model, "a", max_new_tokens=12, **GREEDY)[0] != expected


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_new_tokens": 0}, "max-new-tokens must be at least 1: got 0"),
        ({"temperature": -0.1}, "temperature must be 0 (greedy) or more: got -0.1"),
        ({"temperature": float("nan")}, "got nan"),
        ({"temperature": float("inf")}, "got inf"),
        ({"top_p": 0.0}, "top-p must be more than 0 and at most 1: got 0.0"),
        ({"top_p": 1.1}, "got 1.1"),
        ({"top_k": -1}, "top-k must be at least 1, or 0 for all tokens: got -1"),
        ({"repetition_penalty": 0.0}, "repetition-penalty must be more than 0, and 1 for none: got 0.0"),
        ({"repetition_penalty": float("inf")}, "got inf"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"seed": 2**64}, "less than 2**64"),
        ({"stop_strings": ["a", ""]}, "a stop string must not be empty"),
    ],
)
def test_settings_out_of_range_are_refused(settings, words):
    with pytest.raises(ValueError) as refusal:  # noqa: PT011 (the words are compared below)
        GenerationSettings(**settings)
    assert words in str(refusal.value)


class TestEncodePrompt:
    def test_begins_with_bos_once(self):
        bos = TOKENIZER.bos_token_id
        assert encode_prompt(TOKENIZER, "", 258).tolist() == [[bos]]
        assert encode_prompt(TOKENIZER, "ab", 258).tolist() == [[bos, 97, 98]]

    def test_begins_with_eos_where_there_is_no_bos(self):
        tokenizer = byte_tokenizer()
        tokenizer.bos_token = None
        tokenizer.backend_tokenizer.post_processor = None
        assert encode_prompt(tokenizer, "a", 258).tolist() == [[tokenizer.eos_token_id, 97]]

    def test_refuses_an_empty_prompt_without_a_token_to_start_from(self):
        tokenizer = byte_tokenizer()
        tokenizer.bos_token = tokenizer.eos_token = None
        tokenizer.backend_tokenizer.post_processor = None
        with pytest.raises(ValueError, match="neither bos_token nor eos_token"):
            encode_prompt(tokenizer, "", 258)

    def test_refuses_ids_outside_the_vocabulary(self):
        with pytest.raises(ValueError, match="got 256, expected 0 … 255"):
            encode_prompt(TOKENIZER, "a", 256)


class TestPrompts:
    """Byte b is token b, and `<|endoftext|>`, 256, is both bos and eos; the tokenizer begins with it."""

    @pytest.mark.parametrize(
        ("prompt", "trained_here", "ids"),
        [
            ("ab", True, [256, 97, 98]),
            ("ab", False, [256, 97, 98]),
            ("", False, [256]),
            ("<|endoftext|>ab", True, [256, 97, 98]),
            ("ab<|endoftext|>", True, [256, 97, 98, 256]),
        ],
    )
    def test_a_document_begins_once(self, prompt, trained_here, ids):
        assert encode_prompt(TOKENIZER, prompt, 258, trained_here=trained_here).tolist() == [ids]

    @pytest.mark.parametrize(("prompt", "here", "elsewhere"), [("ab", [256, 97, 98], [97, 98]), ("", [256], [256])])
    def test_a_tokenizer_that_adds_nothing_is_trusted_where_it_was_trained(self, prompt, here, elsewhere):
        tokenizer = byte_tokenizer()
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A", special_tokens=[])
        assert encode_prompt(tokenizer, prompt, 258).tolist() == [here]
        assert encode_prompt(tokenizer, prompt, 258, trained_here=False).tolist() == [elsewhere]

    def test_an_end_that_the_tokenizer_adds_is_not_one(self):
        tokenizer = byte_tokenizer()
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", 256)]
        )
        assert tokenizer("ab")["input_ids"] == [97, 98, 256]
        assert encode_prompt(tokenizer, "ab", 258).tolist() == [[256, 97, 98]]


class TestTheModelsOwnSettings:
    @pytest.fixture
    def own(self, random_model):
        kept = copy.deepcopy(random_model.generation_config)
        yield random_model.generation_config
        random_model.generation_config = kept

    def test_its_ends_end_a_text(self, random_model, own):
        prompt = encode_prompt(TOKENIZER, "a", 258)
        tokens = random_model.generate(prompt, max_new_tokens=12, do_sample=False)[0, prompt.shape[1] :].tolist()
        own.eos_token_id = [TOKENIZER.eos_token_id, tokens[3]]
        _, generation = complete(random_model, "a", max_new_tokens=12, **GREEDY)
        assert generation.num_new_tokens == tokens.index(tokens[3]) + 1 < 12

    @pytest.mark.parametrize("setting", [{"num_beams": 3}, {"repetition_penalty": 5.0}, {"no_repeat_ngram_size": 1}])
    def test_greedy_is_the_likeliest_token_whatever_they_say(self, random_model, own, setting):
        plain, _ = complete(random_model, "a", max_new_tokens=12, **GREEDY)
        own.update(**setting)
        assert complete(random_model, "a", max_new_tokens=12, **GREEDY)[0] == plain


class TestDecodingThreads:
    """A token's weights are shared by so many threads that each has enough of them to be worth its waiting for the others."""

    @pytest.fixture
    def eight(self, monkeypatch):
        """Eight threads, as torch says, and what is done about them."""
        chosen = [8]
        monkeypatch.delenv("OMP_NUM_THREADS")
        monkeypatch.setattr(torch, "get_num_threads", lambda: chosen[-1])
        monkeypatch.setattr(torch, "set_num_threads", chosen.append)
        return chosen

    @pytest.mark.parametrize(
        ("sizes", "dtype", "threads"),
        [
            ({}, torch.float32, 1),  # 9 MB
            (
                {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16},
                torch.float32,
                6,
            ),
            ({"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16}, torch.bfloat16, 3),
            ({"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32}, torch.float32, 8),
            # A head is read as a whole, and of embeddings beside it one row.
            ({"vocab_size": 2**20}, torch.float32, 8),
            ({"vocab_size": 2**18}, torch.float32, 2),
            ({"vocab_size": 2**18, "tie_word_embeddings": False}, torch.float32, 2),
        ],
        ids=str,
    )
    def test_they_follow_from_the_bytes_of_a_token(self, eight, sizes, dtype, threads):
        with torch.device("meta"):
            model = TransXSSMForCausalLM(TransXSSMConfig.from_preset("tiny", **sizes))
        assert decoding_threads(model.to(dtype)) == threads

    def test_the_users_own_number_is_obeyed(self, random_model, eight, monkeypatch):
        assert decoding_threads(random_model) == 1
        monkeypatch.setenv("OMP_NUM_THREADS", "8")
        assert decoding_threads(random_model) == 8

    def test_the_prompt_has_all_of_them_and_they_are_given_back(self, random_model, eight):
        seen = []
        with random_model.register_forward_hook(lambda *arguments: seen.append(eight[-1])):
            complete(random_model, "abc", max_new_tokens=4, **GREEDY)
        assert seen == [8, 1, 1, 1]
        assert eight[-1] == 8

        def fail(*arguments):
            if eight[-1] == 1:
                raise RuntimeError("in the middle")

        with random_model.register_forward_hook(fail), pytest.raises(RuntimeError, match="in the middle"):
            complete(random_model, "abc", max_new_tokens=4, **GREEDY)
        assert eight[-1] == 8


def pieces_of(tokenizer, ids: list[int], stop_strings=()) -> list[str]:
    """What a stream writes, with "|" after each token."""
    pieces = []
    stream = TextStream(tokenizer, pieces.append, stop_strings)
    for token in ids:
        stream.push(token)
        pieces.append("|")
    stream.end()
    return pieces


def text_of(pieces: list[str]) -> str:
    return "".join(piece for piece in pieces if piece != "|")


TEXTS = ["plain", "é€😀", "a\u0301 e\u200d👩‍👩‍👧", "\r\n\t\x00", "a\ufffdb"]


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_a_character_comes_when_all_its_bytes_are_there(text):
    pieces = pieces_of(byte_tokenizer(), list(text.encode()))
    assert text_of(pieces) == text
    if "\ufffd" not in text:  # that one looks like an incomplete character until the next token
        expected = [part for character in text for part in ["|"] * (len(character.encode()) - 1) + [character, "|"]]
        assert pieces == expected


def test_bytes_that_are_no_text_hold_nothing_up():
    pieces = pieces_of(byte_tokenizer(), [0xFF, 0xE2, ord("a"), ord("b")])
    assert text_of(pieces).endswith("ab")
    assert pieces[:2] == ["|", "|"]


def test_a_character_that_never_gets_all_its_bytes_is_left_out():
    assert text_of(pieces_of(byte_tokenizer(), [ord("a"), 0xE2, 0x82])) == "a"


def test_special_tokens_are_left_out():
    tokenizer = byte_tokenizer()
    assert text_of(pieces_of(tokenizer, [ord("a"), tokenizer.eos_token_id, ord("b")])) == "ab"


def test_a_tokens_text_may_depend_on_the_one_before():
    """A decoder that drops the first word's space must keep those of the others."""
    words = {"▁state": 0, "▁space": 1, "s": 2}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="s"))
    tokenizer.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    assert text_of(pieces_of(tokenizer, [0, 1, 2, 0])) == "state spaces state"


@pytest.mark.parametrize(
    ("text", "stop_strings", "expected"),
    [
        ("one\ntwo", ["\n"], "one"),
        ("a##b###c", ["###"], "a##b"),
        ("a####c", ["###"], "a"),
        ("aab", ["aab"], ""),
        ("aaab", ["aab"], "a"),
        ("xyz", ["yq", "z"], "xy"),
        ("1 end 2 stop", ["stop", "end"], "1 "),
        ("pré€fix", ["€"], "pré"),
        ("never", ["absent"], "never"),
        ("half of a sto", ["stop"], "half of a sto"),
    ],
)
def test_nothing_from_a_stop_string_on(text, stop_strings, expected):
    assert text_of(pieces_of(byte_tokenizer(), list(text.encode()), stop_strings)) == expected


@pytest.mark.parametrize("stop_strings", [["\n"], ["#", "\n"], ["\n", "#"]], ids=ascii)
def test_a_stop_string_inside_one_token_ends_the_text_before_the_first(stop_strings):
    tokenizer = Tokenizer(models.WordLevel({"ab\ncd#": 0, "x": 1}, unk_token="x"))
    assert text_of(pieces_of(PreTrainedTokenizerFast(tokenizer_object=tokenizer), [0, 1], stop_strings)) == "ab"


def test_text_is_held_back_only_while_it_could_become_a_stop_string():
    assert pieces_of(byte_tokenizer(), list(b"a#b##c"), ["##!"]) == ["a", "|", "|", "#b", "|", "|", "|", "##c", "|"]
