"""The recipe's `data:` section."""

from dataclasses import dataclass, field

SPECIAL_TOKENS = ("<|endoftext|>", "<|pad|>")
FORMATS = ("text", "chat")
MESSAGES = "messages"  # the column of conversations
SMALLEST_BPE_VOCABULARY = 256 + len(SPECIAL_TOKENS)


@dataclass
class DataArguments:
    """The text, the tokenizer and the rows of a run.

    Args:
        corpus: `python-stdlib` or `python-environment` (embedded: source files of the running interpreter), a file or a
            folder, or a hub data set `owner/name`.
        corpus_config: configuration of a hub data set, such as `fineweb-edu-dedup` of `HuggingFaceTB/smollm-corpus`.
        corpus_split: split of a hub data set, from which the held-out documents are also taken.
        text_column: column with the text in hub data sets and JSONL, JSON, CSV and Parquet files.
        streaming: read a hub data set while training, instead of downloading it first.
        held_out_fraction: share of the corpus that is held out: documents by a hash of their names, or pieces of documents if
            these are too few or too long for that.
        max_documents: use only this number of documents, the first ones. Defaults to all.
        tokenizer: `bpe` (byte-level BPE trained on the training split), `bytes`, or the name or path of any tokenizer that
            `AutoTokenizer` loads.
        vocab_size: number of tokens of `bpe`, special ones included. A small corpus may give fewer.
        sequence_length: tokens in a packed row.
        seed: seed of the order of the training documents.
        cache_dir: folder for prepared data. Defaults to the cache of `datasets`.
        validation: a file or folder of the user's own that is held out as a whole. Defaults to holding out a part of the corpus.
        max_bytes: use only about this number of bytes, from documents drawn at random, the same in each run. Defaults to all.
        format: `text`, or `chat`: records have `messages`, each with a role (system, user, assistant) and a content, and the model
            learns what the assistant says.

    Raises:
        ValueError: a value is out of its range.
    """

    corpus: str = "python-stdlib"
    corpus_config: str | None = None
    corpus_split: str = "train"
    text_column: str = "text"
    streaming: bool = False
    held_out_fraction: float = 0.05
    max_documents: int | None = None
    tokenizer: str = "bpe"
    vocab_size: int = 8192
    sequence_length: int = 1024
    seed: int = 0
    cache_dir: str | None = None
    validation: str | None = None
    max_bytes: int | None = None
    format: str = field(default="text", metadata={"choices": FORMATS})

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"data.format must be one of {', '.join(FORMATS)}: got {self.format!r}")
        if self.format == "chat" and self.text_column == "text":
            self.text_column = MESSAGES
        if (self.format == "chat") != (self.text_column == MESSAGES):
            raise ValueError(
                f"data.format=chat reads conversations in the column {MESSAGES!r}, and no other format does: got "
                f"data.format={self.format} and data.text_column={self.text_column}"
            )
        for name in ("corpus", "corpus_split", "text_column", "tokenizer"):
            if not getattr(self, name):
                raise ValueError(
                    f"data.{name} must be a name: got {getattr(self, name)!r}; leave it out for the default"
                )
        if self.validation == "":
            raise ValueError(
                "data.validation must name a file or folder: got ''; leave it out to hold out a part of the corpus"
            )
        if self.validation is None and not 0 < self.held_out_fraction < 1:
            raise ValueError(
                f"data.held_out_fraction must lie between 0 and 1, so that there is text to train on and text to "
                f"evaluate on: got {self.held_out_fraction}; data.validation names a text of its own to evaluate on"
            )
        if self.max_documents is not None and self.max_documents < 2:
            raise ValueError(
                f"data.max_documents must be at least 2, one to train on and one to hold out: got {self.max_documents}; "
                f"leave it out to use all"
            )
        if self.max_bytes is not None and self.max_bytes < 1:
            raise ValueError(f"data.max_bytes must be at least 1: got {self.max_bytes}; leave it out to use all")
        if self.tokenizer == "bpe" and self.vocab_size < SMALLEST_BPE_VOCABULARY:
            raise ValueError(
                f"data.vocab_size must be at least {SMALLEST_BPE_VOCABULARY}, 256 bytes and {len(SPECIAL_TOKENS)} special "
                f"tokens: got {self.vocab_size}; data.tokenizer=bytes has no merges at all"
            )
        if self.sequence_length < 2:
            raise ValueError(
                f"data.sequence_length must be at least 2, a token and the one it predicts: got {self.sequence_length}"
            )
        if self.seed < 0:
            raise ValueError(f"data.seed must not be negative: got {self.seed}")
