"""Models with a pluggable token mixer."""

from experiments.models.blocks import ModelConfig
from experiments.models.lm import DecoderLM

__all__ = ["DecoderLM", "ModelConfig"]
