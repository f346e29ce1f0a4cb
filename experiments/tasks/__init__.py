"""Tasks: data, the model that fits it, its loss and its score, behind one interface (:class:`Task`)."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch

from experiments import config as configuration
from experiments.config import check
from experiments.data.files import HUB, both_ways
from experiments.data.local import DATA_DIR, DataError
from experiments.tasks.base import Batch, Task

__all__ = ["TASKS", "Batch", "Task", "make_task"]

#: name -> module:class of the options:class of the task.
TASKS = {
    "fashion_mnist": "experiments.tasks.images:FashionOptions:FashionMnist",
    "cifar10": "experiments.tasks.images:PictureOptions:Cifar10",
    "food101": "experiments.tasks.images:PictureOptions:Food101",
    "sst2": "experiments.tasks.sentences:SentenceOptions:Sst2",
    "qnli": "experiments.tasks.sentences:SentenceOptions:HubSentences",
    "imdb": "experiments.tasks.sentences:SentenceOptions:HubSentences",
    "yahoo": "experiments.tasks.sentences:SentenceOptions:HubSentences",
    "arxiv": "experiments.tasks.sentences:SentenceOptions:HubSentences",
    "listops": "experiments.tasks.listops:ListOpsOptions:ListOps",
    "language_model": "experiments.tasks.language:LanguageOptions:LanguageModel",
    "masked_language_model": "experiments.tasks.language:MaskedOptions:MaskedLanguageModel",
    "mqar": "experiments.tasks.recall:MqarOptions:Mqar",
    "needle": "experiments.tasks.recall:NeedleOptions:Needle",
}


def make_task(name: str, options: Mapping[str, Any], *, data_dir: str | None, device: torch.device, seed: int) -> Task:
    """A task with its data on ``device``.

    Args:
        name: a key of :data:`TASKS`.
        options: of the task, as its options' class documents them.
        data_dir: folder of local data; default the environment variable RACE_DATA_DIR.
        device: where all data lies.
        seed: of the order of the data and of drawn examples; never of the split or the evaluation.

    Raises:
        ConfigError: no such task or option. DataError: its data is not there; the message says how to get it.
    """
    check(name in TASKS, "task", name, "one of " + ", ".join(TASKS))
    module, options_name, class_name = TASKS[name].split(":")
    loaded = importlib.import_module(module)
    made = configuration.build(getattr(loaded, options_name), options, "task_options.")
    try:
        task: Task = getattr(loaded, class_name)(name, made, data_dir=data_dir, device=device, seed=seed)
    except DataError as error:
        data = getattr(made, "data", name)
        if DATA_DIR in str(error) or data not in HUB:
            raise
        raise DataError(f"{error}. {both_ways(data)}") from error  # a folder in which something is missing
    return task
