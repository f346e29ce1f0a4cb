"""Data sets: loaders by name, local files, batches."""

from experiments.data.text import Text, WindowSampler, evaluation_windows, load_text

__all__ = ["Text", "WindowSampler", "evaluation_windows", "load_text"]
