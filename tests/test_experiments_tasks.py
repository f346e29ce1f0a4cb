"""Tasks, the runner, and tables from result files."""

import dataclasses
import gzip
import itertools
import json
import math
import re
from pathlib import Path

import pytest
import torch

from experiments.config import ConfigError
from experiments.data import local
from experiments.data.files import read_idx
from experiments.data.local import DataError, read_checked
from experiments.labels import change, label
from experiments.models import DecoderLM, HeadConfig, MaskedLM, ModelConfig, SequenceClassifier, VisionTransformer
from experiments.page import main as page_main
from experiments.page import rendered
from experiments.recall_plot import curves
from experiments.recall_plot import main as recall_main
from experiments.rows import RunConfig, merge, read_rows, rows_named
from experiments.run import OutOfTime, Run, main
from experiments.table_plot import plot
from experiments.table_text import markdown
from experiments.tables import main as tables_main
from experiments.tables import planned_rows, read_table
from experiments.tasks import TASKS, make_task
from experiments.tasks.base import IGNORED, Batch, accuracy
from experiments.tasks.listops import END, TOKENS, ListOpsOptions, evaluate, generate
from experiments.tasks.recall import FILLER, MqarOptions, NeedleOptions, mqar_examples, needle_examples
from experiments.tasks.sentences import PADDING, UNKNOWN, read_labelled

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "experiments/configs"
CPU = torch.device("cpu")
SMALL = ModelConfig(dim=16, layers=1, heads=2, mixer_options={"tables": 2, "planes": 2}, max_length=64)
SST2 = {"length": 12, "min_count": 1}


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape) + bytes(array.flatten())


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A data folder with a little of everything; bright images are of class 1."""
    root = tmp_path / "data"
    monkeypatch.setattr(local, "CHECKSUMS", {})
    for name in ("fashion_mnist", "sst2", "novels/train", "novels/valid", "imdb"):
        (root / name).mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    for prefix, count in (("train", 60), ("t10k", 20)):
        labels = torch.arange(count, dtype=torch.uint8) % 2
        images = (
            torch.randint(100, (count, 28, 28), generator=generator, dtype=torch.uint8) + 150 * labels[:, None, None]
        )
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            (root / f"fashion_mnist/{prefix}-{kind}-ubyte.gz").write_bytes(gzip.compress(idx(array)))
    lines = [f"{i % 2}\t{('a dull film', 'a Bright film')[i % 2]} number {i}" for i in range(40)]
    content = "\n".join(["label\tsentence", *lines]) + "\n"
    (root / "sst2/train.tsv.gz").write_bytes(gzip.compress(content.encode()))
    (root / "sst2/dev.tsv").write_text(content)
    (root / "imdb/train.tsv").write_text(content)
    for part in ("train", "valid"):
        (root / f"novels/{part}/a.txt").write_text("the cat sat on the mat. " * 200)
    return root


def task(name, options, data=None, seed=0):
    return make_task(name, options, data_dir=None if data is None else str(data), device=CPU, seed=seed)


TINY = {
    "fashion_mnist": {"patch": 7},
    "sst2": SST2,
    "imdb": SST2 | {"tokens": "bytes"},
    "listops": {"train": 20, "valid": 5, "test": 5, "shortest": 5, "longest": 40},
    "language_model": {"context": 32, "valid_bytes": 256},
    "masked_language_model": {"data": "novels", "context": 32, "valid_bytes": 256},
    "mqar": {"length": 32, "pairs": 3, "vocab": 32, "train": 20, "valid": 8},
    "needle": {"length": 160, "train": 10, "valid": 4},
}


@pytest.mark.parametrize("name", TINY)
def test_task_gives_batches_a_model_and_a_score(name, data):
    first, same, other = (task(name, TINY[name], data, seed) for seed in (1, 1, 2))
    model = first.make_model(dataclasses.replace(SMALL, max_length=160), 0)
    steps = first.steps_per_epoch(4)
    order = [0, steps, 1]
    batches = {step: first.batch(step, 4) for step in order}
    for step in reversed(order):  # a batch depends on the step alone, not on those before
        again = same.batch(step, 4)
        assert torch.equal(again.inputs, batches[step].inputs)
        assert torch.equal(again.targets, batches[step].targets)
    assert not torch.equal(batches[0].inputs, other.batch(0, 4).inputs)
    loss = first.loss(model, batches[0])
    loss.backward()
    assert loss.isfinite()
    scores = first.evaluate(model, 3)
    assert scores.keys() <= {"valid", "test"}
    for size in (1, 100):
        if name != "masked_language_model":  # where the batch decides what is masked
            for split, score in first.evaluate(model, size).items():
                assert score == pytest.approx(scores[split], rel=1e-4)
    upper = 1.0 if first.metric == "accuracy" else 20.0
    assert all(0 <= score <= upper for score in scores.values())


def test_epoch_visits_every_example_once(data):
    sst2 = task("sst2", SST2, data)
    rows = torch.cat([sst2.batch(step, 4).inputs for step in range(sst2.steps_per_epoch(4))])
    assert len(rows.unique(dim=0)) == len(rows) == 40


def test_every_task_says_how_to_get_its_data(monkeypatch):
    monkeypatch.delenv("RACE_DATA_DIR", raising=False)
    local = {"listops", "mqar", "needle"}
    for name in TASKS:
        if name not in local:
            with pytest.raises(DataError, match="--data-dir"):
                task(name, {"data": "novels"} if "language" in name else {})
    with pytest.raises(DataError, match=r"(?s)wikitext-103.*--data-dir.*datasets|data 'wikitext-103'"):
        task("language_model", {"data": "wikitext-103"})
    with pytest.raises(ConfigError, match="task: got 'chess'"):
        task("chess", {})
    with pytest.raises(ConfigError, match=r"task_options.lenght: unknown key \(did you mean 'length'"):
        task("mqar", {"lenght": 3})


def test_files_are_checked(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "fashion_mnist"
    folder.mkdir()
    array = torch.arange(6, dtype=torch.uint8).view(2, 3)
    assert torch.equal(read_idx(idx(array)), array)
    for bad in (b"", b"\0\0\x0d\1" + idx(array), idx(array)[:-1]):
        with pytest.raises(ValueError, match="idx: got"):
            read_idx(bad)
    name = "train-labels-idx1-ubyte.gz"
    (folder / name).write_bytes(gzip.compress(b"not the labels"))
    with pytest.raises(ValueError, match=r"got content with SHA-256 .*, expected bad3"):
        read_checked(folder, name)
    (folder / name).write_bytes(gzip.compress(b"cut short")[:-3])
    with pytest.raises(ValueError, match="cannot be unpacked"):
        read_checked(folder, name)
    with pytest.raises(DataError, match="is missing"):
        read_checked(folder, "absent")
    file = tmp_path / "t.toml"
    file.write_text('task = "fashion_mnist"\nepochs = 1\n[rows.softmax]\n')
    (folder / "train-images-idx3-ubyte.gz").write_bytes(b"no gzip")
    with pytest.raises(SystemExit, match="2"):
        main([str(file), "--data-dir", str(tmp_path), "--device", "cpu", "--results", str(tmp_path / "res")])
    assert "train-images-idx3-ubyte.gz: cannot be unpacked" in capsys.readouterr().err
    assert read_labelled("label\ttext\n1\tgood\n0\tbad \n", "f") == (["good", "bad"], [1, 0])
    with pytest.raises(ValueError, match="f, line 3: got 'bad', expected label<TAB>text"):
        read_labelled("label\ttext\n1\tgood\nbad\n", "f")


def test_words_unknown_and_padding(data):
    sst2 = task("sst2", SST2 | {"min_count": 20}, data)
    words = sst2.words
    assert words.encode("a BRIGHT film unheard") == [words.ids["a"], words.ids["bright"], words.ids["film"], UNKNOWN]
    assert "1" not in words.ids
    split = sst2.splits["train"]
    assert torch.equal(split.padding, split.inputs == PADDING)
    assert sst2.splits["valid"].inputs.shape == (40, 12)


def test_listops_follows_the_grammar_and_its_values():
    options = ListOpsOptions(shortest=20, longest=120)
    split = generate("train", 200, options)
    lengths = (~split.padding).sum(1)
    assert lengths.min() >= 20
    assert lengths.max() <= 120
    assert len(split.inputs.unique(dim=0)) == 200
    for row, padding, value in zip(split.inputs, split.padding, split.targets, strict=True):
        tokens = row[~padding].tolist()
        assert evaluate(tokens) == value
        depth = deepest = 0
        for token in tokens:
            depth += TOKENS[token].startswith("[") - (token == END)
            deepest = max(deepest, depth)
        assert depth == 0
        assert deepest <= options.depth
    ids = {token: i for i, token in enumerate(TOKENS)}
    text = "[SM 7 [MED 1 9 4 ] [MAX 2 8 ] [MIN 6 5 ] ]"
    assert evaluate([ids[token] for token in text.split()]) == (7 + 4 + 8 + 5) % 10
    assert not torch.equal(generate("valid", 5, options).inputs, generate("test", 5, options).inputs)
    assert split.targets.unique().numel() == 10


def test_listops_at_the_published_lengths():
    split = generate("valid", 5, ListOpsOptions())
    lengths = (~split.padding).sum(1)
    assert lengths.min() >= 500
    assert lengths.max() <= 2000


def test_mqar_answers_are_the_values_of_the_keys():
    options = MqarOptions(length=64, pairs=8, vocab=64)
    split = mqar_examples(options, 50, seed=3)
    for row, target in zip(split.inputs.tolist(), split.targets.tolist(), strict=True):
        pairs = dict(zip(row[0:16:2], row[1:16:2], strict=True))
        assert len(pairs) == 8
        assert all(1 <= k < 32 <= v < 64 for k, v in pairs.items())
        asked = [i for i, t in enumerate(target) if t != IGNORED]
        assert len(asked) == 8
        assert {row[i] for i in asked} == set(pairs)
        assert all(target[i] == pairs[row[i]] and i >= 16 for i in asked)
    assert not torch.equal(split.inputs, mqar_examples(options, 50, seed=4).inputs)
    near = mqar_examples(MqarOptions(length=512, pairs=8, vocab=64), 200, seed=0).targets != IGNORED
    places = near.nonzero()[:, 1]
    assert (places < 100).float().mean() > 0.5  # a power law: most questions come soon


def test_needles_are_in_the_text_once_and_asked_for_at_its_end():
    options = NeedleOptions(length=300, needles=3, questions=2, digits=5)
    split = needle_examples(options, 40, "0")
    assert split.inputs.shape == split.targets.shape == (40, 300)
    depths = []
    for row, target in zip(split.inputs, split.targets, strict=True):
        text = bytes(row.tolist()).decode() + "."
        facts = re.findall(r" (\w+)=(\d{5})\.", text)
        assert len(facts) == 5
        assert len(set(facts[:3])) == 3
        assert set(facts[3:]) < set(facts[:3])
        assert re.search(r"( \w+=\d{5}\.){2}$", text)
        answers = bytes(byte for byte in target.tolist() if byte != IGNORED).decode()
        assert answers == "".join(number for _, number in facts[3:])
        places = (target != IGNORED).nonzero().flatten().tolist()
        assert all(text[place + 1] == chr(target[place]) for place in places)  # each asked one byte before
        depths += [text.index(f" {name}=") for name, _ in facts[:3]]
        filler = re.sub(r" \w+=\d{5}\.", "", text)
        assert set(filler.split()[1:-1]) <= set(FILLER)  # facts stand between words
    assert min(depths) < 20
    assert max(depths) > 200
    assert not torch.equal(split.inputs, needle_examples(options, 40, "1").inputs)
    rounds = needle_examples(dataclasses.replace(options, rounds=3), 5, "0")
    text = bytes(rounds.inputs[0].tolist()).decode() + "."
    asked = re.findall(r" (\w+)=\d{5}\.", text)[3:]
    assert len(asked) == 6
    assert set(asked[:2]) == set(asked[2:4]) == set(asked[4:])
    assert ((rounds.targets != IGNORED).sum(1) == 30).all()
    for wrong in ({"questions": 2}, {"needles": 13}, {"digits": 0}, {"length": 50}):
        with pytest.raises(ConfigError, match="task_options." + next(iter(wrong))):
            NeedleOptions(**wrong)


def test_accuracy_counts_what_is_asked():
    class Fixed(torch.nn.Module):
        def forward(self, x):
            return torch.nn.functional.one_hot(x, 4).float()

    batches = [Batch(torch.tensor([[1, 2], [3, 0]]), torch.tensor([[1, IGNORED], [0, 0]]))]
    assert accuracy(Fixed(), iter(batches)) == pytest.approx(2 / 3)


@pytest.mark.parametrize("pool", ["mean", "first"])
def test_classifier_ignores_padding(pool):
    model = SequenceClassifier(SMALL, HeadConfig(3, pool), seed=0).double().eval()
    short = torch.randint(256, (2, 9), generator=torch.Generator().manual_seed(0))
    long = torch.cat((short, torch.full((2, 4), 7)), dim=1)
    padding = torch.arange(13).expand(2, -1) >= 9
    torch.testing.assert_close(model(long, padding), model(short))
    assert model(short).shape == (2, 3)


def test_vision_transformer_sees_patches_row_by_row():
    model = VisionTransformer(SMALL, HeadConfig(5, patch=2, image=(4, 6), channels=3), seed=0)
    seen = []
    model.embedding.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    images = torch.arange(2 * 3 * 4 * 6).view(2, 3, 4, 6).float()
    assert model(images).shape == (2, 5)
    assert seen[0].shape == (2, 6, 12)
    assert torch.equal(seen[0][1, 4], images[1, :, 2:4, 2:4].flatten())
    with pytest.raises(ConfigError, match="patch: got 5"):
        HeadConfig(5, patch=5)


@pytest.mark.parametrize("mixer", ["race", "softmax", "linear", "performer", "linformer", "sigmoid", "yoso", "angular"])
def test_a_line_swaps_the_method_in_every_model(mixer):
    config = dataclasses.replace(SMALL, mixer=mixer, mixer_options={"rank": 4} if mixer == "linformer" else {})
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    assert MaskedLM(config)(tokens).shape == (1, 8, 256)
    assert SequenceClassifier(config, HeadConfig(2))(tokens).shape == (1, 2)
    assert VisionTransformer(config, HeadConfig(2, patch=4, image=(8, 8)))(torch.zeros(1, 1, 8, 8)).shape == (1, 2)
    if mixer != "linformer":
        assert DecoderLM(config)(tokens).shape == (1, 8, 256)


def run_config(**changes):
    base = RunConfig("t", "r", "sst2", SST2, SMALL, epochs=3, batch=8, lr=1e-2, checkpoint_every=0)
    return dataclasses.replace(base, **changes)


def run_of(config, data, tmp_path, seed=0):
    return Run(
        config, seed, data_dir=str(data), device="cpu", results=tmp_path / "res", work=tmp_path / "work", quiet=True
    )


def test_run_learns_and_writes_what_tables_need(data, tmp_path):
    result = run_of(run_config(epochs=8), data, tmp_path).train()
    path = tmp_path / "res/t/r/seed-0.json"
    assert json.loads(path.read_text()) == json.loads(json.dumps(result))
    assert result["error"] is None
    assert result["best"]["valid"] > 0.9
    assert result["steps"] == 40
    assert [point["step"] for point in result["curve"]] == list(range(5, 41, 5))
    for key in ("torch", "python", "date", "cpu"):
        assert result["machine"][key]
    assert not list((tmp_path / "work").rglob("*.safetensors"))


def test_stopped_run_goes_on_with_the_same_curve(data, tmp_path):
    config = run_config(steps=120, epochs=None, eval_every=40)
    whole = run_of(config, data, tmp_path).train()
    (tmp_path / "res/t/r/seed-0.json").unlink()
    for _ in range(2):
        with pytest.raises(OutOfTime):
            run_of(config, data, tmp_path).train(max_seconds=0)
    torch.rand(3)
    parts = run_of(config, data, tmp_path).train()

    def scores(result):
        return [{k: v for k, v in point.items() if k != "seconds"} for point in result["curve"]]

    whole_curve, parts_curve = scores(whole), scores(parts)
    assert [p["valid"] for p in whole_curve] == [p["valid"] for p in parts_curve]
    assert whole_curve[-1]["step"] == parts_curve[-1]["step"] == 120
    with pytest.raises(OutOfTime):
        run_of(config, data, tmp_path, seed=1).train(max_seconds=0)
    with pytest.raises(ConfigError, match="another configuration"):
        run_of(dataclasses.replace(config, lr=1.0), data, tmp_path, seed=1).train()


def test_diverged_run_is_a_result_with_its_reason(data, tmp_path):
    run = run_of(run_config(), data, tmp_path)
    run.model.head.weight.data.fill_(math.nan)
    assert "diverged" in run.train()["error"]
    assert "failed, see below" in markdown(read_table(tmp_path / "res/t"), "t")


def test_rows_of_a_file_differ_from_what_they_share(tmp_path):
    file = tmp_path / "words.toml"
    file.write_text(
        'task = "sst2"\nepochs = 2\n[model]\ndim = 32\nmixer = "race"\n[model.mixer_options]\nplanes = 3\n'
        "[rows.race]\n[rows.slow]\nlr = 1e-4\nmodel = {mixer_options = {tables = 5}}\n"
        '[rows.softmax]\nmodel = {mixer = "softmax"}\n'
    )
    rows = read_rows(file, ["epochs=1"])
    assert [row.table for row in rows.values()] == ["words"] * 3
    assert rows["race"].model.mixer_options == {"planes": 3}
    assert rows["slow"].model.mixer_options == {"planes": 3, "tables": 5}
    assert rows["slow"].lr == 1e-4
    assert rows["softmax"].model.mixer_options == {}
    assert all(row.epochs == 1 for row in rows.values())
    assert merge({"a": {"b": 1}}, {"a": 2}) == {"a": 2}
    with pytest.raises(ConfigError, match=r"words.toml, row race: lr: got -1"):
        read_rows(file, ["lr=-1"])
    file.write_text('task = "sst2"\n')
    with pytest.raises(ConfigError, match=r"rows: got {}, allowed is a table \[rows.NAME\]"):
        read_rows(file)


def test_a_file_may_differ_from_another(tmp_path):
    (tmp_path / "one.toml").write_text(
        'task = "mqar"\nsteps = 3\ntask_options = {pairs = 4, vocab = 64}\nsearch = {lr = [0.1, 0.2]}\n'
        '[rows.linear]\nmodel = {mixer = "linear"}\n[rows.softmax]\nmodel = {mixer = "softmax"}\n'
    )
    other = tmp_path / "other.toml"
    other.write_text('like = "one.toml"\ntask_options = {pairs = 8}\n[rows.linear]\nsearch = {lr = [0.3]}\n')
    rows = read_rows(other)
    assert list(rows) == ["linear@lr=0.3", "softmax@lr=0.1", "softmax@lr=0.2"]
    assert {row.table for row in rows.values()} == {"other"}
    assert all(row.steps == 3 and row.task_options == {"pairs": 8, "vocab": 64} for row in rows.values())
    assert list(planned_rows(other)) == ["linear", "softmax"]
    for like, message in [("7", r"like: got 7"), ('"none.toml"', "cannot read"), ('"other.toml"', "names none itself")]:
        other.write_text(f"like = {like}\n")
        with pytest.raises(ConfigError, match=message):
            read_rows(other)


def test_a_name_stands_for_its_search(tmp_path):
    file = tmp_path / "t.toml"
    file.write_text('task = "sst2"\nepochs = 1\nsearch = {lr = [0.1, 0.2]}\n[rows.race-2x2]\n[rows.linear]\n')
    rows = read_rows(file)
    assert rows_named(rows, "linear") == ["linear@lr=0.1", "linear@lr=0.2"]
    assert rows_named(rows, "linear@lr=0.2") == ["linear@lr=0.2"]
    with pytest.raises(ConfigError, match=r"--row: got 'race-3x2', allowed is one of race-2x2, linear \(did you mean"):
        rows_named(rows, "race-3x2")
    with pytest.raises(ConfigError, match=r"allowed is one of linear@lr=0.1, linear@lr=0.2$"):
        rows_named(rows, "linear@lr=0.3")


def test_command_lines(data, tmp_path, capsys):
    file = tmp_path / "t.toml"
    file.write_text(
        'task = "sst2"\nepochs = 1\nbatch = 8\n[model]\ndim = 16\nlayers = 1\nheads = 2\n[rows.linear]\n'
        'model = {mixer = "linear"}\n[rows.softmax]\nmodel = {mixer = "softmax"}\n'
    )
    common = ["--data-dir", str(data), "--device", "cpu", "--results", str(tmp_path / "res")]
    work = ["--work", str(tmp_path / "work")]
    main([str(file), *common, *work, "--seed", "0", "--seed", "1"])
    main([str(file), *common, *work, "--row", "softmax", "epochs=1"])  # overrides may come last
    assert "softmax/seed-0.json: done before" in capsys.readouterr().out
    for changes, said in {
        "epochs=2": "(epochs: 1.0 there, 2.0 here); keep it",
        "model.mixer_options.rope=100.0": "(model.mixer_options.rope: None there, 100.0 here)",
    }.items():
        with pytest.raises(SystemExit):
            main([str(file), *common, *work, "--row", "softmax", changes])
        assert said in capsys.readouterr().err
    (tmp_path / "res/t/paper.json").write_text('{"softmax": 82.1}')
    tables_main(["--results", str(tmp_path / "res"), "--plots", str(tmp_path / "plots")])
    shown = capsys.readouterr().out
    assert re.search(r"\| softmax \| [\d.]+ ± [\d.]+ \| 82.1 \| 2 \|", shown)
    assert (tmp_path / "plots/t.png").stat().st_size > 5000
    tables_main(["t", "--results", str(tmp_path / "res"), "--rows", "*", "!soft*"])
    shown = capsys.readouterr().out
    assert "| linear" in shown
    assert "softmax" not in shown
    for arguments in (
        [str(file), *common, "--row", "magic"],
        [str(tmp_path / "absent.toml")],
        [str(file), "--data-dir", str(tmp_path / "nowhere")],
    ):
        with pytest.raises(SystemExit) as stop:
            main([*arguments, *work])
        assert stop.value.code == 2
    with pytest.raises(SystemExit):
        tables_main(["absent", "--results", str(tmp_path / "res")])


def test_tables_take_the_test_score_at_the_best_validation_step(data, tmp_path):
    rows = []
    for seed, (test, error) in enumerate([(0.8, None), (0.9, None), (0.5, "diverged")]):
        folder = tmp_path / "t/row"
        folder.mkdir(parents=True, exist_ok=True)
        result = {
            "machine": {"cpu": "C"},
            "parameters": 1000,
            "metric": "accuracy",
            "seconds": 2.0,
            "peak_memory_gb": 1.0,
            "seed": seed,
            "error": error,
            "best": {"valid": 0.7, "test": test},
        }
        (folder / f"seed-{seed}.json").write_text(json.dumps(result))
    rows = read_table(tmp_path / "t")
    assert rows[0].scores == (0.8, 0.9)
    text = markdown(rows, "t")
    assert "| row | 85.00 ± 7.07 | 70.00 ± 0.00 | 2 | 1,000 | 1.00 |" in text
    assert "- row, seed 2: diverged" in text
    plot(rows, "t", tmp_path / "t.png")
    (tmp_path / "t/row/seed-0.json").write_text("{}")
    with pytest.raises(ConfigError, match="no result of experiments"):
        read_table(tmp_path / "t")


def searched(folder, row, seed, valid, test, **more):
    path = folder / row / f"seed-{seed}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "machine": {"cpu": "C", "gpu": "G"},
        "parameters": 1000,
        "metric": "bits",
        "higher_is_better": False,
        "seconds": 2.0,
        "peak_memory_gb": 1.0,
        "seed": seed,
        "error": None,
        "best": {"valid": valid, "test": test},
    }
    path.write_text(json.dumps(result | more))


def test_tables_show_a_search_and_what_was_not_run(tmp_path):
    searched(tmp_path, "a@lr=0.001", 0, 2.0, 2.1)
    searched(tmp_path, "a@lr=0.002", 0, 1.9, 2.2)
    searched(tmp_path, "a@lr=0.002", 1, 1.95, 2.4)
    searched(tmp_path, "a@lr=0.01", 0, 0, 0, best=None, error="diverged")
    (tmp_path / "missing.json").write_text('{"c": "needs another package"}')
    (tmp_path / "speed.json").write_text('{"milliseconds": {"a": 3.25}}')
    planned = {"b": {"mixer": "race", "mixer_options": {"planes": 3, "conv_size": 4, "decay": "per_token"}}, "a": {}}
    rows = read_table(tmp_path, planned)
    assert [row.name for row in rows] == ["b", "a", "c"]
    assert rows[1].scores == (2.2, 2.4)
    text = markdown(rows, "t")
    tried = "lr=0.001 2.0000, **lr=0.002 1.9000 (2 seeds: 1.9250)**, lr=0.01 failed"
    assert "| a | 2.3000 ± 0.1414 | 1.9250 ± 0.0354 | 2 | 1,000 | 3.2 | 1.00 |" in text
    assert f"| `a` | {tried} |" in text
    assert "| RACE (3,4), convolution, decay | (not run yet: no time on the GPU) |" in text
    assert "| c | (needs another package) |" in text
    plot(rows, "t", tmp_path / "t.svg")
    before = (tmp_path / "t.svg").read_bytes()
    plot(rows, "t", tmp_path / "t.svg")
    assert (tmp_path / "t.svg").read_bytes() == before
    searched(tmp_path, "e", 0, 1.0, 1.0, steps=500)  # rows of different steps show them, and what they take alone
    (tmp_path / "speed.json").write_text('{"milliseconds": {"e": 3.25}}')
    text = markdown(read_table(tmp_path), "t")
    assert "| steps | ms / step | s in all | memory, GB |" in text
    assert "| e | 1.0000 (one seed) | 1.0000 | 1 | 1,000 | 500 | 3.2 | 1.6 | 1.00 |" in text
    assert {row.count("|") for row in text.splitlines() if row.startswith("|")} == {10, 3}
    (tmp_path / "speed.json").write_text('{"milliseconds": {"e": 3.25}, "memory_gb": {"e": 0.5}}')
    text = markdown(read_table(tmp_path), "t")  # memory alone and in company are not set beside each other
    assert "| e | 1.0000 (one seed) | 1.0000 | 1 | 1,000 | 500 | 3.2 | 1.6 | 0.50 |" in text
    assert "| a | 2.3000 ± 0.1414 | 1.9250 ± 0.0354 | 2 | 1,000 | 0 |  |  |  |" in text
    text = markdown(read_table(tmp_path), "t", against="e")
    assert "| e | 1.0000 (one seed) | 1.0000 |  | 1 |" in text
    assert "| a | 2.3000 ± 0.1414 | 1.9250 ± 0.0354 | +92.5 % | 2 |" in text
    searched(tmp_path, "b", 0, 1.0, 1.0, data_sha256="x")
    searched(tmp_path, "d", 0, 1.0, 1.0, data_sha256="y")
    with pytest.raises(ConfigError, match="the same data"):
        read_table(tmp_path)


def test_configurations_of_the_repository_build():
    names = sorted((ROOT / "experiments/configs").glob("*.toml"))
    for path in names:
        if path.name != "queue.toml":
            assert read_rows(path), path


def test_real_files_where_they_are():
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    fashion = task("fashion_mnist", {}, folder)
    assert {k: len(v.targets) for k, v in fashion.splits.items()} == {"train": 55000, "valid": 5000, "test": 10000}
    assert fashion.batch(0, 4).inputs.shape == (4, 1, 28, 28)
    sst2 = task("sst2", {"limit": 1000}, folder)
    assert {k: len(v.targets) for k, v in sst2.splits.items()} == {"train": 1000, "valid": 872, "test": 1000}
    assert len(list(itertools.islice(sst2.batches("valid", 100), 3))) == 3


METHODS = ["race", "softmax", "linear", "performer", "linformer", "sigmoid", "yoso", "angular"]


@pytest.mark.parametrize(
    ("mixer", "name"), [*((m, "sst2") for m in METHODS), *((m, "mqar") for m in METHODS if m != "linformer")]
)
def test_every_method_trains_in_bfloat16(mixer, name, data, tmp_path):
    options = {"linformer": {"rank": 4}, "race": {"conv_size": 4, "norm_gate": True}}.get(mixer, {})
    if (mixer, name) == ("race", "mqar"):
        options |= {"decay": "per_token", "learn_hyperplanes": True}
    model = dataclasses.replace(SMALL, mixer=mixer, mixer_options=options)
    config = run_config(task=name, task_options=TINY[name], model=model, precision="bfloat16", steps=3, epochs=None)
    result = run_of(config, data, tmp_path).train()
    assert result["error"] is None
    assert result["final"]["train_loss"] < 10


def test_recall_is_drawn_against_the_size_of_the_state(tmp_path):
    for row, valid in (("race-2x2", 0.2), ("race-4x4", 0.9), ("race-2x2-conv", 0.5), ("softmax", 1.0)):
        searched(tmp_path / "mqar", row, 0, valid, valid, metric="accuracy", higher_is_better=True)
    variants, others = curves(read_table(tmp_path / "mqar"))
    assert {name: [s for s, _ in found] for name, found in variants.items()} == {
        "RACE, bare": [8, 64],
        "RACE, conv": [8],
    }
    assert [row.name for row in others] == ["softmax"]
    recall_main([str(tmp_path / "m.svg"), "--results", str(tmp_path)])
    assert (tmp_path / "m.svg").stat().st_size > 1000


def test_a_row_is_called_by_its_settings():
    rows = {name.partition("@")[0]: row for name, row in read_rows(CONFIGS / "novels_1024_short.toml").items()}
    models = {name: dataclasses.asdict(row.model) for name, row in rows.items()}
    whole = models["race-4x4-all"]
    assert label(whole) == "RACE (4,4), learned planes, convolution, decay, gate"
    assert label(models["linear-conv-per-token-gate-rope-heads8"], 4).startswith("linear (elu + 1), 8 heads, rotary")
    assert change(models["race-4x4-all-no-decay"], whole) == "no decay"
    assert change(models["race-4x4-all-multiscale"], whole) == "fixed decays"
    assert change(models["race-2x2-all-rope"], whole) == "(2,2), rotary"
    assert change(models["race-4x4-all-rope-fixed-planes"], whole) == "rotary, no learned planes"
    assert change(whole, whole) == ""
    assert len({label(model, 4) for model in models.values()}) == len(models)


def test_a_page_shows_tables_and_what_has_none(tmp_path, capsys):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/t.toml").write_text(
        "[rows.a]\n[rows.b]\n[rows.b-c]\nmodel = { mixer = 'linear', mixer_options = { rope = 1e4, conv_size = 4 } }\n"
    )
    searched(tmp_path / "results/t", "a", 0, 1.0, 2.0)
    text = "x\n<!-- accuracy: t | A title -->\nold\n<!-- end -->\n<!-- accuracy: u | Another | a -->\n<!-- end -->\ny\n"
    page = rendered(text, tmp_path / "results", tmp_path / "configs")
    assert page.startswith("x\n<!-- accuracy: t | A title -->\n\n**A title**\n\n| method |")
    assert "old" not in page
    assert "| a | 2.0000 (one seed) | 1.0000 | 1 |" in page
    assert "| linear (elu + 1), rotary, convolution | (not run yet" in page
    assert "| b | (not run yet" in page
    assert "**Another**\n\n*Not run yet" in page
    assert page.endswith("<!-- end -->\ny\n")
    assert rendered(page, tmp_path / "results", tmp_path / "configs") == page
    some = rendered(text.replace("A title", "A title | b* !*-c"), tmp_path / "results", tmp_path / "configs")
    assert "| b | (not run yet" in some
    assert "| a |" not in some
    assert "| linear" not in some
    with pytest.raises(ConfigError, match="no row"):
        rendered(text.replace("A title", "A title | z"), tmp_path / "results", tmp_path / "configs")
    (tmp_path / "p.md").write_text(text)
    folders = ["--results", str(tmp_path / "results"), "--configs", str(tmp_path / "configs")]
    with pytest.raises(SystemExit, match="1"):
        page_main([str(tmp_path / "p.md"), "--check", *folders])
    assert "not what the results say" in capsys.readouterr().err
    page_main([str(tmp_path / "p.md"), *folders])
    assert (tmp_path / "p.md").read_text() == page
    page_main([str(tmp_path / "p.md"), "--check", *folders])


def test_the_page_on_accuracy_is_what_the_results_say():
    page_main(
        [
            str(ROOT / "docs/accuracy.md"),
            "--check",
            "--results",
            str(ROOT / "experiments/results"),
            "--configs",
            str(ROOT / "experiments/configs"),
        ]
    )
