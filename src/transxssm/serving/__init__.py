"""Layer 2: a trained model at work: text streamed out of it."""

from transxssm.serving.generation import Generation, GenerationSettings, encode_prompt, generate_text
from transxssm.serving.text_stream import TextStream

__all__ = [
    "Generation",
    "GenerationSettings",
    "TextStream",
    "encode_prompt",
    "generate_text",
]
