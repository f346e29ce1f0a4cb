"""What reproduces and extends the paper's tables: models, baselines, data, training, the demo.

Not part of the installed package. Run from the repository's root, for example ``python -m experiments.demo``.
Needs the ``experiments`` extra.
"""
