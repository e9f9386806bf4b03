"""From text to batches: corpora, tokenizers and packed rows."""

from transxssm.data.algorithmic import ALGORITHMIC_TASKS, AlgorithmicTask
from transxssm.data.arguments import DataArguments
from transxssm.data.associative_recall import RecallBatch, RecallTask
from transxssm.data.corpus import EMBEDDED_CORPORA, Corpus, load_corpus, text_bytes
from transxssm.data.needle import Haystack, NeedleExample
from transxssm.data.packing import PackedCollator, PackedDatasets, build_datasets, tokenize_documents
from transxssm.data.tokenizer import build_tokenizer, document_bounds

__all__ = [
    "ALGORITHMIC_TASKS",
    "EMBEDDED_CORPORA",
    "AlgorithmicTask",
    "Corpus",
    "DataArguments",
    "Haystack",
    "NeedleExample",
    "PackedCollator",
    "PackedDatasets",
    "RecallBatch",
    "RecallTask",
    "build_datasets",
    "build_tokenizer",
    "document_bounds",
    "load_corpus",
    "text_bytes",
    "tokenize_documents",
]
