"""Data sets from local files and, with a stand-in for it, from the Hugging Face hub."""

import random
import re
import sys
import tarfile
import types
from pathlib import Path

import pytest
import torch
from PIL import Image

from experiments.data import local
from experiments.data.files import HUB
from experiments.data.local import DATA_DIR, DataError
from experiments.data.pictures import CIFAR_FILES, read_cifar10
from experiments.models.blocks import ModelConfig
from experiments.rows import read_rows
from experiments.tasks import make_task

CPU = torch.device("cpu")
CONFIGS = Path(__file__).resolve().parents[1] / "experiments/configs"
#: Configurations of sets that users bring or fetch, and what makes them small: options of the task, tokens of a model.
FETCHED = {
    "arxiv": ({"length": 64}, 64),
    "arxiv_32768": ({"length": 64}, 64),
    "arxiv_65536": ({"length": 64}, 64),
    "imdb": ({"length": 64}, 64),
    "qnli": ({"length": 64}, 64),
    "sst2": ({"min_count": 1}, 64),
    "yahoo": ({"min_count": 1, "length": 16}, 16),
    "cifar10": ({"side": 8}, 64),
    "fashion_mnist": ({"patch": 7}, 16),
    "food101": ({"side": 8}, 64),
    "ptb": ({"context": 32, "valid_bytes": 64}, 32),
    "wikitext103": ({"context": 32, "valid_bytes": 64}, 32),
    "tinystories": ({"context": 32, "valid_bytes": 64}, 32),
}


def task(name, options, data):
    return make_task(name, options, data_dir=str(data), device=CPU, seed=0)


def records(count, first):
    """``count`` CIFAR records: labels from ``first`` on, red of the label, green of the row, blue of the column."""
    row = torch.arange(32, dtype=torch.uint8)
    planes = torch.stack((torch.zeros(32, 32, dtype=torch.uint8), row[:, None].expand(32, 32), row.expand(32, 32)))
    labels = [(first + i) % 10 for i in range(count)]
    return labels, b"".join(bytes([label, *planes.add(0).flatten()]) for label in labels)


@pytest.mark.parametrize("packed", [False, True])
def test_cifar10_as_its_authors_pack_it(packed, tmp_path, monkeypatch):
    folder = tmp_path / "cifar10"
    inner = folder / "cifar-10-batches-bin"
    inner.mkdir(parents=True)
    labels = {}
    for number, name in enumerate(CIFAR_FILES["train"] + CIFAR_FILES["test"]):
        labels[name], content = records(10, number)
        (inner / name).write_bytes(content)
    if packed:
        monkeypatch.setattr(local, "CHECKSUMS", {})
        with tarfile.open(folder / "cifar-10-binary.tar.gz", "w:gz") as tar:
            tar.add(inner, arcname=inner.name)
        for path in inner.iterdir():
            path.unlink()
    loaded = task("cifar10", {"grey": False}, tmp_path)
    assert {name: len(split.targets) for name, split in loaded.splits.items()} == {"train": 45, "valid": 5, "test": 10}
    assert loaded.splits["test"].targets.tolist() == labels["test_batch.bin"]
    picture = loaded.splits["test"].inputs[3]
    assert picture.shape == (3, 32, 32)
    assert picture[:, 5, 9].tolist() == [0, 5, 9]
    grey, _ = read_cifar10(folder, "test", 32, grey=True, limit=2)
    assert grey.shape == (2, 1, 32, 32)
    assert grey[0, 0, 20, 30] == round(0.587 * 20 + 0.114 * 30)
    assert read_cifar10(folder, "test", 8, grey=True)[0].shape == (10, 1, 8, 8)


def test_cifar10_that_is_none(tmp_path):
    folder = tmp_path / "cifar10"
    folder.mkdir()
    with pytest.raises(DataError, match=r"data_batch_1.bin is missing"):
        task("cifar10", {}, tmp_path)
    for name in CIFAR_FILES["train"]:
        (folder / name).write_bytes(b"no picture")
    with pytest.raises(ValueError, match="got 50 bytes that are no records"):
        task("cifar10", {}, tmp_path)
    (folder / "cifar-10-binary.tar.gz").write_bytes(b"another archive")
    with pytest.raises(ValueError, match=r"got content with SHA-256 .*, expected c4a38c50"):
        task("cifar10", {}, tmp_path)


def test_food101_in_folders(tmp_path):
    root = tmp_path / "food101"
    (root / "meta").mkdir(parents=True)
    names = [f"{kind}/{i}" for kind in ("apple_pie", "waffles") for i in range(20)]
    for name in names:
        path = root / "images" / f"{name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 20), (250, 250, 250) if "waffles" in name else (5, 5, 5)).save(path)
    for part in ("train", "test"):
        (root / "meta" / f"{part}.txt").write_text("\n".join(names) + "\n")
    loaded = task("food101", {"side": 16}, tmp_path)
    assert loaded.splits["train"].inputs.shape == (36, 1, 16, 16)
    for split in loaded.splits.values():  # what is held out holds both classes
        assert set(split.targets.tolist()) == {0, 1}
        assert torch.equal(split.inputs.float().mean((1, 2, 3)) > 128, split.targets == 1)
    (root / "images/waffles/3.jpg").unlink()
    with pytest.raises(DataError, match=re.escape("3.jpg is missing, which meta/train.txt lists")):
        task("food101", {"side": 16}, tmp_path)


