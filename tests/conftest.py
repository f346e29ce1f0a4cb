"""Every test runs seeded, with deterministic algorithms, and with fresh memory filled with NaN."""

from __future__ import annotations

import os

import hypothesis
import pytest
import torch

from tests import interpreter

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
EXAMPLES = int(os.environ.get("RACE_ATTENTION_EXAMPLES", "40"))  # more of them look further
hypothesis.settings.register_profile(
    "deterministic", derandomize=True, deadline=None, database=None, max_examples=EXAMPLES, print_blob=True
)
hypothesis.settings.load_profile("deterministic")
if interpreter.INTERPRETED:
    interpreter.hurry()


@pytest.fixture(autouse=True)
def _seeded_and_poisoned():
    """Results that depend on uninitialised memory become NaN instead of passing by luck."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)  # it turns the filling on; a GPU may lack some
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def one_run():
    """See :func:`tests.helpers.one_run`."""
    from tests import helpers

    with helpers.one_run():
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU that torch sees"))
