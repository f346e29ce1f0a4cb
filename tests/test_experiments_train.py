"""Training: exact resume, kills, data, statistics of n-grams."""

import dataclasses
import itertools
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import race_attention
from experiments import checkpoint
from experiments.config import ConfigError
from experiments.data import Text, WindowSampler, evaluation_windows, load_text
from experiments.data.local import DataError
from experiments.data.text import load_novels, load_stdlib, stdlib_files
from experiments.measure import gain_from_context, layer_times, loss_by_position, token_losses
from experiments.models import DecoderLM, ModelConfig
from experiments.ngrams import STRENGTHS, ngram_bits
from experiments.report import read_metrics
from experiments.train import TrainConfig, Trainer, main, pick_device

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(race_attention.__file__).resolve().parents[1]  # installed, or src
MODEL = ModelConfig(
    dim=16,
    layers=1,
    heads=2,
    dropout=0.1,
    mixer_options={"tables": 2, "planes": 2, "conv_size": 4, "decay": "learned", "dropout": 0.1},
)
CONFIG = TrainConfig(
    model=MODEL, context=32, batch=2, steps=8, eval_every=4, eval_windows=2, checkpoint_every=3, warmup=0.25
)


@pytest.fixture(scope="module")
def text():
    words = random.Random(0).choices([b"alpha ", b"beta ", b"gamma\n", b"(x) "], k=2000)
    data = torch.frombuffer(bytearray(b"".join(words)), dtype=torch.uint8)
    return Text("words", data[:-2000], data[-2000:], "here", "0" * 64)


def trainer(folder, text, **changes):
    return Trainer(dataclasses.replace(CONFIG, out=str(folder), **changes), text=text, quiet=True)


def losses(folder):
    kept = ("step", "bits", "grad_norm", "valid_bits", "lr")
    return [{k: record[k] for k in kept if k in record} for record in read_metrics(folder / "metrics.jsonl")]


class Stopped(Exception):
    pass


def stop_at(run, step):
    original = run.train_step

    def step_or_stop():
        if run.step == step:
            raise Stopped
        return original()

    run.train_step = step_or_stop
    with pytest.raises(Stopped):
        run.run()


@pytest.mark.parametrize("stop", [2, 3, 5, 7])
def test_resumed_run_has_bitwise_the_losses_of_an_uninterrupted_one(tmp_path, text, stop):
    whole = trainer(tmp_path / "whole", text)
    whole.run()
    stop_at(trainer(tmp_path / "parts", text), stop)
    torch.rand(100)  # whatever happened to the generator meanwhile
    parts = trainer(tmp_path / "parts", text)
    parts.run(resume=True)
    assert parts.step == 8
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, parts.model.state_dict()[name]), name


