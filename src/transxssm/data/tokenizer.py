"""Tokenizers: byte-level BPE trained on the corpus, plain bytes, or any that `AutoTokenizer` loads.

Those made here decode every UTF-8 text exactly, and put `<|endoftext|>` before a prompt, since documents begin with it in training. They
are ordinary `PreTrainedTokenizerFast`, which `AutoTokenizer` loads from a run's folder.
"""

import hashlib
import json
import logging
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from datasets import Dataset
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from transxssm.data.arguments import SPECIAL_TOKENS, DataArguments
from transxssm.data.cache import cache_folder, fingerprint
from transxssm.data.chat import said, set_chat_template
from transxssm.data.corpus import Corpus
from transxssm.data.progress import progress

logger = logging.getLogger(__name__)

END_OF_TEXT, PAD = SPECIAL_TOKENS
# The padding side of prompts in a batch: `generate` continues after the last column, which must be each prompt's last token. The collator
# pads training rows.
PADDING_SIDE = "left"
# Merges stay inside these pieces. A word includes one symbol or space before it, digits form groups of three, and punctuation includes
# the line end and the next line's indentation, so that "):\n        " is one token. On held-out files of the standard
# library, vocabulary 8192: 4.37 bytes per token, against 3.87 with GPT-2's pieces and 4.06 with GPT-4's.
PIECES = (
    r"[^\r\n\p{L}\p{M}\p{N}]?[\p{L}\p{M}]+"
    r"|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+(?:[\r\n]+[ \t]*)?"
    r"|\s*[\r\n]+[ \t]*"
    r"|\s+(?!\S)"
    r"|\s+"
)
# More text than this changes the merges little and takes minutes, so that BPE is trained on a fixed random sample of larger corpora.
BPE_TRAINING_BYTES = 64 * 2**20


def build_tokenizer(data: DataArguments, corpus: Corpus) -> PreTrainedTokenizerFast:
    """The tokenizer that `data` names. `bpe` is trained on the corpus's training split, or read from the cache.

    Raises:
        ValueError: `AutoTokenizer` cannot load it, or it has no fast version, no token that ends a text, or a chat template that does not
            support training.
    """
    if data.tokenizer == "bytes":
        tokenizer = _wrapped(_byte_tokenizer())
    elif data.tokenizer == "bpe":
        tokenizer = _wrapped(_cached_bpe(data, corpus))
    else:
        tokenizer = _named_tokenizer(data.tokenizer)
    if data.format == "chat":
        set_chat_template(tokenizer)
    return tokenizer


def tokenizer_identity(tokenizer: PreTrainedTokenizerFast) -> str:
    """Fingerprint of how the tokenizer encodes documents. Calls that pad or truncate do not change it."""
    settings = json.loads(tokenizer.backend_tokenizer.to_str())
    del settings["truncation"], settings["padding"]
    settings = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    return fingerprint("tokenizer", settings, document_bounds(tokenizer))


def document_bounds(tokenizer: PreTrainedTokenizerFast) -> tuple[int, int]:
    """Ids of the tokens before and after every document: bos and eos, or eos twice if there is no bos.

    Raises:
        ValueError: the tokenizer has no eos token.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise ValueError(
            f"tokenizer {tokenizer.name_or_path!r} has no eos_token, so documents could not be told apart; expected a "
            f"language model's tokenizer, or set its eos_token"
        )
    begin = tokenizer.bos_token_id
    return (end if begin is None else begin), end


def _byte_tokenizer() -> Tokenizer:
    """A tokenizer in which byte b is token b, followed by the special tokens."""
    symbols = {chr(byte): byte for byte in range(256)}
    # ByteLevel writes each byte as one printable character: itself if it is printable, else the next one from 256 on.
    hidden = [byte for byte in range(256) if chr(byte) not in pre_tokenizers.ByteLevel.alphabet()]
    for offset, byte in enumerate(hidden):
        del symbols[chr(byte)]
        symbols[chr(256 + offset)] = byte
    tokenizer = Tokenizer(models.BPE(vocab=symbols, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return tokenizer


def _cached_bpe(data: DataArguments, corpus: Corpus) -> Tokenizer:
    key = fingerprint("bpe", corpus.identity, data.vocab_size, PIECES, BPE_TRAINING_BYTES)
    path = cache_folder(data.cache_dir) / "transxssm_tokenizers" / f"bpe-{key}.json"
    if path.exists():
        return Tokenizer.from_file(str(path))
    tokenizer = _train_bpe(corpus, data.vocab_size, said if data.format == "chat" else str)
    # Renamed when complete, so that no other or later run reads a partial file.
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", encoding="utf-8", delete=False) as file:
        file.write(tokenizer.to_str())
    Path(file.name).replace(path)
    return tokenizer


def _train_bpe(corpus: Corpus, vocab_size: int, read: Callable[[str], str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    with progress("Training the tokenizer", 0, "B") as advance:
        tokenizer.train_from_iterator(map(read, _training_texts(corpus, advance)), trainer)
    found = tokenizer.get_vocab_size()
    if found < vocab_size:
        logger.warning("bpe: the training split has text for %d tokens only, asked for %d", found, vocab_size)
    return tokenizer


def _training_texts(corpus: Corpus, advance: Callable[[int], object] = lambda num_bytes: None) -> Iterator[str]:
    """At most `BPE_TRAINING_BYTES` of the training split: documents in a fixed random order, or a stream's first ones."""
    documents = corpus.train
    if isinstance(documents, Dataset):
        documents = documents.select(np.random.default_rng(0).permutation(len(documents)))
    size = 0
    for document in documents:
        if size >= BPE_TRAINING_BYTES:
            return
        num_bytes = len(document["text"].encode())
        size += num_bytes
        advance(num_bytes)
        yield document["text"]


def _wrapped(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    tokenizer.decoder = decoders.ByteLevel()
    begin = (END_OF_TEXT, tokenizer.token_to_id(END_OF_TEXT))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", pair=f"{END_OF_TEXT} $A {END_OF_TEXT} $B", special_tokens=[begin]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        padding_side=PADDING_SIDE,
        clean_up_tokenization_spaces=False,
    )


def _named_tokenizer(name: str) -> PreTrainedTokenizerFast:
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise ValueError(
            f"cannot load tokenizer {name!r}: {reason}; expected bpe, bytes, or the name or path of a Hugging Face tokenizer"
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(
            f"tokenizer {name!r} has no fast version (tokenizer.json): got {type(tokenizer).__name__}; name another one"
        )
    tokenizer.padding_side = PADDING_SIDE
    document_bounds(tokenizer)  # raises now, before the corpus is read
    return tokenizer
