"""Models with a pluggable token mixer."""

from experiments.models.blocks import ModelConfig
from experiments.models.encoder import HeadConfig, MaskedLM, SequenceClassifier, VisionTransformer
from experiments.models.lm import DecoderLM

__all__ = ["DecoderLM", "HeadConfig", "MaskedLM", "ModelConfig", "SequenceClassifier", "VisionTransformer"]
