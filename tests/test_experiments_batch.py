"""The queue of runs for a machine lent for a while."""

import dataclasses
import functools
import json
import tarfile
import time

import pytest
import torch

from experiments import gpu_batch
from experiments.bundle import bundle, unbundle
from experiments.config import ConfigError
from experiments.gpu_batch import CONFIGS, Batch, main
from experiments.jobs import read_queue
from experiments.rows import read_rows
from experiments.run import Run
from experiments.steptime import main as time_steps
from experiments.together import draws, train_together
from experiments.worker import Worker

CONFIG = """
task = "mqar"
task_options = { length = 16, pairs = 2, vocab = 16, train = 16, valid = 4 }
steps = 2
batch = 4
[model]
dim = 8
layers = 1
heads = 2
[rows.linear]
model = { mixer = "linear" }
[rows.softmax]
model = { mixer = "softmax" }
"""


@pytest.fixture
def queue(tmp_path):
    (tmp_path / "t.toml").write_text(CONFIG)
    (tmp_path / "queue.toml").write_text(
        '[[runs]]\nconfig = "t.toml"\nrows = ["softmax"]\n[[runs]]\nconfig = "t.toml"\nseeds = [0, 1]\n'
    )
    return tmp_path / "queue.toml"


def batch_of(tmp_path, seconds, jobs=2, **more):
    return Batch(
        results=tmp_path / "res",
        work=tmp_path / "work",
        logs=tmp_path / "logs",
        data_dir=None,
        seconds=seconds,
        jobs=jobs,
        device="cpu",
        **more,
    )


def test_queue_keeps_its_order_and_names_what_is_wrong(queue):
    jobs = read_queue(queue)
    assert [str(job) for job in jobs] == ["t/softmax/0", "t/linear/0", "t/linear/1", "t/softmax/1"]
    for content, message in (
        ("", "runs: got None"),
        ('[[runs]]\nconfig = "t.toml"\nrow = "linear"\n', r"runs\[1\]: got"),
        ('[[runs]]\nconfig = "t.toml"\nrows = ["magic"]\n', r"runs\[1\].rows: got 'magic', allowed is one of linear"),
        ('[[runs]]\nconfig = "absent.toml"\n', "cannot read"),
    ):
        queue.write_text(content)
        with pytest.raises(ConfigError, match=message):
            read_queue(queue)
    assert len(read_queue(CONFIGS / "queue.toml")) > 50


def test_batch_finishes_its_queue_and_skips_what_is_done(queue, tmp_path, capsys):
    jobs = read_queue(queue)[:2]
    done = tmp_path / "res/t/softmax/seed-0.json"
    done.parent.mkdir(parents=True)
    done.write_text("{}")
    assert batch_of(tmp_path, 600).run(jobs) == (1, 0)
    assert done.read_text() == "{}"
    assert json.loads((tmp_path / "res/t/linear/seed-0.json").read_text())["steps"] == 2
    assert batch_of(tmp_path, 600).run(jobs) == (0, 0)
    assert batch_of(tmp_path, 5).run(read_queue(queue)) == (0, 2)  # too little time to start anything
    main(["--queue", str(queue), "--results", str(tmp_path / "res"), "--list"])
    assert capsys.readouterr().out.split()[-2:] == ["t/linear/1", "t/softmax/1"]


def test_every_gpu_has_processes_that_see_it_alone_and_share_the_queue(queue, tmp_path, monkeypatch):
    started, ran = [], []

    class Recorded(Worker):
        def __init__(self, threads, environment):
            self.gpu = environment["CUDA_VISIBLE_DEVICES"]
            started.append(self.gpu)
            super().__init__(threads, environment)

        def run(self, request):
            ran.extend((self.gpu, row, seed) for row, seed in request["runs"])
            return super().run(request)

    monkeypatch.setattr(gpu_batch, "Worker", Recorded)
    assert batch_of(tmp_path, 600, jobs=1, gpus=("0", "GPU-1"), time_tables=[f"{tmp_path}/t.toml:linear"]).run(
        read_queue(queue)
    ) == (4, 0)
    assert set(started) <= {"0", "GPU-1"}
    assert sorted(job[1:] for job in ran) == [("linear", 0), ("linear", 1), ("softmax", 0), ("softmax", 1)]
    assert ran[0] == ("GPU-1", "softmax", 0)  # while steps are timed on the first
    assert set(json.loads((tmp_path / "res/t/speed.json").read_text())["milliseconds"]) == {"linear"}


