"""Layer 2: a trained model at work: loading a checkpoint, streaming text out of it."""

from transxssm.serving.checkpoint import load_model, load_tokenizer, read_config, read_device
from transxssm.serving.generation import Generation, GenerationSettings, encode_prompt, generate_text
from transxssm.serving.text_stream import TextStream

__all__ = [
    "Generation",
    "GenerationSettings",
    "TextStream",
    "encode_prompt",
    "generate_text",
    "load_model",
    "load_tokenizer",
    "read_config",
    "read_device",
]
