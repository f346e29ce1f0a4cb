"""The trainer with contexts longer than a segment: the same run."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

from experiments.config import ConfigError
from experiments.data import Text
from experiments.models import ModelConfig
from experiments.report import read_metrics
from experiments.train import TrainConfig, Trainer

MODEL = ModelConfig(
    dim=16, layers=2, heads=2, mixer_options={"tables": 2, "planes": 2, "conv_size": 4, "decay": "per_token"}
)
CONFIG = TrainConfig(model=MODEL, context=48, batch=2, steps=6, eval_every=3, eval_windows=2)


@pytest.fixture(scope="module")
def text() -> Text:
    words = random.Random(0).choices([b"alpha ", b"beta ", b"gamma\n", b"(x) "], k=1000)
    data = torch.frombuffer(bytearray(b"".join(words)), dtype=torch.uint8)
    return Text("words", data[:-1000], data[-1000:], "here", "0" * 64)


def test_segments_give_the_same_run(tmp_path, text):
    runs = []
    for segment in (None, 48, 20, 7):
        out = tmp_path / str(segment)
        Trainer(dataclasses.replace(CONFIG, segment=segment, out=str(out)), text=text, quiet=True).run()
        runs.append([r.get("bits", r.get("valid_bits")) for r in read_metrics(out / "metrics.jsonl")])
    for run in runs[1:]:
        assert run == pytest.approx(runs[0], rel=1e-4)


def test_a_segmented_run_resumes(tmp_path, text):
    whole, part = (dataclasses.replace(CONFIG, segment=20, out=str(tmp_path / n)) for n in ("whole", "part"))
    expected = Trainer(whole, text=text, quiet=True).run()
    first = Trainer(dataclasses.replace(part, checkpoint_every=2), text=text, quiet=True)
    first._open(resume=False, fresh=True)
    for _ in range(2):
        first.train_step()
    first._save()
    resumed = Trainer(dataclasses.replace(part, checkpoint_every=2), text=text, quiet=True).run(resume=True)
    assert resumed["valid_bits"] == expected["valid_bits"]


def test_what_cannot_be_segmented_is_named():
    for model in (dataclasses.replace(MODEL, mixer="softmax", mixer_options={}),
                  dataclasses.replace(MODEL, positions="learned")):  # fmt: skip
        with pytest.raises(ConfigError, match="segment: got 8"):
            TrainConfig(model=model, segment=8)
    with pytest.raises(ConfigError, match="segment: got 0"):
        TrainConfig(model=MODEL, segment=0)
