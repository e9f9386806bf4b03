"""Layer 2: a trained model at work: text streamed out of it."""

from transxssm.serving.generation import Generation, GenerationSettings, TextStream, encode_prompt, generate_text

__all__ = [
    "Generation",
    "GenerationSettings",
    "TextStream",
    "encode_prompt",
    "generate_text",
]
