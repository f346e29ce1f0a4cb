"""RACE Attention: attention in strictly linear time, by soft locality-sensitive hashing (arXiv 2510.04008)."""

from ._version import __version__
from .attention import BackendWarning, race_attention
from .features import sample_hyperplanes
from .layer_state import RaceAttentionState
from .nn import RaceAttention
from .sdpa import scaled_dot_product_race
from .state import RaceState

__all__ = [
    "BackendWarning",
    "RaceAttention",
    "RaceAttentionState",
    "RaceState",
    "__version__",
    "race_attention",
    "sample_hyperplanes",
    "scaled_dot_product_race",
]