def test_a_process_goes_on_with_what_it_has_compiled(queue, tmp_path):
    batch = batch_of(tmp_path, 600)
    batch.waiting = jobs = read_queue(queue)
    assert str(batch._next(None)) == "t/softmax/0"
    assert str(batch._next(jobs[1])) == "t/linear/0"
    batch.running = [jobs[0]]
    assert str(batch._next(None)) == "t/linear/0"  # another process compiles softmax
    batch.running = jobs[:2]
    assert str(batch._next(None)) == "t/softmax/0"  # better twice than idle


def test_runs_of_a_method_train_together_as_each_would_alone(queue, tmp_path):
    (tmp_path / "t.toml").write_text("search = { lr = [1e-3, 1e-2] }\n" + CONFIG.replace("steps = 2", "steps = 12"))
    entry = '[[runs]]\nconfig = "t.toml"\nrows = ["linear"]\n'
    queue.write_text(
        entry + 'seeds = [0, 1]\n[[runs]]\nconfig = "t.toml"\nrows = ["linear"]\nbest = true\nseeds = [1]\n'
    )
    jobs = read_queue(queue)
    assert batch_of(tmp_path / "alone", 600, jobs=1).run(jobs) == (4, 0)
    batch = batch_of(tmp_path / "together", 600, jobs=1, together=3)
    batch.waiting = list(jobs)
    assert [str(job) for job in batch._next_group(None)] == [
        "t/linear@lr=0.001/0",
        "t/linear@lr=0.01/0",
        "t/linear@lr=0.001/1",
    ]
    batch.end = time.monotonic() + 40  # for one of the 30 seconds that are thought of
    assert len(batch._next_group(None)) == 1
    batch.end = time.monotonic() + 600
    assert batch.run(jobs) == (4, 0)
    for path in (tmp_path / "alone/res").glob("t/*/seed-*.json"):
        one, other = (
            json.loads((folder / path.relative_to(tmp_path / "alone/res")).read_text())
            for folder in (tmp_path / "alone/res", tmp_path / "together/res")
        )
        assert (one.pop("together"), other.pop("together")) in ((1, 3), (1, 1))
        scores = [
            [{k: v for k, v in point.items() if k != "seconds"} for point in result["curve"]] for result in (one, other)
        ]
        assert scores[0] == scores[1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("row", ["race-4x4-all@lr=0.01", "softmax-conv-gate@lr=0.001"])
def test_runs_on_one_gpu_do_not_touch_each_other(tmp_path, row):
    config = read_rows(CONFIGS / "mqar.toml", ["steps=100", "eval_every=100", "task_options.train=12800"])[row]

    def make(keep_compiled, seed):
        return Run(config, seed, results=tmp_path, work=tmp_path, quiet=True, keep_compiled=keep_compiled)

    alone = make(False, 1).train()
    others = train_together([functools.partial(make, seed=seed) for seed in (0, 1, 2, 1)], time.time() + 300)
    assert all(result["graph"] == "recorded" for result in [alone, *others])
    for result in (others[1], others[3]):  # sums by atomic operations come in any order
        assert result["best"]["train_loss"] == pytest.approx(alone["best"]["train_loss"], rel=2e-3)
    assert others[0]["best"]["train_loss"] != pytest.approx(alone["best"]["train_loss"], rel=1e-6)


def test_a_run_that_fails_leaves_the_others_of_its_group(tmp_path):
    (tmp_path / "t.toml").write_text(CONFIG)
    rows = read_rows(tmp_path / "t.toml")

    def make(keep_compiled, seed):
        if seed == 1:
            raise ConfigError("no such thing")
        return Run(rows["linear"], seed, device="cpu", results=tmp_path, work=tmp_path, quiet=True)

    good, bad, late = train_together([functools.partial(make, seed=seed) for seed in range(3)], time.time() + 60)
    assert good["steps"] == late["steps"] == 2
    assert str(bad) == "no such thing"


def test_a_job_that_fails_beside_others_runs_once_more_alone(queue, tmp_path, monkeypatch):
    asked = []

    class Refusing(Worker):
        def run(self, request):
            asked.append(len(request["runs"]))
            return ["RuntimeError: no"] * 2 if len(request["runs"]) > 1 else super().run(request)

    monkeypatch.setattr(gpu_batch, "Worker", Refusing)
    assert batch_of(tmp_path, 600, jobs=1, together=2).run(read_queue(queue)[1:3]) == (2, 0)
    assert asked == [2, 1, 1]


def test_runs_that_draw_random_numbers_do_not_share_a_device(queue, tmp_path):
    row = read_rows(CONFIGS / "sst2.toml")["softmax@lr=0.001"]
    assert draws(row)  # dropout
    assert not draws(dataclasses.replace(row, model=dataclasses.replace(row.model, dropout=0.0)))
    pictures = read_rows(CONFIGS / "fashion_mnist.toml")
    assert [draws(pictures[f"{name}@lr=0.004"]) for name in ("yoso", "yoso-expectation")] == [True, False]


def test_visible_gpus_are_those_named(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-7")
    assert gpu_batch.visible_gpus() == ["2", "GPU-7"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpu_batch.visible_gpus() == []
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert len(gpu_batch.visible_gpus()) == torch.cuda.device_count()


def test_bundle_brings_results_back(tmp_path):
    for name in ("t/a/seed-0.json", "u/b/seed-3.json", "u/speed.json"):
        (tmp_path / "one" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "one" / name).write_text(name)
    assert bundle(tmp_path / "one", tmp_path / "b.tar.gz") == 3
    assert unbundle(tmp_path / "b.tar.gz", tmp_path / "two") == 3
    assert (tmp_path / "two/u/speed.json").read_text() == "u/speed.json"
    assert (tmp_path / "two/u/b/seed-3.json").read_text() == "u/b/seed-3.json"
    with tarfile.open(tmp_path / "bad.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "one/t/a/seed-0.json", arcname="../t/seed-0.json")
    with pytest.raises(ConfigError, match="bundle: got"):
        unbundle(tmp_path / "bad.tar.gz", tmp_path / "two")


def test_searches_come_before_their_finalists(tmp_path):
    (tmp_path / "t.toml").write_text("search = { lr = [1e-3, 1e-2] }\n" + CONFIG)
    entry = '[[runs]]\nconfig = "t.toml"\nrows = ["linear"]\n'
    (tmp_path / "queue.toml").write_text(entry + "best = true\nseeds = [1]\n" + entry)
    assert [row.lr for row in read_rows(tmp_path / "t.toml").values()] == [1e-3, 1e-2] * 2
    jobs = read_queue(tmp_path / "queue.toml")
    assert [str(job) for job in jobs] == ["t/linear@best/1", "t/linear@lr=0.001/0", "t/linear@lr=0.01/0"]
    assert jobs[0].row(tmp_path / "res") is None
    assert batch_of(tmp_path, 600, jobs=1).run(jobs) == (3, 0)
    found = {path: json.loads(path.read_text()) for path in (tmp_path / "res/t").glob("*/seed-*.json")}
    assert len(found) == 3
    (seed_1,) = [result for result in found.values() if result["seed"] == 1]
    others = [result for result in found.values() if result["seed"] == 0]
    assert seed_1["config"]["row"] == max(others, key=lambda result: result["best"]["valid"])["config"]["row"]
    assert seed_1["graph"] == "off"
    assert seed_1["backend"] is None


@pytest.mark.parametrize("how", [["--row", "linear", "--row", "softmax"], ["--at-once", "3"]])
def test_times_of_steps_lie_beside_the_results(tmp_path, how):
    (tmp_path / "t.toml").write_text(CONFIG)
    given = [str(tmp_path / "t.toml"), "--device", "cpu", "--results", str(tmp_path / "res")]
    time_steps([given[0], *given, *how])  # twice: four rows, of which three processes have one or two
    speed = json.loads((tmp_path / "res/t/speed.json").read_text())
    assert set(speed) == {"milliseconds", "memory_gb", "machine", "machines"}
    assert set(speed["milliseconds"]) == set(speed["memory_gb"]) == set(speed["machines"]) == {"linear", "softmax"}
    assert min(speed["milliseconds"].values()) > 0
    with pytest.raises(SystemExit):
        time_steps([*given, "--row", "magic"])
