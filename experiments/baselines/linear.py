"""Linear attention (Katharopoulos et al. 2020, arXiv 2006.16236, eq. 7): features elu(x) + 1."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from experiments.baselines.base import ProjectedMixer
from experiments.baselines.kernelised import kernel_attention


class LinearMixer(ProjectedMixer):
    """phi(q_i) sum_j phi(k_j) v_j^T / (phi(q_i) sum_j phi(k_j)), phi(x) = elu(x) + 1."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None) -> Tensor:
        return kernel_attention(F.elu(query) + 1, F.elu(key) + 1, value, causal=self.causal, key_mask=key_mask)
