"""Local files of picture sets, and of texts without a validation set."""

import re
import tarfile

import pytest
import torch
from PIL import Image

from experiments.data import local
from experiments.data.local import DataError
from experiments.data.pictures import CIFAR_FILES, read_cifar10
from experiments.tasks import make_task

CPU = torch.device("cpu")


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