def test_growing_windows_double_up_to_the_context_and_resume_exactly(tmp_path, text):
    grown = {"grow_from": 5, "grow_until": 0.75, "steps": 8, "checkpoint_every": 1, "eval_every": 0}
    whole = trainer(tmp_path / "whole", text, **grown)
    whole.run()
    amounts = [r["bytes"] for r in read_metrics(tmp_path / "whole" / "metrics.jsonl") if "bytes" in r]
    lengths = [(b - a) // 2 for a, b in itertools.pairwise([0, *amounts])]
    assert lengths == [5, 5, 10, 10, 20, 20, 32, 32]
    stop_at(trainer(tmp_path / "parts", text, **grown), 4)
    trainer(tmp_path / "parts", text, **grown).run(resume=True)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_grouped_logging_writes_the_same_losses(tmp_path, text):
    for name, every in (("one", 1), ("three", 3)):
        trainer(tmp_path / name, text, log_every=every, eval_every=0).run()
    assert losses(tmp_path / "one") == losses(tmp_path / "three")


def test_killed_run_resumes(tmp_path):
    words = b"one two three four five six seven\n" * 400
    (tmp_path / "text").write_bytes(words)
    arguments = [
        *("data=file:" + str(tmp_path / "text"), "context=32", "batch=1", "steps=60", "checkpoint_every=1"),
        *("eval_every=0", "model.dim=16", "model.heads=2", "model.layers=1", "device=cpu"),
        'model.mixer_options={"tables":2,"planes":2,"conv_size":4}',
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{PACKAGE}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", "experiments.train", *arguments, f"out={tmp_path / 'killed'}"]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    metrics = tmp_path / "killed" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and (not metrics.exists() or metrics.read_text().count("\n") < 10):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 10 <= len(read_metrics(metrics)) < 60, "killed too late or too early for this test to say anything"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        main([*arguments, f"out={tmp_path / 'killed'}", "--resume"])
        main([*arguments, f"out={tmp_path / 'whole'}"])
    finally:
        torch.set_num_threads(threads)
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


def test_metrics_cut_short_by_a_kill_are_read_up_to_the_cut(tmp_path):
    (tmp_path / "m").write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert read_metrics(tmp_path / "m") == [{"step": 1}, {"step": 2}]


def test_folder_with_a_run_is_not_overwritten_by_accident(tmp_path, text):
    trainer(tmp_path, text).run()
    with pytest.raises(ConfigError, match="--resume"):
        trainer(tmp_path, text).run()
    with pytest.raises(ConfigError, match="another lr"):
        trainer(tmp_path, text, lr=1e-4).run(resume=True)
    other = dataclasses.replace(text, sha256="1" * 64)
    with pytest.raises(ConfigError, match="data: got"):
        trainer(tmp_path, other).run(resume=True)
    assert trainer(tmp_path, text, lr=1e-4).run(fresh=True)["steps"] == 8


def test_checkpoint_of_another_model_or_cut_short_is_refused(tmp_path, text):
    run = trainer(tmp_path, text)
    run.run()
    path = tmp_path / "checkpoint.safetensors"
    other = DecoderLM(dataclasses.replace(MODEL, dim=32))
    with pytest.raises(checkpoint.CheckpointError, match="another model"):
        checkpoint.load(path, other)
    progress = checkpoint.load(path, DecoderLM(MODEL))
    assert progress["step"] == 8
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(checkpoint.CheckpointError, match="checkpoint"):
        checkpoint.load(path, DecoderLM(MODEL))
    with pytest.raises(checkpoint.CheckpointError, match="checkpoint"):
        checkpoint.load(tmp_path / "absent", DecoderLM(MODEL))


def test_training_learns_and_a_timed_run_ends(tmp_path, text):
    result = trainer(tmp_path / "steps", text, steps=60, batch=4, lr=1e-2, eval_every=0).run()
    assert result["valid_bits"] < 3.0  # about 8 at the start
    timed = trainer(tmp_path / "time", text, steps=None, seconds=0.5, eval_every=0)
    result = timed.run()
    assert result["seconds"] >= 0.5
    assert result["steps"] == timed.step > 1
    rates = [r["lr"] for r in losses(tmp_path / "time") if "lr" in r]
    assert min(rates) > 0
    assert rates[-1] < max(rates) <= CONFIG.lr


def test_loss_that_is_not_finite_stops_the_run(tmp_path, text):
    run = trainer(tmp_path, text)
    run.model.embedding.weight.data.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="step 1: the loss is nan"):
        run.run()


def test_tensorboard_mirrors_the_metrics(tmp_path, text):
    pytest.importorskip("tensorboard")
    trainer(tmp_path, text, steps=2, tensorboard=True).run()
    assert list((tmp_path / "tensorboard").glob("events*"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": None}, "steps: got None"),
        ({"seconds": 3.0}, "steps: got 8"),
        ({"grow_from": 64}, "grow_from: got 64, allowed is between 1 and context, 32"),
        ({"batch": 0}, "batch: got 0, allowed is 1 or more"),
        ({"precision": "half"}, "precision: got 'half'"),
        ({"lr": -1.0}, "lr: got -1.0, allowed is above 0"),
        ({"beta1": 1.0}, "beta1: got 1.0"),
    ],
)
def test_bad_configuration_is_named(changes, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(CONFIG, **changes)


def test_command_line_reports_errors_without_a_traceback(tmp_path, capsys):
    for arguments, message in (
        (["lr=fast"], "lr: got 'fast'"),
        (["data=novels"], "--data-dir"),
        (["device=teapot", "data=file:" + __file__], "device: got 'teapot'"),
    ):
        with pytest.raises(SystemExit) as stop:
            main([*arguments, f"out={tmp_path}"])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
    assert pick_device("cpu").type == "cpu"


def test_every_window_comes_once_an_epoch_and_the_order_depends_on_the_position_alone():
    text = torch.arange(100, dtype=torch.uint8)
    sampler = WindowSampler(text, 9, seed=1)
    n = sampler.windows
    assert n == 10
    inputs, targets = sampler.batch(0, n)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    starts = inputs[:, 0]
    assert starts.unique().numel() == n
    assert (starts.sort().values.diff() == 9).all()
    second, _ = sampler.batch(n, n)
    assert not torch.equal(second, inputs)
    assert torch.equal(WindowSampler(text, 9, seed=1).batch(3, n)[0], torch.cat((inputs[3:], second[:3])))
    assert WindowSampler(torch.zeros(33, dtype=torch.uint8), 32).batch(5, 2)[0].shape == (2, 32)
    with pytest.raises(ValueError, match="context: got 100, allowed is at most 99"):
        WindowSampler(text, 100)


def test_evaluation_windows_are_spread_evenly():
    text = torch.arange(50, dtype=torch.uint8)
    windows = [x[0].item() for x, _ in evaluation_windows(text, 9, 3)]
    assert windows == [0, 20, 40]
    assert len(list(evaluation_windows(text, 48, 10))) == 2
    with pytest.raises(ValueError, match="context"):
        next(evaluation_windows(text, 50, 1))


def test_stdlib_is_split_by_file_without_tests_or_packages(tmp_path):
    for i in range(60):
        (tmp_path / f"m{i:02d}.py").write_text(f"{i:02d}")
    for folder in ("site-packages", "test"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "no.py").write_text("no")
    text = load_stdlib(root=tmp_path)
    assert bytes(text.valid.tolist()) == b"103050"
    assert len(text.train) == 2 * 57
    assert b"no" not in bytes(text.train.tolist())
    assert load_stdlib(root=tmp_path).sha256 == text.sha256
    with pytest.raises(DataError, match="stdlib"):
        load_stdlib(root=tmp_path / "test")
    assert len(stdlib_files()) > 100


def test_text_by_name_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.delenv("RACE_DATA_DIR", raising=False)
    with pytest.raises(DataError, match=r"no data folder was given.*--data-dir \(or RACE_DATA_DIR\)"):
        load_text("novels")
    with pytest.raises(DataError, match="has no folder shakespeare"):
        load_text("shakespeare", tmp_path)
    with pytest.raises(ValueError, match="data: got 'poems', allowed are stdlib"):
        load_text("poems")
    for part, name in (("train", "a"), ("train", "b"), ("valid", "c")):
        (tmp_path / "novels" / part).mkdir(parents=True, exist_ok=True)
        (tmp_path / "novels" / part / f"{name}.txt").write_text(name * 3)
    text = load_novels(tmp_path)
    assert bytes(text.train.tolist()) == b"aaabbb"
    assert bytes(text.valid.tolist()) == b"ccc"
    monkeypatch.setenv("RACE_DATA_DIR", str(tmp_path))
    assert load_text("novels").sha256 == text.sha256


def test_local_data_sets_where_they_are():
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    novels, shakespeare = load_text("novels", folder), load_text("shakespeare", folder)
    assert len(novels.train) > 8_000_000
    assert len(novels.valid) > 500_000
    assert len(shakespeare.train) + len(shakespeare.valid) > 1_000_000


def test_ngrams_agree_with_sums_written_out():
    generator = random.Random(1)
    data = bytes(generator.choices(b"abcd", weights=(5, 3, 2, 1), k=400))
    valid = bytes(generator.choices(b"abcde", k=60))
    as_tensor = [torch.tensor(list(x), dtype=torch.uint8) for x in (data, valid)]
    found = ngram_bits(*as_tensor)

    def probability(counted, context, x, strengths):
        if not strengths:
            return (counted.count(bytes([x])) + 1) / (len(counted) + 256)
        shorter = probability(counted, context[1:], x, strengths[:-1])
        follow = [
            counted[i + len(context)] for i in range(len(counted) - len(context)) if counted[i:].startswith(context)
        ]
        if not follow:
            return shorter
        weight = strengths[-1] * len(set(follow))
        return (follow.count(x) + weight * shorter) / (len(follow) + weight)

    def bits(counted, text, strengths):
        n = len(strengths)
        terms = [probability(counted, text[i - n : i], text[i], strengths) for i in range(2, len(text))]
        return -sum(map(math.log2, terms)) / len(terms)

    cut = len(data) - max(3, len(data) // 20)
    best = min(((k,) for k in STRENGTHS), key=lambda s: bits(data[:cut], data[cut:], s))
    best3 = min(((*best, k) for k in STRENGTHS), key=lambda s: bits(data[:cut], data[cut:], s))
    assert found.unigram == pytest.approx(bits(data, valid, ()))
    assert found.bigram == pytest.approx(bits(data, valid, best))
    assert found.trigram == pytest.approx(bits(data, valid, best3))


def test_loss_by_position_is_the_mean_of_the_bytes_there(text):
    model = DecoderLM(dataclasses.replace(MODEL, dropout=0.0)).double()
    buckets = loss_by_position(model, text.valid, 64, 3)
    assert [(b.start, b.end) for b in buckets] == [(0, 16), (16, 32), (32, 64)]
    assert buckets[-1].windows == 3
    rows = [token_losses(model, x[None], y[None]) for x, y in evaluation_windows(text.valid, 64, 3)]
    assert buckets[-1].bits == pytest.approx(float(torch.cat(rows)[:, 32:].mean()))
    gain = gain_from_context(model, text.valid, 200, 2, 8)
    assert list(gain) == [0, 64, 192]
    rows = [token_losses(model, x[None], y[None])[:, -8:] for x, y in evaluation_windows(text.valid, 200, 2)]
    assert gain[192] == pytest.approx(float(torch.cat(rows).mean()))


def test_layer_times_stop_at_the_limit():
    layer = torch.nn.Linear(4, 4)
    lengths = (8, 16, 32, 64)
    assert list(layer_times(layer, 4, lengths, limit=100, patience=0)) == list(lengths)
    assert list(layer_times(layer, 4, lengths, limit=0, patience=0)) == [8, 16]


def test_busy_machine_gets_up_to_twice_the_time(tmp_path, text):
    run = trainer(tmp_path, text, steps=None, seconds=10.0, least_steps=100)
    for seconds, step, fraction in ((5, 50, 0.5), (5, 10, 0.25), (10, 100, 1.0), (10, 50, 0.5), (20, 50, 1.0)):
        run.seconds, run.step = seconds, step
        assert run.fraction == pytest.approx(fraction)


@pytest.mark.slow
def test_demo_in_its_smallest_size(tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{PACKAGE}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", "experiments.demo", "--smoke", "--out", str(tmp_path)]
    shown = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    assert (tmp_path / "demo.png").stat().st_size > 10_000
    numbers = json.loads((tmp_path / "demo.json").read_text())
    assert numbers["held_out_bits"] < 8
    assert str(tmp_path / "demo.png") in shown
    assert "bigram" in shown
