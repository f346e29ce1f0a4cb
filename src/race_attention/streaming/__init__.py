"""Contexts longer than memory: attention over a stream, and exact gradients of a whole model over one.

stream_attention, stream_attention_backward   one layer's core over segments from anywhere
stream_backward                               exact gradients of a model, segment by segment
check_streaming                               says whether a model can be run so, and what in it cannot
forward_with_state                            a whole model in chunks or token by token, with its state
register_stateful                             the state protocol for modules that are not ours
"""

from .adjoint import StreamGradients
from .attention import stream_attention
from .backward import stream_attention_backward
from .core import StreamForward
from .files import open_npy, open_safetensors
from .model import StreamedLoss, stream_backward
from .segments import ArraySource, Indexed, Segment, Source, cut
from .sinks import FileSink, SegmentGradients, Sink
from .stateful import ModelState, StreamError, forward_with_state, register_stateful
from .verify import check_streaming

__all__ = [
    "ArraySource",
    "FileSink",
    "Indexed",
    "ModelState",
    "Segment",
    "SegmentGradients",
    "Sink",
    "Source",
    "StreamError",
    "StreamForward",
    "StreamGradients",
    "StreamedLoss",
    "check_streaming",
    "cut",
    "forward_with_state",
    "open_npy",
    "open_safetensors",
    "register_stateful",
    "stream_attention",
    "stream_attention_backward",
    "stream_backward",
]
