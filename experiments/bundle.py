"""All results in one file and back, for machines that keep nothing."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

from experiments.config import check
from race_attention.state import write_atomically


def bundle(results: Path, path: Path) -> int:
    """All results below ``results`` as one .tar.gz; returns how many."""
    files = sorted([*results.glob("*/*/seed-*.json"), *results.glob("*/speed.json")])
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for file in files:
            tar.add(file, arcname=file.relative_to(results).as_posix())
    write_atomically(path, packed.getvalue())
    return len(files)


def unbundle(path: Path, results: Path) -> int:
    """Puts the results of a bundle below ``results``; returns how many.

    Raises:
        ConfigError: a member that is no result.
    """
    count = 0
    with tarfile.open(fileobj=io.BytesIO(path.read_bytes())) as tar:
        for member in tar.getmembers():
            parts = Path(member.name).parts
            result = len(parts) == 3 and parts[2].startswith("seed-")
            fits = (result or parts[1:] == ("speed.json",)) and ".." not in parts and member.isfile()
            check(fits, "bundle", member.name, "TABLE/ROW/seed-N.json or TABLE/speed.json")
            target = results.joinpath(*parts)
            target.parent.mkdir(parents=True, exist_ok=True)
            content = tar.extractfile(member)
            assert content is not None
            target.write_bytes(content.read())
            count += 1
    return count
