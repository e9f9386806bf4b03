"""Prompts in, text out as it comes: whole characters only, and nothing from a stop string on."""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

INCOMPLETE = "�"  # what a decoder makes of the first bytes of a character
# Of the weights that a token reads, for each thread that computes it: on two cores a second thread made decoding of 9 MB, 60 MB and
# 120 MB of weights no faster (docs/guides/inference.md has the figures).
BYTES_PER_THREAD = 64 * 2**20


class TextStream:
    """Takes one sequence's new tokens and writes their text in pieces.

    A piece may lag behind its token: while a character lacks bytes, and while the text could still become a stop string.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], object], stop_strings: Sequence[str] = ()
    ) -> None:
        """
        Args:
            tokenizer: of the model; its special tokens are left out of the text.
            write: is called with each piece.
            stop_strings: the text ends before the first of them; none is empty.
        """
        self.stopped = False  # whether a stop string has come
        self._tokenizer = tokenizer
        self._write = write
        self._stop_strings = tuple(stop_strings)
        # Ids not yet written, after those of the piece before: many tokenizers decode a token by what stands before it.
        self._ids: list[int] = []
        self._num_context = 0
        self._held = ""  # text that could be the beginning of a stop string

    def push(self, token: int) -> None:
        """Takes the next token's id; ignores it where the text has stopped."""
        if not self.stopped:
            self._take(self._decode(token))

    def end(self) -> None:
        """Writes what was held back, except a character that never got all its bytes."""
        if not self.stopped:
            self._emit(self._held)
        self._held = ""

    def _decode(self, token: int) -> str:
        self._ids.append(token)
        before, now = (
            self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            for ids in (self._ids[: self._num_context], self._ids)
        )
        if now.endswith(INCOMPLETE) or len(now) <= len(before):
            return ""
        self._ids = self._ids[self._num_context :]
        self._num_context = len(self._ids)
        return now[len(before) :]

    def _take(self, piece: str) -> None:
        text = self._held + piece
        found = [start for stop in self._stop_strings if (start := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            self._emit(text[: min(found)])
            return
        num_held = self._length_of_a_beginning(text)
        self._emit(text[: len(text) - num_held])
        self._held = text[len(text) - num_held :]

    def _length_of_a_beginning(self, text: str) -> int:
        """Length of the longest end of `text` with which a stop string begins."""
        longest = max(map(len, self._stop_strings), default=1) - 1
        return next(
            (
                n
                for n in range(min(longest, len(text)), 0, -1)
                if any(s.startswith(text[-n:]) for s in self._stop_strings)
            ),
            0,
        )

    def _emit(self, text: str) -> None:
        if text:
            self._write(text)


@dataclass(frozen=True)
class GenerationSettings:
    """How tokens are chosen, and when to stop choosing.

    Args:
        max_new_tokens: tokens to generate at most.
        temperature: divides the logits; 0 takes the likeliest token (greedy).
        top_p: of the likeliest tokens, as many as together have this probability; 1: all.
        top_k: so many of the likeliest tokens, before `top_p`; 0: all.
        repetition_penalty: divides the positive logits of tokens that prompt or text have had, and multiplies the negative ones; 1: none.
        seed: of the random numbers.
        stop_strings: the text ends before the first of them.

    Raises:
        ValueError: a value out of its range.
    """

    max_new_tokens: int = 256
    temperature: float = 0.8
    top_p: float = 0.95
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop_strings: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max-new-tokens must be at least 1: got {self.max_new_tokens}")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 (greedy) or more: got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top-p must be more than 0 and at most 1: got {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"top-k must be at least 1, or 0 for all tokens: got {self.top_k}")
        if not 0 < self.repetition_penalty < float("inf"):
            raise ValueError(f"repetition-penalty must be more than 0, and 1 for none: got {self.repetition_penalty}")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed must be at least 0 and less than 2**64: got {self.seed}")
        if not all(self.stop_strings):
            raise ValueError("a stop string must not be empty: every text would end before it began")

    def sampling_arguments(self) -> dict[str, Any]:
        """Those of `GenerationConfig`."""
        repetition = {"repetition_penalty": self.repetition_penalty}
        if self.temperature == 0:
            return {"do_sample": False, **repetition}
        sampling = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return {"do_sample": True, **sampling, **repetition}


def decoding_threads(model: PreTrainedModel) -> int:
    """Threads that decode one sequence: what torch has, but no more than share the weights of a token in parts that are worth it.

    Each operator ends with the threads waiting for one another. For a small model that costs more than they save, and an
    interruption of one of them by another program holds all of them up. `OMP_NUM_THREADS` is obeyed as it is.
    """
    threads = torch.get_num_threads()
    if "OMP_NUM_THREADS" in os.environ:
        return threads
    weights = {id(parameter): parameter for parameter in model.parameters()}
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    if head is None or head.weight is not embedding:  # a token reads one row of the embeddings, and all of a head
        weights.pop(id(embedding), None)
    num_bytes = sum(parameter.numel() * parameter.element_size() for parameter in weights.values())
    return max(1, min(threads, num_bytes // BYTES_PER_THREAD))


@dataclass(frozen=True)
class Generation:
    """What a generation took.

    Args:
        num_prompt_tokens, num_new_tokens: bos and eos included.
        prompt_seconds: up to and with the first new token.
        decode_seconds: of the others.
    """

    num_prompt_tokens: int
    num_new_tokens: int
    prompt_seconds: float
    decode_seconds: float


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: str, vocab_size: int, *, trained_here: bool = True
) -> Tensor:
    """(1, t) ids of a prompt that begins a document.

    Args:
        trained_here: the document begins as in this package's training, with bos, or with eos where there is no bos; else as the
            tokenizer has it, except for an empty prompt.

    Raises:
        ValueError: an id outside the model's vocabulary; an empty prompt where the tokenizer has neither bos nor eos.
    """
    has_bos = tokenizer.bos_token is not None and prompt.startswith(tokenizer.bos_token)
    ids = tokenizer(prompt, add_special_tokens=not has_bos)["input_ids"]
    if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id and not prompt.endswith(tokenizer.eos_token):
        ids = ids[:-1]  # the document goes on
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if begin is not None and ids[:1] != [begin] and (trained_here or not ids):
        ids = [begin, *ids]
    if not ids:
        raise ValueError(
            "an empty prompt needs a token to start from: the tokenizer has neither bos_token nor eos_token"
        )
    outside = [token for token in ids if not 0 <= token < vocab_size]
    if outside:
        raise ValueError(
            f"the prompt has token ids outside the model's vocabulary: got {outside[0]}, expected 0 … {vocab_size - 1}; "
            "use the tokenizer that the model was trained with"
        )
    return torch.tensor([ids])


def generate_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    input_ids: Tensor,
    write: Callable[[str], object],
    settings: GenerationSettings,
) -> Generation:
    """Continues a prompt until the model ends the document, a stop string appears, or `max_new_tokens` are there.

    Args:
        model, tokenizer: from `load_causal_lm`, `load_tokenizer`.
        input_ids: (1, t), from `encode_prompt`.
        write: is called with each piece of text as it comes: whole characters, nothing from a stop string on.
        settings: how tokens are chosen, and when to stop.
    """
    stream = TextStream(tokenizer, write, settings.stop_strings)
    threads = torch.get_num_threads()
    follower = _Follower(stream, decoding_threads(model) if model.device.type == "cpu" else threads)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    generation_config = GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=_ends(model, tokenizer) or None,
        pad_token_id=pad,
        num_beams=1,  # what is None here is taken from the model's own settings
        num_return_sequences=1,
        no_repeat_ngram_size=0,
        **settings.sampling_arguments(),
    )
    torch.manual_seed(settings.seed)
    started = time.perf_counter()
    input_ids = input_ids.to(model.device)
    try:
        model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            generation_config=generation_config,
            stopping_criteria=StoppingCriteriaList([follower]),
        )
    finally:
        torch.set_num_threads(threads)
    stream.end()
    ended = time.perf_counter()
    return Generation(
        num_prompt_tokens=input_ids.shape[1],
        num_new_tokens=follower.num_tokens,
        prompt_seconds=follower.first_token_at - started,
        decode_seconds=ended - follower.first_token_at,
    )


def _ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a text: the tokenizer's and, of a chat model for instance, those in its own settings."""
    own = getattr(model.generation_config, "eos_token_id", None)
    ends = [tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    return list(dict.fromkeys(token for token in ends if token is not None))


class _Follower(StoppingCriteria):
    """Hands each new token to the stream, and ends `generate` with the token that completes a stop string.

    A streamer of transformers would get each token only after it was decided whether to go on. The first token ends the prompt, which
    is worth every thread; those after it are decoded by `threads`.
    """

    def __init__(self, stream: TextStream, threads: int) -> None:
        self.stream = stream
        self.threads = threads
        self.num_tokens = 0
        self.first_token_at = 0.0

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.stream.push(int(input_ids[0, -1]))
        self.num_tokens += 1
        if self.num_tokens == 1:
            self.first_token_at = time.perf_counter()
            torch.set_num_threads(self.threads)
        return torch.full((1,), self.stream.stopped, dtype=torch.bool, device=input_ids.device)