def test_sorted_texts_are_shuffled_before_some_are_held_out(tmp_path):
    folder = tmp_path / "imdb"
    folder.mkdir()
    lines = [f"{int(i >= 50)}\t{('dull', 'bright')[i >= 50]} {i}" for i in range(100)]
    (folder / "train.tsv").write_text("\n".join(["label\ttext", *lines]) + "\n")
    options = {"tokens": "bytes", "length": 12}
    loaded, again = (task("imdb", options, tmp_path) for _ in range(2))
    assert set(loaded.splits["valid"].targets.tolist()) == {0, 1}
    assert torch.equal(loaded.splits["valid"].inputs, again.splits["valid"].inputs)
    bright = loaded.splits["train"].inputs[:, 0] == b"b"[0] + 2
    assert torch.equal(bright, loaded.splits["train"].targets == 1)


class Rows:
    """As much of a split of the hub as the tasks ask for."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __iter__(self):
        return iter(self.rows)

    def __getitem__(self, column):
        return [row[column] for row in self.rows]

    def shuffle(self, seed):
        return Rows(random.Random(seed).sample(self.rows, len(self.rows)))

    def select(self, places):
        return Rows([self.rows[place] for place in places])


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the package datasets: 40 rows of every split; returns what was asked of it."""
    asked = []

    def load_dataset(repository, configuration, split, revision=None):
        asked.append((repository, configuration, split, revision))
        if "ptb" in repository and revision is None:
            raise RuntimeError("Dataset scripts are no longer supported, but found ptb_text_only.py")
        where = next(one for one in HUB.values() if (one.repository, one.configuration) == (repository, configuration))
        picture = where.column in ("image", "img")
        rows = []
        for number in range(40):
            value = Image.new("L", (32, 32), 5 * number) if picture else f"{split} says {number}"
            rows.append(dict.fromkeys(where.column.split("+"), value) | {where.label: number % 2})
        return Rows(rows)

    monkeypatch.delenv(DATA_DIR, raising=False)
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    return asked


def configured(name, data_dir, **more):
    """The task of a configuration of the repository, made small, and a batch's loss of a small model."""
    row = next(iter(read_rows(CONFIGS / f"{name}.toml").values()))
    options, tokens = FETCHED[name]
    made = make_task(row.task, row.task_options | options | more, data_dir=data_dir, device=CPU, seed=0)
    model = ModelConfig(dim=8, layers=1, heads=1, max_length=tokens, positions="learned", mixer="softmax")
    loss = made.loss(made.make_model(model, 0), made.batch(0, 4))
    assert loss.isfinite()
    return made


@pytest.mark.parametrize("name", FETCHED)
def test_sets_by_their_names_on_the_hub(name, hub):
    made = configured(name, None)
    if hasattr(made, "splits"):
        assert {split: len(some.targets) for split, some in made.splits.items()}.keys() >= {"train", "valid"}
        assert all(set(some.targets.tolist()) == {0, 1} for some in made.splits.values())
    else:
        assert bytes(made.text.train[:12].tolist()) == b"train says 0"
        assert (made.text.test is None) == (name == "tinystories")
    assert all(revision is None for repository, _, _, revision in hub if "ptb" not in repository)


def test_a_set_that_is_a_program_comes_from_the_conversion_of_the_hub(hub):
    configured("ptb", None)
    assert [revision for _, _, split, revision in hub if split == "train"] == [None, "refs/convert/parquet"]


@pytest.mark.parametrize("name", ["arxiv", "imdb", "qnli", "yahoo"])
def test_labelled_texts_in_files(name, tmp_path):
    folder = tmp_path / name
    folder.mkdir()
    for part in ("train", "valid", "test"):
        lines = [f"{number % 2}\t{part} says {number}" for number in range(30)]
        (folder / f"{part}.tsv").write_text("\n".join(["label\ttext", *lines]) + "\n")
    made = configured(name, str(tmp_path), tokens="bytes")
    assert {split: len(some.targets) for split, some in made.splits.items()} == dict.fromkeys(
        ("train", "valid", "test"), 30
    )
    assert bytes((made.splits["valid"].inputs[3, :12] - 2).tolist()) == b"valid says 3"


@pytest.mark.parametrize("name", ["ptb", "wikitext103", "tinystories"])
def test_texts_in_files(name, tmp_path):
    folder = tmp_path / {"wikitext103": "wikitext-103"}.get(name, name)
    folder.mkdir()
    for part in ("train", "valid"):
        (folder / f"{part}.txt").write_text(f"{part} says " * 20)
    assert configured(name, str(tmp_path)).text.test is None
    (folder / "test.txt").write_text("test says " * 20)
    made = configured(name, str(tmp_path))
    assert bytes(made.text.test[:9].tolist()) == b"test says"
    assert made.evaluate(made.make_model(ModelConfig(dim=8, layers=1, heads=1, mixer="softmax"), 0), 2).keys() == {
        "valid",
        "test",
    }


@pytest.mark.parametrize("name", FETCHED)
def test_what_is_missing_says_both_ways_to_get_it(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # not installed
    row = next(iter(read_rows(CONFIGS / f"{name}.toml").values()))
    data = row.task_options.get("data", row.task)
    ways = f"{data}.*--data-dir.*{DATA_DIR}.*pip install datasets.*{HUB[data].repository}"
    for folder in (None, str(tmp_path)):
        with pytest.raises(DataError, match=ways):
            configured(name, folder)
    (tmp_path / data).mkdir()  # a folder, and nothing in it
    with pytest.raises(DataError, match=f"(is missing|holds no train.txt).*{ways}"):
        configured(name, str(tmp_path))
