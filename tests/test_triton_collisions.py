"""The kernel that counts sampled YOSO's collisions, against the count in torch: whole numbers, so equal."""

import pytest
import torch

from experiments.baselines.yoso import YosoMixer, shares
from tests.interpreter import DEVICE, KERNELS_RUN

pytestmark = KERNELS_RUN


@pytest.mark.parametrize(
    ("hashes", "rows", "queries", "keys"), [(1, 3, 5, 70), (9, 2, 64, 64), (32, 1, 130, 1), (2, 1, 0, 3)]
)
def test_kernel_counts_as_torch_does(hashes, rows, queries, keys):
    from experiments.baselines import collisions

    generator = torch.Generator().manual_seed(hashes)
    of_query, of_key = (
        torch.randint(3, (hashes, rows, length), generator=generator, dtype=torch.int32) for length in (queries, keys)
    )
    found = collisions.shares(of_query.to(DEVICE), of_key.to(DEVICE))
    assert found.shape == (rows, queries, keys)
    assert torch.equal(found.cpu() * hashes, shares(of_query, of_key) * hashes)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_compiled_and_recorded_it_draws_anew_each_time():
    mixer = YosoMixer(64, 2, causal=False, max_length=100, tau=2).cuda()
    mixer.compile()
    x = torch.randn(2, 100, 64, device="cuda")
    first, second = mixer(x), mixer(x)
    assert first.isfinite().all()
    assert not torch.equal(first, second)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = mixer(x)
    graph.replay()
    third = out.clone()
    graph.replay()
    assert not torch.equal(third, out)
    assert (out - first).abs().max() < 1
