"""Softmax attention (Vaswani et al. 2017, arXiv 1706.03762, eq. 1) through torch's fused kernel."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.baselines.base import ProjectedMixer


class SoftmaxMixer(ProjectedMixer):
    """softmax(q k^T / sqrt(D)) v, with rotary positions (``rope``, the base) or none.

    Its state for generation is the keys and values so far, so it grows with the text.
    """

    recurrent = True

    def attend(self, query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None) -> Tensor:
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))  # [B, H, T, D]
        mask, causal = None, self.causal
        if key_mask is not None:
            mask = key_mask[:, None, None, :]
            if causal:
                length = query.shape[2]
                mask, causal = mask & query.new_ones(length, length, dtype=torch.bool).tril(), False
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal).transpose(1, 2)

    def forward(
        self,
        x: Tensor,
        *,
        key_padding_mask: Tensor | None = None,
        state: tuple[Tensor, Tensor] | None = None,
        return_state: bool = False,
    ) -> Any:
        """As every mixer; the state is keys and values so far, [B, T, H, D] each."""
        if state is None and not return_state:
            return super().forward(x, key_padding_mask=key_padding_mask)
        if not self.causal or key_padding_mask is not None:
            raise ValueError("state: softmax keeps one only where it is causal and without padding")
        if self.conv_weight is not None:
            raise ValueError("state: softmax keeps none with conv_size")
        before = 0 if state is None else state[0].shape[1]
        query, key, value = self.project(x, offset=before)
        if state is not None:
            key, value = torch.cat((state[0], key), dim=1), torch.cat((state[1], value), dim=1)
        length = key.shape[1]
        seen = torch.ones(length - before, length, dtype=torch.bool, device=x.device).tril(before)
        query, key_hf, value_hf = (y.transpose(1, 2) for y in (query, key, value))  # [B, H, T, D]
        out = F.scaled_dot_product_attention(query, key_hf, value_hf, attn_mask=seen).transpose(1, 2)
        result = self.out(self.gated(out, x).flatten(-2))
        return (result, (key, value)) if return_state else result
