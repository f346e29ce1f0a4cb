"""RACE Attention: attention in strictly linear time, by soft locality-sensitive hashing (arXiv 2510.04008)."""

from .attention import BackendWarning, race_attention
from .features import sample_hyperplanes
from .state import RaceState

__all__ = ["BackendWarning", "RaceState", "race_attention", "sample_hyperplanes"]
