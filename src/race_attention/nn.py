"""``RaceAttention``: the layer around the core."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .arguments import SEEDS, flag, number, size
from .attention import race_attention
from .convolution import causal as causal_convolution
from .convolution import centred as centred_convolution
from .decay import check_decay, multiscale_log_decay
from .features import sample_hyperplanes
from .forms import MAX_BETA, MAX_PLANES, check_scale, is_tensor
from .layer_checks import check_inputs, check_state
from .layer_state import RaceAttentionState
from .rotary import cosines, positions, turn

_MIN_BETA = 1e-4


class RaceAttention(nn.Module):
    """Multi-head RACE Attention (arXiv 2510.04008), to be put where softmax attention was.

    Projections to heads, optionally a short convolution and rotary positions, the core
    :func:`race_attention`, optionally a norm and gate, the output projection. With every option off this is
    the paper's layer, except that its scale is 1 (pass ``scale=1.0``); the options go beyond the paper.

    Args:
        embed_dim: size of a token.
        num_heads: H, query heads.
        num_kv_heads: G, key heads; H must be a multiple. Default H.
        head_dim: D, size of a query or key. Default embed_dim / num_heads.
        value_dim: Dv, size of a head's value. Default head_dim.
        tables: L, hash tables; the error of the estimate falls with sqrt(L).
        planes: P, hyperplanes a table (1 to 10): sharpness. A head's state has L * 2**P * (Dv + 1) numbers.
        beta: start of the soft buckets' sharpness, in (0, 1e4].
        learn_beta: trains one beta a key head (its logarithm is the parameter).
        learn_hyperplanes: trains the hyperplanes, which otherwise are a buffer.
        hyperplanes_per_head: draws planes for each key head; otherwise one draw serves all.
        orthogonal: draws the planes of a table orthogonal.
        scale: multiplies the projections on hyperplanes. Default head_dim ** -0.5, which keeps tanh from
            saturating for tokens of unit variance.
        causal: Algorithm 2, and the layer can carry a state; otherwise Algorithm 1.
        conv_size: taps of a depthwise convolution on queries, keys and values, 0 for none. Causal layers
            convolve over the past, others over both sides.
        decay: how old keys fade, causal only. None: not at all. A number in (0, 1]: every state is multiplied
            by it at each token. "multiscale": fixed, time constants log-spaced from 16 to 2048 tokens over
            the key heads, the last quarter of them without decay. "learned": one number a key head, trained,
            starting as "multiscale". "per_token": likewise, plus a linear function of the token.
        norm_gate: RMS norm of each head's output times silu of a linear function of the token.
        bias: gives the projections of queries, keys, values and output a bias.
        dropout: probability with which a key is left out in training, mass and value together, per batch row,
            key head and token: there is no weight matrix to drop from.
        rope: base of rotary positions (10_000.0 is usual) applied before hashing, or None. D must be even.
        readout: "global", the paper's: one mean over all buckets. "bucket": the mean of each bucket, averaged, as the
            paper's released code has it; for comparison and for models trained so, served by the reference backend.
        seed: of the hyperplanes.
        device, dtype: of the parameters.

    Raises:
        ValueError, TypeError: naming the argument, what was given and what is allowed.
    """

    hyperplanes: Tensor  # [G or 1, L, P, D]
    log_beta: Tensor  # [G]
    fixed_log_decay: Tensor  # [G], where decay is a number or "multiscale"

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        value_dim: int | None = None,
        tables: int = 4,
        planes: int = 4,
        beta: float = 2.0,
        learn_beta: bool = True,
        learn_hyperplanes: bool = False,
        hyperplanes_per_head: bool = True,
        orthogonal: bool = False,
        scale: float | None = None,
        causal: bool = False,
        conv_size: int = 0,
        decay: float | str | None = None,
        norm_gate: bool = False,
        bias: bool = False,
        dropout: float = 0.0,
        rope: float | None = None,
        readout: str = "global",
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.embed_dim, self.num_heads = size("embed_dim", embed_dim), size("num_heads", num_heads)
        self.num_kv_heads = size("num_kv_heads", num_heads if num_kv_heads is None else num_kv_heads)
        if num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads: got {num_kv_heads}, allowed is a divisor of num_heads = {num_heads}")
        if head_dim is None and embed_dim % num_heads:
            raise ValueError(f"embed_dim: got {embed_dim}, allowed is a multiple of num_heads = {num_heads}")
        self.head_dim = size("head_dim", embed_dim // num_heads if head_dim is None else head_dim)
        self.value_dim = size("value_dim", self.head_dim if value_dim is None else value_dim)
        self.tables, self.planes = size("tables", tables), size("planes", planes, most=MAX_PLANES)
        self.beta_start = number("beta", beta, 0.0, MAX_BETA)
        self.learn_beta, self.learn_hyperplanes = (
            flag("learn_beta", learn_beta),
            flag("learn_hyperplanes", learn_hyperplanes),
        )
        self.hyperplanes_per_head = flag("hyperplanes_per_head", hyperplanes_per_head)
        self.orthogonal = flag("orthogonal", orthogonal)
        self.scale = check_scale(self.head_dim**-0.5 if scale is None else scale)
        self.causal, self.norm_gate = flag("causal", causal), flag("norm_gate", norm_gate)
        self.conv_size = size("conv_size", conv_size, least=0)
        self.decay = check_decay(decay, causal)
        self.dropout = number("dropout", dropout, 0.0, 1.0, "[)")
        self.rope = None if rope is None else number("rope", rope, 0.0, math.inf, "()")
        if rope is not None and self.head_dim % 2:
            raise ValueError(f"rope: got {rope} with head_dim = {self.head_dim}, allowed is an even head_dim")
        if readout not in ("global", "bucket"):
            raise ValueError(f"readout: got {readout!r}, allowed are 'global', 'bucket'")
        self.readout, self.seed = readout, size("seed", seed, *SEEDS)
        if dtype is not None and not dtype.is_floating_point:
            raise TypeError(f"dtype: got {dtype}, allowed is a floating dtype")
        self._make_parameters(flag("bias", bias), {"device": device, "dtype": dtype})
        self.reset_parameters()

    @classmethod
    def for_language_models(cls, embed_dim: int, num_heads: int, **options: Any) -> RaceAttention:
        """The causal layer with all that helps a language model: what a decoder should start from.

        The paper's bare layer is well behind softmax on byte-level text; with these options it is ahead of softmax with
        rotary positions, and of one with convolution and gate as well (the documentation's page on accuracy has the
        numbers). They are ``causal=True``, ``conv_size=4``, ``decay="per_token"``, ``norm_gate=True`` and
        ``rope=10_000.0``. Hyperplanes are not trained: over three seeds that gained nothing. Rotary positions need an
        even ``head_dim``; pass ``rope=None`` for an odd one.

        Args:
            embed_dim: size of a token.
            num_heads: H, query heads.
            options: any keyword of the class; those given here win over the preset's.

        Returns:
            The layer.

        Raises:
            ValueError, TypeError: as the class does.
        """
        preset: dict[str, Any] = {
            "causal": True,
            "conv_size": 4,
            "decay": "per_token",
            "norm_gate": True,
            "rope": 10_000.0,
        }
        return cls(embed_dim, num_heads, **(preset | options))

    def _make_parameters(self, bias: bool, factory: dict[str, Any]) -> None:
        groups, queries, keys = self.num_kv_heads, *self._widths[:2]
        values, out = self._widths[2], self.num_heads * self.value_dim
        self.q_proj = nn.Linear(self.embed_dim, queries, bias=bias, **factory)
        self.k_proj = nn.Linear(self.embed_dim, keys, bias=bias, **factory)
        self.v_proj = nn.Linear(self.embed_dim, values, bias=bias, **factory)
        self.out_proj = nn.Linear(out, self.embed_dim, bias=bias, **factory)
        planes = (groups if self.hyperplanes_per_head else 1, self.tables, self.planes, self.head_dim)
        _register(self, "hyperplanes", torch.empty(planes, **factory), self.learn_hyperplanes)
        _register(self, "log_beta", torch.empty(groups, **factory), self.learn_beta)
        if self.conv_size:
            self.conv_weight = nn.Parameter(torch.empty(sum(self._widths), self.conv_size, **factory))
        if self.decay in ("learned", "per_token"):
            self.decay_logit = nn.Parameter(torch.empty(groups, **factory))
        elif self.decay is not None:
            self.register_buffer("fixed_log_decay", torch.empty(groups, **factory))
        if self.decay == "per_token":
            self.decay_proj = nn.Linear(self.embed_dim, groups, bias=False, **factory)
        if self.norm_gate:
            self.norm = nn.RMSNorm(self.value_dim, eps=1e-5, **factory)
            self.gate_proj = nn.Linear(self.embed_dim, out, bias=False, **factory)

    @property
    def _widths(self) -> tuple[int, int, int]:
        """Channels of all heads' queries, keys and values."""
        groups = self.num_kv_heads
        return self.num_heads * self.head_dim, groups * self.head_dim, groups * self.value_dim

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws all parameters anew; the hyperplanes are those of ``seed`` again."""
        for module in self.children():
            if isinstance(module, nn.Linear | nn.RMSNorm):  # not what parametrize adds
                module.reset_parameters()
        heads = self.num_kv_heads if self.hyperplanes_per_head else 1
        planes = sample_hyperplanes(
            heads, self.tables, self.planes, self.head_dim, seed=self.seed, orthogonal=self.orthogonal, device="cpu"
        )
        self.hyperplanes.copy_(planes)
        self.log_beta.fill_(math.log(self.beta_start))
        if self.conv_size:
            bound = self.conv_size**-0.5  # as nn.Conv1d
            nn.init.uniform_(self.conv_weight, -bound, bound)
        if self.decay == "per_token":
            nn.init.normal_(self.decay_proj.weight, std=0.02)
        if self.decay in ("learned", "per_token"):
            start = multiscale_log_decay(self.num_kv_heads, longest=2.0**16).exp()
            self.decay_logit.copy_(torch.logit(start))
        elif self.decay == "multiscale":
            self.fixed_log_decay.copy_(multiscale_log_decay(self.num_kv_heads))
        elif self.decay is not None:
            self.fixed_log_decay.fill_(math.log(float(self.decay)))

    @property
    def beta(self) -> Tensor:
        """[G], the sharpness of the buckets, within [1e-4, 1e4]."""
        # The logarithm is clamped first: past it exp would overflow, and its gradient be NaN.
        logarithm = self.log_beta.to(torch.promote_types(self.log_beta.dtype, torch.float32))
        return logarithm.clamp(math.log(_MIN_BETA), math.log(MAX_BETA)).exp().clamp(_MIN_BETA, MAX_BETA)

    def hash(self) -> dict[str, Any]:
        """hyperplanes, beta and scale: what decides buckets, as ``save`` and ``load`` of states want it."""
        return {"hyperplanes": self.hyperplanes, "beta": self.beta, "scale": self.scale}

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        key_padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        state: RaceAttentionState | None = None,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, RaceAttentionState]:
        """Attends.

        Args:
            x: [B, T, embed_dim].
            context: [B, Tk, embed_dim], where keys and values come from; default x. Not for causal layers.
            key_padding_mask: [B, Tk] bool, True for padding, as in ``nn.MultiheadAttention``. Padding does not
                exist for the layer: no key, no decay, no position, no neighbour in the convolution. Outputs
                at padding are of no meaning.
            cu_seqlens: [n + 1] offsets of sequences packed in one row (B = 1); states have n rows.
            state: of what came before, from ``return_state``. A layer that is not causal takes the state's
                keys as extra keys (without ``conv_size``).
            return_state: returns the state after x too.

        Returns:
            [B, T, embed_dim], or a pair of it and a :class:`RaceAttentionState`.

        Raises:
            ValueError, TypeError: naming the argument, what was given and what is allowed.
        """
        check_inputs(x, context, key_padding_mask, cu_seqlens, embed_dim=self.embed_dim, causal=self.causal)
        rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        if self.conv_size and not self.causal and (state is not None or return_state):
            raise ValueError("state: got one asked for or given, allowed is none for conv_size with causal=False")
        check_state(state, x, rows, conv_size=self.conv_size, channels=sum(self._widths))
        source = x if context is None else context
        valid = None if key_padding_mask is None else ~key_padding_mask
        query, key, value = self.q_proj(x), self.k_proj(source), self.v_proj(source)
        query, key, value, tail = self._convolve(query, key, value, context, valid, cu_seqlens, state)
        query = query.unflatten(-1, (self.num_heads, self.head_dim))
        key = key.unflatten(-1, (self.num_kv_heads, self.head_dim))
        value = value.unflatten(-1, (self.num_kv_heads, self.value_dim))
        if self.rope is not None:
            position = positions(key, valid, cu_seqlens, None if state is None else state.position)
            angles = cosines(position, self.head_dim // 2, self.rope, key.dtype)
            key = turn(key, *angles)
            if context is not None:
                angles = cosines(positions(query, None, None, None), self.head_dim // 2, self.rope, query.dtype)
            query = turn(query, *angles)
        result = self._attend(
            query,
            key,
            value,
            beta=self.beta,
            hyperplanes=self.hyperplanes,
            scale=self.scale,
            causal=self.causal,
            log_decay=self._log_decay(x, valid),
            key_mask=self._key_mask(key, valid),
            cu_seqlens=cu_seqlens,
            initial_state=None if state is None else state.core,
            return_state=return_state,
            readout=self.readout,
        )
        out, core = result if isinstance(result, tuple) else (result, None)
        if self.norm_gate:
            gate = F.silu(self.gate_proj(x)).unflatten(-1, (self.num_heads, self.value_dim))
            out = self._normed(out) * gate
        out = self.out_proj(out.flatten(-2))
        if core is None:
            return out
        return out, RaceAttentionState(core, self._position_after(key, valid, cu_seqlens, state), tail)

    def step(self, x: Tensor, state: RaceAttentionState | None = None) -> tuple[Tensor, RaceAttentionState]:
        """One token, in time and memory that do not depend on how many came before.

        Args:
            x: [B, embed_dim], the next token of each row.
            state: after the tokens so far; None before the first.

        Returns:
            [B, embed_dim] and the new state; ``state`` itself is left as it was.

        Raises:
            ValueError: the layer is not causal, or x is no [B, embed_dim].
        """
        if not self.causal:
            raise ValueError("step: got a layer with causal=False, allowed is a causal one")
        is_tensor("x", x)
        if x.ndim != 2:
            raise ValueError(f"x: got shape {list(x.shape)}, allowed is [B, {self.embed_dim}]")
        out, state = self.forward(x.unsqueeze(1), state=state, return_state=True)
        return out.squeeze(1), state

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, **keywords: Any) -> Any:
        """The core on heads' queries, keys and values, as :func:`race_attention`: what a subclass may change."""
        return race_attention(query, key, value, **keywords)

    def _convolve(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        context: Tensor | None,
        valid: Tensor | None,
        cu_seqlens: Tensor | None,
        state: RaceAttentionState | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        if not self.conv_size:
            return query, key, value, None
        channels = (query, key, value)
        weights = self.conv_weight.to(query.dtype).split(self._widths)
        if not self.causal:
            masks = (valid if context is None else None, valid, valid)
            query, key, value = (
                centred_convolution(*each, cu_seqlens) for each in zip(channels, weights, masks, strict=True)
            )
            return query, key, value, None
        tails = (None,) * 3 if state is None or state.conv is None else state.conv.split(self._widths, dim=-1)
        (query, tail_q), (key, tail_k), (value, tail_v) = (
            causal_convolution(*each, valid, cu_seqlens) for each in zip(channels, weights, tails, strict=True)
        )
        return query, key, value, torch.cat((tail_q, tail_k, tail_v), dim=-1)

    def _log_decay(self, x: Tensor, valid: Tensor | None) -> Tensor | None:
        """[G] or [B, T, G], 0 at padding."""
        if self.decay is None:
            return None
        if self.decay in ("learned", "per_token"):
            logit = self.decay_logit.float() if self.decay_logit.dtype != torch.float64 else self.decay_logit
            if self.decay == "per_token":  # outside autocast: exp over many tokens wants all of the digits
                with nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False):
                    logit = logit + self._projected_decay(x, logit.dtype)
            log_decay: Tensor = F.logsigmoid(logit)
        else:
            log_decay = self.fixed_log_decay
        if valid is None:
            return log_decay
        return log_decay.expand(*valid.shape, -1).masked_fill(~valid.unsqueeze(-1), 0)

    def _projected_decay(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """What ``decay_proj`` makes of the tokens, [B, T, G] in ``dtype``, at least float32."""
        projection = self.decay_proj
        if _is_plain(projection, nn.Linear):
            return F.linear(x.to(dtype), projection.weight.to(dtype))
        # Pruned, adapted (LoRA), quantised: what its weight means is its own affair, and so are its digits.
        weight = getattr(projection, "weight", None)
        narrow = weight.dtype if isinstance(weight, Tensor) and weight.is_floating_point() else x.dtype
        out: Tensor = projection(x.to(narrow))
        return out.to(dtype)

    def _normed(self, out: Tensor) -> Tensor:
        """The norm of each head's output."""
        if not _is_plain(self.norm, nn.RMSNorm):
            normed: Tensor = self.norm(out)
            return normed
        weight = self.norm.weight.to(out.dtype)  # torch's fused norm wants one dtype
        return F.rms_norm(out, (self.value_dim,), weight, self.norm.eps)

    def _key_mask(self, key: Tensor, valid: Tensor | None) -> Tensor | None:
        """[B, Tk], or [B, Tk, G] where dropout leaves keys out."""
        if not (self.training and self.dropout):
            return valid
        kept = torch.rand(key.shape[:3], device=key.device) >= self.dropout
        return kept if valid is None else kept & valid.unsqueeze(-1)

    def _position_after(
        self, key: Tensor, valid: Tensor | None, cu_seqlens: Tensor | None, state: RaceAttentionState | None
    ) -> Tensor:
        if cu_seqlens is not None:
            passed = cu_seqlens.to(torch.int64).diff()
        elif valid is not None:
            passed = valid.sum(1)
        else:
            passed = torch.full((key.shape[0],), key.shape[1], dtype=torch.int64, device=key.device)
        return passed if state is None else state.position + passed

    def extra_repr(self) -> str:
        """The settings that are not seen in the submodules."""
        shown: dict[str, object] = {
            "num_heads": self.num_heads,
            "num_kv_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "value_dim": self.value_dim,
            "tables": self.tables,
            "planes": self.planes,
            "scale": round(self.scale, 6),
            "causal": self.causal,
        }
        optional: dict[str, object] = {
            "conv_size": self.conv_size,
            "decay": self.decay,
            "dropout": self.dropout,
            "rope": self.rope,
            "learn_hyperplanes": self.learn_hyperplanes,
            "orthogonal": self.orthogonal,
            "readout": self.readout != "global" and self.readout,
        }
        shown |= {name: value for name, value in optional.items() if value}
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())


def _is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether all that a module does is told by its weight."""
    return type(module) is kind and not (module._forward_pre_hooks or module._forward_hooks)


def _register(module: nn.Module, name: str, tensor: Tensor, learned: bool) -> None:
    if learned:
        module.register_parameter(name, nn.Parameter(tensor))
    else:
        module.register_buffer(name, tensor)
