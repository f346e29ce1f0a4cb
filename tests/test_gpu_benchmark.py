"""What the GPU benchmark does without a GPU: result files of several runs become one."""

import json

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import gpu, gpu_decay
from benchmarks.gpu_parts import PARTS, jobs_of
from race_attention.testing import make_inputs
from tests.helpers import by_oracle, no_tokens

MACHINE = {"gpu": "G", "driver": "1", "torch": "2", "triton": "3", "flash_linear_attention": None}


def _file(folder, name, commit, rows, **machine):
    path = folder / f"{name}.json"
    context = MACHINE | {"commit": commit} | machine
    path.write_text(json.dumps({"title": "t", "context": context, "copy_bytes_per_second": 1.0, "rows": rows}))
    return path


def test_merged_rows_are_of_the_first_file_that_has_them_and_name_their_commit(tmp_path):
    newest = _file(tmp_path, "newest", "c" * 40, [{"part": "table", "P": 2, "ms": 1.0}])
    older = [{"part": "table", "P": 2, "ms": 2.0}, {"part": "table", "P": 3, "ms": 3.0}]
    older.append({"part": "table", "P": 4, "ms": 4.0, "commit": "a" * 9})  # of a file that was merged before
    output = tmp_path / "merged.json"
    gpu.merge([newest, _file(tmp_path, "older", "b" * 40, older, flash_linear_attention="0.6")], output)
    found = json.loads(output.read_text())
    assert [(row["ms"], row.get("commit")) for row in found["rows"]] == [(1.0, None), (3.0, "b" * 9), (4.0, "a" * 9)]
    assert found["context"]["commit"] == "c" * 40
    assert found["context"]["flash_linear_attention"] == "0.6"


def test_files_of_different_machines_are_not_merged(tmp_path):
    paths = [_file(tmp_path, name, "c" * 40, [], gpu=name) for name in ("one", "other")]
    with pytest.raises(SystemExit, match="gpu differs"):
        gpu.merge(paths, tmp_path / "merged.json")


def test_each_part_has_what_it_compiles_beforehand():
    for part in set(PARTS) - {"linear", "gated"}:
        jobs = jobs_of([part])
        assert jobs, part
        assert all(job[0] in ("race", "token") for job in jobs)


def test_what_queries_add_to_the_gradient_of_a_decay():
    """The sweep of decays takes it from two calls, the tests from the oracle's pairs."""
    given = {"causal": True, "batch": 1, "heads": 2, "dim": 8, "tokens": 40, "decay": "head", "seed": 3}
    inputs = make_inputs(**given, dtype=torch.float64, requires_grad=True)
    inputs["log_decay"] = (inputs["log_decay"].detach() - 0.05).requires_grad_()  # the first head has none
    right = by_oracle(inputs, lambda results, x: (results[0], no_tokens(x))).terms["gradient of log_decay"]
    along = torch.randn(inputs["value"].shape, generator=torch.Generator().manual_seed(2)).bfloat16()
    assert gpu_decay.of_queries(inputs, along) == pytest.approx(right, rel=1e-6)
